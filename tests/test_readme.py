"""What the README says works: its Python runs, its commands exist, its files are there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mnemoscope.cli import app
from mnemoscope.report import STORIES
from mnemoscope.report.words import ranged
from mnemoscope.statistics import Estimate
from mnemoscope.tasks.jsonl import read_jsonl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("line", [x for b in blocks("sh") for x in b.splitlines() if x.startswith("mnemoscope")])
def test_commands_and_options_exist(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {a for a in arguments if a.startswith("-")} <= known


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_example_line_is_valid_jsonl(tmp_path: Path) -> None:
    (line,) = blocks("json")
    (tmp_path / "one.jsonl").write_text(line)
    (example,) = read_jsonl(tmp_path / "one.jsonl", 0)
    assert example.kind == "conflict"
    assert set(json.loads(line)) == {"item", "group", "prompt", "memorized", "generalized"}


def test_the_python_runs_on_a_run_folder(mini_run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """On the miniature study instead of the quickstart: same folders, two-digit operands, two layers of 64."""
    monkeypatch.chdir(mini_run.parent)
    space: dict[str, object] = {}
    for code in blocks("python"):
        code = code.replace("runs/quickstart", mini_run.name).replace("layers=4, neurons=128", "layers=2, neurons=64")
        code = code.replace('"addition", {}', '"addition", {"digits": 2, "stored": 96}')
        exec(compile(code.replace("347+268=", "34+26=").replace("901+155=", "91+55="), "README", "exec"), space)
    assert "34+26=" in capsys.readouterr().out
    assert space["vector"].toward == "memorized"  # type: ignore[attr-defined]


def test_the_page_of_fields_is_that_of_the_code() -> None:
    command = [sys.executable, ROOT / "docs" / "study.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs" / "STUDY.md").read_text(), "python docs/study.py > docs/STUDY.md"
    assert "| `learned_steps` | `20` |" in printed
    assert "stored pairs" in printed


def test_the_page_of_records_is_that_of_the_code() -> None:
    command = [sys.executable, ROOT / "docs" / "records.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs" / "RECORDS.md").read_text(), "python docs/records.py > docs/RECORDS.md"
    assert "| `minus_control` | {str:" in printed


def test_the_tables_of_the_review_are_those_of_the_report(mini_run: Path) -> None:
    """Every story is there, and a shift in its table is the one of results.json."""
    command = [sys.executable, ROOT / "docs" / "review.py", mini_run]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(re.findall("^### ", printed, flags=re.MULTILINE)) == len(STORIES)
    task = json.loads((mini_run / "results.json").read_text())["tasks"]["addition"]
    shift = Estimate(**task["steering"]["to_memorized"]["pairs"]["shift"])
    assert f"| Towards remembering, pairs: vector | {ranged(shift)} |".replace("\u00a0", " ") in printed
