"""What a fit tries and measures: the study of ``fit``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mnemoscope.config import SteeringConfig, StudyConfig, parse_study
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Task, described_task, examples_digest

# Tried in each layer. Standardized NMD did at most as much in six directions of three files (docs/LOG.md).
METHODS = ("gradient",)
# What a fit tries by the name that users know, by positions of vectors, of which one kind at least is tried: a low-rank
# shift depends on the state, so it cannot be exported; with "all" a constant one is learned in its place.
VECTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "decision": {"shift": METHODS, "low-rank": ("low-rank",)},
    "all": {"shift": (*METHODS, "learned")},
}
OTHERS = {"words": ("prompt",), "decoding": ("cad",), "adapter": ("lora",)}
LEVERS = ("words", "decoding", "shift", "low-rank", "adapter")
# In units of each neuron's spread: from shifts that do nothing to those that break a model, whichever it is.
TRIED: dict[str, dict[str, list[Any]]] = {"block": {"tops": [0.5], "strengths": [0.1, 0.2, 0.4, 0.8]}}
ONE_LAYER = len(METHODS) * sum(math.prod(map(len, grid.values())) for grid in TRIED.values())
SETTINGS = 5 * ONE_LAYER
CLAIMED = 2  # draws of each control of what is aimed at: of one alone nobody knows how much it varies
STEERING: dict[str, Any] = {
    "unit": "spread",
    **{"fit_pairs": 200, "fit_others": 128, "learned_steps": 20, "fit_batch": 8, "kept_weight": 1.0},
    **{"tune_pairs": 48, "tune_others": 48, "tune_draws": CLAIMED, "judged_examples": 80},
    "tune_refits": 0,  # refitted controls are judged on test; while settings are compared they would cost the most
    "norm_draws": 0,
    "low_rank": {"steps": 24, "refits": 0},
    "controls_of": "best",
    # A null of each kind: of neurons, of signs, of labels or answers, and of everything.
    "controls": ["random_neurons", "random_sign", "shuffled_labels", "permuted_answers", "gaussian"],
    **{"draws": 1, "conflict_draws": CLAIMED, "screened": 12},
    "control_limit": 0.15,
}
MEASURED: dict[str, Any] = {
    "pairs": {"batch_size": 64, "rephrasings": 3, "fit_examples": 240, "tune_examples": 140}
    | {"test_examples": 220, "held_out_examples": 60, "behaviour_examples": 200, "at_once": 128},
    "probes": {"offsets": [0], "pairs": 250, "learning_draws": 2, "halvings": 6},
    "effects": {"pairs": 16, "draws": 1, "doses": [0.5, 1.0, 2.0], "ablated": [0.1]}
    | {"methods": "best", "patched": False},
    "detection": {"fitted": True, "examples": 400, "others": 100},
    "neutral": {"cuts": 8, "texts": 4, "length": 32, "doses": [1.0]},
}


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user may choose of a fit.

    Attributes:
        settings: tried at most in either direction, in evenly spread layers.
        threads: of torch, in each process.
        levers: what is tried: names of ``LEVERS``, a kind of vector at least.
        positions: ``decision``, or ``all`` tokens, for vectors to export.
        aim: what vectors are chosen for: ``conflict`` as drawn, which is what a user meets, or ``pairs``.
        lost: share of other answers, and ``neither``: share of steered prompts answered neither way, beyond which a
            setting comes last.

    Raises InputError where there are fewer settings than one layer takes, or a field is not allowed or no share.
    """

    settings: int = SETTINGS
    threads: int = 1
    levers: Sequence[str] = LEVERS
    positions: str = "decision"
    aim: str = "conflict"
    lost: float = 0.08
    neither: float = 0.12

    def __post_init__(self) -> None:
        if self.settings < ONE_LAYER:
            raise InputError(f"settings: {self.settings} is less than the {ONE_LAYER} that one layer takes")
        for field in ("aim", "positions"):
            allowed = get_args(SteeringConfig.model_fields[field].annotation)
            if getattr(self, field) not in allowed:
                raise InputError(f"{field}: {getattr(self, field)!r}; allowed are {' and '.join(allowed)}")
        for lever in self.levers:
            if lever not in LEVERS:
                raise InputError(f"levers: {lever!r} is not one of {', '.join(LEVERS)}")
        if not set(self.levers) & set(VECTORS[self.positions]):
            told, wanted = ", ".join(self.levers) or "none", " or ".join(VECTORS[self.positions])
            raise InputError(f"levers: {told}; {wanted} must be among them, as the report is about vectors")
        for field in ("lost", "neither"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"{field}: {getattr(self, field)!r}; allowed is a share from 0 to 1")

    @property
    def methods(self) -> list[str]:
        """Those of the levers."""
        levers = (VECTORS[self.positions] | OTHERS).items()
        return [method for lever, methods in levers if lever in self.levers for method in methods]


def fitting_study(
    model: dict[str, Any], task: str | Path | Task, options: dict[str, Any], choices: Choices | None = None
) -> StudyConfig:
    """The study of a fit, with one cell.

    Args:
        model: fields of ``ModelConfig``.
        task: a task's name, ``package.module:Class``, the path of a file of rows, or a task; ``options``: of the task.

    Raises InputError where the task is unknown, or the file does not exist.
    """
    choices = choices or Choices()
    if isinstance(task, Task):
        if options:
            raise InputError("options: not for a task that is given as an object")
        # So that a run folder is continued with the same task only.
        name, options = f"{type(task).__module__}:{type(task).__name__}", {"digest": examples_digest(task)[:16]}
    else:
        name = str(task)
    kind, given = (name, {}) if isinstance(task, Task) else described_task(name)
    given |= {"file": str(Path(given["file"]).resolve())} if given else {}
    layers = {"layers": [f"spread-{choices.settings // ONE_LAYER}"]}
    steering = STEERING | {
        "methods": choices.methods,
        "grids": {site: layers | grid for site, grid in TRIED.items()},
        "aim": choices.aim,
        "positions": choices.positions,
        "collateral_limit": choices.lost,
        "neither_limit": choices.neither,
    }
    steering |= {"draws": CLAIMED} if choices.aim == "pairs" else {}
    cell = MEASURED | {"task": kind, "options": given | options, "model": model, "steering": steering}
    label = Path(name).stem if given else name.rpartition(":")[2]
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", label).lstrip("_.-")[:100] or "mine"
    return parse_study({"study": "fit", "threads": choices.threads, "cells": {label: cell}})
