"""A study that is killed at random moments, trainings and adapters included, goes on and ends in the same bytes.

`make attack` kills 40 times, the usual suite once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import yaml

from helpers import MINI_STUDY, MINI_TASKS
from mnemoscope.behaviour import Asking
from mnemoscope.config import load_study
from mnemoscope.study.run import run_study
from test_study import check_results

KILLS, OF_A_RUN = (40, 8) if os.environ.get("MNEMOSCOPE_ATTACK") == "whole" else (1, 1)
TIMES = ("stages", "training_time.json")  # of which no two runs are alike
NO_RULE = {"novel_accuracy": 0, "recall": 0, "conflict_each": 0, "conflict_other": 1}
FEW = {"methods": ["nmd"], "grids": {"block": {"tops": [0.5], "strengths": [0.3]}}, "conflict_draws": 1}

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def study(mini: Callable[[str], Asking], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell that is only trained, from scratch, and one with every stage, which learns an adapter with dropout."""
    place, base = tmp_path_factory.mktemp("killed"), mini("addition-digits")
    base.model.save_pretrained(place / "base")
    base.tokenizer.save_pretrained(place / "base")
    raw = yaml.safe_load(MINI_STUDY)
    cell = raw["cells"]["addition"]
    training = {"steps": 100, "evaluate_every": 25, "evaluation_examples": 50, "stop": NO_RULE}
    raw["cells"]["adapted"] = cell | {
        "task": "addition-digits",
        "options": MINI_TASKS["addition-digits"],
        "model": {"folder": str(place / "base"), "lora": {"dropout": 0.1}},
        "training": training | {"steps": 10, "evaluate_every": 5, "warmup_steps": 0, "learning_rate": 1e-5},
        "steering": cell["steering"] | FEW,
    }
    raw["cells"]["addition"] = cell | {"analysed": False, "training": training}
    (place / "study.yaml").write_text(yaml.safe_dump(raw))
    return place / "study.yaml"


def work(study: Path, run: Path) -> None:
    run_study(load_study(str(study)), run, workers=1)


def begun(study: Path, run: Path) -> BaseProcess:
    """A run in a process of its own, of a server that has imported the libraries."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["mnemoscope.study.stages", "mnemoscope.report", "test_kills"])
    process = context.Process(target=work, args=(study, run))
    process.start()
    return process


def content(run: Path) -> dict[str, bytes]:
    """The bytes of all files of the cells, but for times."""
    found = {path.relative_to(run): path for path in sorted((run / "cells").rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if not set(TIMES) & set(name.parts)}


def test_a_study_killed_at_random_moments_ends_in_the_same_bytes(study: Path, tmp_path: Path) -> None:
    whole, rng, kills, number = tmp_path / "whole", np.random.default_rng(KILLS), 0, 0
    begun(study, tmp_path / "server").kill()  # which starts the server
    began = time.monotonic()
    process = begun(study, whole)
    process.join()
    assert process.exitcode == 0
    span, expected = (time.monotonic() - began) / OF_A_RUN, content(whole)
    while kills < KILLS:
        run = tmp_path / f"run-{number}"
        for left in reversed(range(min(OF_A_RUN, KILLS - kills) + 1)):
            process = begun(study, run)
            process.join(rng.uniform(0, span) if left else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        assert process.exitcode == 0
        found = content(run)
        assert list(found) == list(expected)
        assert [name for name in found if found[name] != expected[name]] == []
        check_results(run, whole)
        assert not list(run.rglob("*.tmp*"))
        number += 1
