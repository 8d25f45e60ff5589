"""The study of a user's own model and data: pairs, vectors with their controls, and a detector."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mnemoscope.config import StudyConfig, parse_study
from mnemoscope.errors import InputError

# What is tried of each layer. Huge activations of a few neurons would decide plain NMD, so its standardized form is
# tried.
TRIED: dict[str, dict[str, list[Any]]] = {
    "standardized-nmd": {"sites": ["block"], "tops": [0.1, 0.5], "strengths": [0.3, 0.6]},
    "gradient": {"sites": ["block"], "tops": [0.5], "strengths": [0.1, 0.2, 0.4]},
    "learned": {"sites": ["block", "mlp"], "tops": [0.5], "strengths": [0.15, 0.3]},
}
ONE_LAYER = sum(math.prod(map(len, grid.values())) for grid in TRIED.values())
SETTINGS = 6 * ONE_LAYER


def fitting_study(
    model: dict[str, Any],
    task: str,
    options: dict[str, Any],
    settings: int = SETTINGS,
    threads: int = 1,
    positions: str = "decision",
) -> StudyConfig:
    """A study with one cell.

    Args:
        model: fields of ``ModelConfig``.
        task: a task's name, ``package.module:Class``, or the path of a JSONL file.
        options: of the task.
        settings: how many settings are tried at most in either direction, dealt evenly to layers: the budget.
        positions: ``decision``, or ``all`` tokens, for vectors that are to be exported.

    Raises:
        InputError: the file does not exist, the budget is below one layer's, or a field is not allowed.
    """
    is_file = task.endswith(".jsonl")
    if is_file and not Path(task).is_file():
        raise InputError(f"task: the file {task} does not exist")
    if settings < ONE_LAYER:
        raise InputError(f"settings: {settings} is less than the {ONE_LAYER} that one layer takes")
    layers = [f"spread-{settings // ONE_LAYER}"]
    # What every program can take that a vector for all tokens is exported to.
    everywhere = {"sites": ["block"]} if positions == "all" else {}
    cell = {
        "task": "jsonl" if is_file else task,
        "options": {"file": str(Path(task).resolve()), **options} if is_file else options,
        "model": model,
        "pairs": {"batch_size": 64, "rephrasings": 4, "fit_examples": 2000, "tune_examples": 1000}
        | {"test_examples": 2000, "behaviour_examples": 500},
        "probes": {"offsets": [0], "pairs": 800},
        "steering": {
            "fit_pairs": 300,
            "fit_others": 200,
            "learned_steps": 40,
            "kept_weight": 1.0,
            "tune_pairs": 120,
            "tune_others": 60,
            "tune_refits": 4,
            "tune_draws_again": 8,
            "judged_examples": 200,
            "control_limit": 0.15,
            "collateral_limit": 0.05,
            "positions": positions,
            "sweeps": {method: {"layers": layers, **grid, **everywhere} for method, grid in TRIED.items()},
        },
        "effects": {"pairs": 60, "draws": 1, "doses": [0.0, 0.5, 1.0, 2.0], "ablated": [0.1]},
        "detection": {"fitted": True},
        "neutral": {"cuts": 200, "texts": 32, "length": 64},
    }
    label = Path(task).stem if is_file else task.rpartition(":")[2]
    return parse_study({"study": "fit", "threads": threads, "cells": {label: cell}})
