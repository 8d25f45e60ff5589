"""A miniature of every built-in study: its own methods, grids and stages, on small trained models and few examples."""

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
from mnemoscope.config import built_in_studies, parse_study
from mnemoscope.study.run import run_study

FEW = {"behaviour_examples": 60, "fit_examples": 1000, "tune_examples": 300, "test_examples": 400, "permutations": 99}
SHORT = {"draws": 2, "norm_draws": 1, "conflict_draws": 1, "tune_refits": 1, "tune_draws": 1, "learned_steps": 3}
SHORT |= {"tune_pairs": 20, "tune_others": 20, "fit_pairs": 40, "fit_others": 20, "judged_examples": 30}
SHORT |= {"low_rank": {"layers": 2, "steps": 3, "refits": 1}}
ALIKE = {("paper", "addition"), ("lora", "smollm2-addition"), ("lora", "gemma-inference")}


def miniature(name: str, folders: dict[str, str]) -> dict[str, Any]:
    """The study with its cells of these tasks on trained models, and less of everything but kinds of things.

    Cells with the settings of another one are left out. Adapters have tests of their own.
    """
    study = yaml.safe_load((files("mnemoscope") / "studies" / f"{name}.yaml").read_text())
    cells = {}
    for label, cell in study["cells"].items():
        task, steering = cell["task"], cell.get("steering", {})
        if task not in folders or "cell" in cell.get("model", {}) or (name, label) in ALIKE:
            continue
        grids = {
            site: grid
            | {"layers": ["all", "0"], "tops": grid["tops"][:1]}
            | {"strengths": grid["strengths"][: 2 if site == "block" else 1]}
            for site, grid in steering["grids"].items()
        }
        cells[label] = cell | {
            "options": MINI_TASKS[task] | {"seed": 0},
            "model": {"folder": folders[task]},
            "training": {},
            "pairs": cell["pairs"] | FEW,
            "probes": {"offsets": [0], "learning_draws": 1, "halvings": 2},
            "steering": steering | SHORT | {"grids": grids},
            "effects": {"pairs": 20, "doses": [0, 1], "ablated": [0.1], "draws": 1},
        }
    return study | {"seeds": 1, "first_seed": 0, "cells": cells}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in built_in_studies() if name not in ("gemma", "smollm2")])
def test_every_study_runs_in_miniature(name: str, mini: Callable[[str], Asking], tmp_path: Path) -> None:
    folders = {}
    for task in ("inference", "addition") if name != "paper" else MINI_TASKS:
        asking = mini(task)
        folders[task] = str(tmp_path / task)
        asking.model.save_pretrained(folders[task])
        asking.tokenizer.save_pretrained(folders[task])
    config = parse_study(miniature(name, folders))
    run_study(config, tmp_path / "run", workers=1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    assert set(found) == set(config.cells)
    for label, cell in config.cells.items():
        assert set(found[label]["steering_by_method"]) == set(cell.steering.methods)
        if cell.steering.screened:  # of pairs and at equal norms the best alone are judged
            continue
        rows = pd.read_parquet(tmp_path / "run" / "cells" / f"{label}-0" / "records" / "steering.parquet")
        assert set(rows[rows.aim == "equal_norm"].method) == set(cell.steering.methods)
        swept = pd.read_parquet(tmp_path / "run" / "cells" / f"{label}-0" / "records" / "sweep.parquet")
        settings = swept[swept.examples == "pairs"].groupby("method")[["site", "layers", "top", "strength"]]
        tried = [set(map(tuple, part.to_numpy())) for _, part in settings]
        assert all(some == tried[0] for some in tried), "every method is tried with the same settings"
