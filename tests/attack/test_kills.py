"""A study that is killed at random moments, training and adapters included, goes on and ends in the same bytes.

`make attack` kills 40 times, the usual suite twice.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from helpers import MINI_STUDY, MINI_TASKS
from mnemoscope.behaviour import Asking
from test_study import check_results

WHOLE = os.environ.get("MNEMOSCOPE_ATTACK") == "whole"
KILLS, OF_A_RUN = (40, 8) if WHOLE else (2, 2)
TIMES = ("stages", "training_time.json")  # of which no two runs are alike

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(mini: Callable[[str], Asking], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with every stage, and a cell that learns an adapter with dropout."""
    place, base = tmp_path_factory.mktemp("killed"), mini("addition-digits")
    base.model.save_pretrained(place / "base")
    base.tokenizer.save_pretrained(place / "base")
    raw = yaml.safe_load(MINI_STUDY)
    cell = raw["cells"]["addition"]
    raw["cells"]["adapted"] = cell | {
        "task": "addition-digits",
        "options": MINI_TASKS["addition-digits"] | {"seed": 1},
        "model": {"folder": str(place / "base"), "lora": {"dropout": 0.1}},
        "steering": cell["steering"] | {"methods": ["nmd"], "grids": {"block": {"tops": [0.5], "strengths": [0.3]}}},
    }
    (place / "study.yaml").write_text(yaml.safe_dump(raw))
    return place


def begun(study: Path, run: Path) -> subprocess.Popen[str]:
    """A run, with processes of its own that are killed with it."""
    command = [
        sys.executable,
        "-m",
        "mnemoscope",
        "run",
        str(study / "study.yaml"),
        "--out",
        str(run),
        "--workers",
        "1",
    ]
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=silent, stderr=subprocess.PIPE, text=True, start_new_session=True)


def content(run: Path) -> dict[str, bytes]:
    """The bytes of all files of the cells, but for times."""
    found = {path.relative_to(run): path for path in sorted((run / "cells").rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if not set(TIMES) & set(name.parts)}


def killed(study: Path, run: Path, most: int, span: float, rng: np.random.Generator) -> int:
    """Run to the end, killed at random moments up to ``most`` times; returns how often."""
    for kills in range(most + 1):
        process = begun(study, run)
        assert process.stderr is not None
        process.stderr.readline()  # from now on it works
        if kills < most:
            time.sleep(rng.uniform(0, span))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                continue
        _, told = process.communicate()
        assert process.returncode == 0, told
        return kills
    raise AssertionError("the last round is not killed")


def test_a_study_killed_at_random_moments_ends_in_the_same_bytes(study: Path, tmp_path: Path) -> None:
    began, whole, rng = time.monotonic(), tmp_path / "whole", np.random.default_rng(KILLS)
    process = begun(study, whole)
    _, told = process.communicate()
    assert process.returncode == 0, told
    span, expected = (time.monotonic() - began) / OF_A_RUN, content(whole)
    kills = number = 0
    while kills < KILLS:
        run = tmp_path / f"run-{number}"
        kills += killed(study, run, min(OF_A_RUN, KILLS - kills), span, rng)
        found = content(run)
        assert list(found) == list(expected)
        assert [name for name in found if found[name] != expected[name]] == []
        check_results(run, whole)
        assert not list(run.rglob("*.tmp*"))
        shutil.rmtree(run)
        number += 1
