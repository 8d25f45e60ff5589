"""The notebook in ``examples/`` runs from top to bottom, on a model that the suite has trained already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from mnemoscope.behaviour import Asking

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # the kernel's client, not our code, which runs in the kernel
def test_the_notebook_runs(
    path: Path,
    mini: Callable[[str], Asking],
    shared_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mini("addition")
    monkeypatch.setenv("MNEMOSCOPE_MODEL", str(shared_folder / "mini-addition"))
    monkeypatch.setenv("MNEMOSCOPE_RUN", str(tmp_path / "run"))
    shown = nbformat.read(path, as_version=4)
    ran = NotebookClient(nbformat.read(path, as_version=4), timeout=300, kernel_name="python3").execute(cwd=tmp_path)
    for before, after in zip(shown.cells, ran.cells, strict=True):
        assert bool(printed(before)) == bool(printed(after)), after.source
    assert "P(memorized) = " in "".join(map(printed, ran.cells))
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_shows_outputs_and_no_errors(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} == {"stream"}
    assert {output.name for output in outputs} == {"stdout"}


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
