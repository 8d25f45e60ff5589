"""Miniatures of built-in studies: their own methods, grids and stages, on small trained models and few examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from helpers import MINI_TASKS
from mnemoscope.behaviour import Asking
from mnemoscope.config import parse_study
from mnemoscope.study.run import run_study

FEW = {"behaviour_examples": 40, "fit_examples": 400, "tune_examples": 200, "test_examples": 200, "permutations": 99}
SHORT = {"draws": 2, "norm_draws": 1, "conflict_draws": 1, "tune_refits": 1, "tune_draws": 1, "learned_steps": 2}
SHORT |= {"tune_pairs": 10, "tune_others": 10, "fit_pairs": 20, "fit_others": 10, "judged_examples": 20}
CELLS = {"paper": "inference", "lora": "smollm2-addition"}  # all methods at three sites; all positions, in spreads


def miniature(study: str, label: str, folder: str) -> dict[str, Any]:
    """A cell on a trained model, with less of everything but kinds of things. Adapters have tests of their own."""
    cell = yaml.safe_load((files("mnemoscope.config") / "studies" / f"{study}.yaml").read_text())["cells"][label]
    grids = {
        site: grid | {"layers": ["all", "0"] if site == "block" else ["0"]}
        | {"tops": grid["tops"][:1], "strengths": grid["strengths"][:1]}
        for site, grid in cell["steering"]["grids"].items()
    }  # fmt: skip
    return cell | {
        "options": MINI_TASKS[cell["task"]] | {"seed": 0},
        "model": {"folder": folder},
        "training": {},
        "pairs": cell["pairs"] | FEW,
        "probes": {"offsets": [0], "learning_draws": 1, "halvings": 2},
        "steering": cell["steering"] | SHORT | {"grids": grids},
        "effects": {"pairs": 10, "doses": [0, 1], "ablated": [0.1], "draws": 1},
    }


@pytest.mark.slow
def test_studies_run_in_miniature(mini: Callable[[str], Asking], tmp_path: Path) -> None:
    for task in ("inference", "addition"):
        asking = mini(task)
        asking.model.save_pretrained(tmp_path / task)
        asking.tokenizer.save_pretrained(tmp_path / task)
    cells = {study: miniature(study, label, str(tmp_path / label.rpartition("-")[2])) for study, label in CELLS.items()}
    config = parse_study({"study": "miniatures", "cells": cells})
    run_study(config, tmp_path / "run", workers=1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    assert set(found) == set(config.cells)
    for label, cell in config.cells.items():
        assert set(found[label]["steering_by_method"]) == set(cell.steering.methods)
        records = tmp_path / "run" / "cells" / f"{label}-0" / "records"
        rows = pd.read_parquet(records / "steering.parquet")
        assert set(rows[rows.aim == "pairs"].method) == set(cell.steering.methods)
        swept = pd.read_parquet(records / "sweep.parquet")
        settings = swept[swept.examples == "pairs"].groupby("method")[["site", "layers", "top", "strength"]]
        tried = [set(map(tuple, part.to_numpy())) for _, part in settings]
        assert all(some == tried[0] for some in tried), "every method is tried with the same settings"
