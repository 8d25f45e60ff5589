"""Every bad input is one line and exit code 2, and leaves nothing behind: a sample, all of them by `make attack`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import CELL, ROOTS, Attack
from typer.testing import CliRunner

from helpers import sign
from mnemoscope.cli import app

EVERY = 1 if os.environ.get("MNEMOSCOPE_ATTACK") == "whole" else 23  # of the inputs
LIMIT, PATIENCE = 10, 60  # seconds of a processor, and in all

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def run(mini_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best vector is the one that is damaged, whatever its own choice was."""
    copy = Path(shutil.copytree(mini_run, tmp_path_factory.mktemp("attacked") / "run"))
    chosen = copy.parent / CELL / "records" / "chosen.json"
    facts = json.loads(chosen.read_text())
    for aim in ("pairs", "conflict"):
        facts[aim]["best"]["to_generalized"] = "nmd"
    chosen.write_text(json.dumps(facts))
    sign(chosen.parents[1])
    return copy


def prepared(attack: Attack, run: Path, here: Path) -> None:
    """Make the files that the command finds; of a run those that are not changed are linked."""
    shutil.copytree(run, here / "run", copy_function=os.link)
    for name, content in attack[2].items():
        if callable(content):
            content(here / name)
            continue
        (here / name).unlink(missing_ok=True)
        (here / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if any(name.startswith("run/") for name in attack[2]):
        for place in ("run", CELL):
            sign(here / place)


def listing(folder: Path) -> dict[str, Any]:
    """All files of a folder, with their sizes and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, path.is_dir() or (status.st_size, status.st_mtime_ns))
    return found


def hangs(*_: Any) -> None:
    raise TimeoutError("it did not end")


def test_bad_input_is_one_line_soon_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [attack for root in ROOTS for attack in root()]
    assert len(every) >= 600
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    signal.signal(signal.SIGALRM, hangs)
    found = []
    for number, attack in enumerate(every[::EVERY]):
        name, arguments, _ = attack
        prepared(attack, run, here := tmp_path / str(number))
        monkeypatch.chdir(here)
        before, began = listing(here), time.process_time()
        signal.alarm(PATIENCE)
        done = CliRunner().invoke(app, arguments)
        signal.alarm(0)
        wrong = [f"exit code {done.exit_code}"] if done.exit_code != 2 else []
        wrong += ["too long"] if time.process_time() - began > LIMIT else []
        wrong += [] if done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") else ["not one line"]
        wrong += ["left or changed something"] if listing(here) != before else []
        if wrong:
            found.append(f"{name}: {', '.join(wrong)}: {done.stderr[-200:]} {done.exception!r}")
        shutil.rmtree(here)
    assert not found, f"{len(found)} of {len(every[::EVERY])}:\n" + "\n".join(found)
