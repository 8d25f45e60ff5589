"""What a fit tries and measures: the study of ``fit``, and the steps in which a budget leaves parts of it out."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import numpy as np

from mnemoscope.config import SteeringConfig, StudyConfig, parse_study
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Task, allow_code

# Tried in each layer; standardized NMD, as huge activations of a few neurons would dominate the plain one.
METHODS = ("standardized-nmd", "gradient")
# What is learned beside them, by position: a low-rank shift depends on the state, so it cannot be exported.
LEARNED = {"decision": "low-rank", "all": "learned"}
# In units of each neuron's spread: from shifts that do nothing to those that break a model, whichever it is.
TRIED: dict[str, dict[str, list[Any]]] = {"block": {"tops": [0.5], "strengths": [0.1, 0.2, 0.4, 0.8]}}
ONE_LAYER = len(METHODS) * sum(math.prod(map(len, grid.values())) for grid in TRIED.values())
SETTINGS = 6 * ONE_LAYER
CLAIMED = 2  # draws of each control of what is aimed at: of one alone nobody knows how much it varies
LOST, NEITHER = 0.08, 0.12  # what a vector may cost on tune, unless told otherwise
STEERING: dict[str, Any] = {
    "unit": "spread",
    **{"fit_pairs": 200, "fit_others": 128, "learned_steps": 24, "fit_batch": 8, "kept_weight": 1.0},
    **{"tune_pairs": 48, "tune_others": 48, "tune_draws": CLAIMED, "judged_examples": 80},
    "tune_refits": 0,  # refitted controls are judged on test; while settings are compared they would cost the most
    "norm_draws": 0,
    "low_rank": {"steps": 32, "refits": 0},
    "controls_of": "best",
    # A null of each kind: of neurons, of signs, of labels or answers, and of everything.
    "controls": ["random_neurons", "random_sign", "shuffled_labels", "permuted_answers", "gaussian"],
    **{"draws": 1, "conflict_draws": CLAIMED, "screened": 12},
    "control_limit": 0.15,
}
MEASURED: dict[str, Any] = {
    "pairs": {"batch_size": 64, "rephrasings": 3, "fit_examples": 240, "tune_examples": 140}
    | {"test_examples": 220, "held_out_examples": 60, "behaviour_examples": 200, "at_once": 2048},
    "probes": {"offsets": [0], "pairs": 250, "learning_draws": 2, "halvings": 6},
    "effects": {"pairs": 16, "draws": 1, "doses": [0.5, 1.0, 2.0], "ablated": [0.1]}
    | {"methods": "best", "patched": False},
    "detection": {"fitted": True, "examples": 400, "others": 100},
    "neutral": {"cuts": 8, "texts": 4, "length": 32, "doses": [0.5, 1.0]},
}


class Level(NamedTuple):
    """A step of leaving out: what goes, beside what went before, and how long the rest takes.

    As long as ``passes`` over every token of its data and one over ``tokens`` more, which are learned from and judged
    however few there are. Set by hand to runs of two models at the first and the last level, and to seconds of their
    stages between (docs/LOG.md).
    """

    without: str
    passes: float
    tokens: int
    changes: Mapping[str, Any] = MappingProxyType({})
    layers: float = 1.0  # of them, the share that is tried
    learns: bool = True  # whether anything is learned beside what is tried in each layer


FEW: dict[str, dict[str, Any]] = {"effects": {"doses": [1.0], "ablated": []}, "neutral": {"cuts": 0}}
FEWER = FEW | {
    "pairs": {"rephrasings": 2, "fit_examples": 160, "tune_examples": 100, "test_examples": 160}
    | {"behaviour_examples": 160, "held_out_examples": 40}
}
HALF, QUARTER = (  # of the steps of either kind of learning
    FEWER | {"steering": {"learned_steps": 3 * steps // 4, "low_rank": {"steps": steps, "refits": 0}}}
    for steps in (16, 8)
)
LEVELS = (
    Level("nothing", 2.0, 94_800),
    Level("dose curves, ablations and divergence on neutral text", 1.9, 88_800, FEW),
    Level("half of the examples", 1.65, 78_400, FEWER),
    Level("half of the layers", 1.65, 72_000, FEWER, 0.5),
    Level("half of the steps of what is learned", 1.65, 61_000, HALF, 0.5),
    Level("another quarter of these steps", 1.65, 49_000, QUARTER, 0.5),
    Level("what is learned", 1.4, 40_500, FEWER, 0.5, learns=False),
)


def left_out(level: int) -> str:
    """What a level leaves out, in words."""
    return ", ".join(one.without for one in LEVELS[1 : level + 1]) or LEVELS[0].without


def fitting_study(
    model: dict[str, Any],
    task: str | Path | Task,
    options: dict[str, Any],
    settings: int = SETTINGS,
    threads: int = 1,
    positions: str = "decision",
    aim: str = "conflict",
    lost: float = LOST,
    neither: float = NEITHER,
    level: int = 0,
) -> StudyConfig:
    """The study of a fit, with one cell.

    Args:
        model: fields of ``ModelConfig``.
        task: a task's name, ``package.module:Class``, the path of a JSONL file, or a task; ``options``: of the task.
        settings: the budget: settings tried at most in either direction, in evenly spread layers.
        positions: ``decision``, or ``all`` tokens, for vectors to export.
        aim: what vectors are chosen for: ``conflict`` as drawn, which is what a user meets, or ``pairs``.
        lost: share of other answers, and ``neither``: share of steered prompts answered neither way, beyond which a
            setting comes last.
        level: of ``LEVELS``, how much is left out to keep to a budget.

    Raises:
        InputError: the file does not exist, the budget is below one layer's, or a field is not allowed or no share.
    """
    if isinstance(task, Task):
        # A digest of its examples, so that a run folder is continued with the same task only.
        drawn = [e for kind in ("conflict", "memory") for e in task.examples(np.random.default_rng(0), 200, kind)]
        digest = hashlib.sha256("".join(f"{e.item}|{e.prompt}|{e.options}" for e in drawn).encode()).hexdigest()
        name, options = f"{type(task).__module__}:{type(task).__name__}", {"digest": digest[:16]}
    else:
        name = str(task)
        allow_code(name)  # it is the user who names it
    is_file = name.endswith(".jsonl")
    if is_file and not Path(name).is_file():
        raise InputError(f"task: the file {name} does not exist")
    if settings < ONE_LAYER:
        raise InputError(f"settings: {settings} is less than the {ONE_LAYER} that one layer takes")
    for field, given in {"aim": aim, "positions": positions}.items():
        allowed = get_args(SteeringConfig.model_fields[field].annotation)
        if given not in allowed:
            raise InputError(f"{field}: {given!r}; allowed are {' and '.join(allowed)}")
    for field, share in {"lost": lost, "neither": neither}.items():
        if not 0 <= share <= 1:
            raise InputError(f"{field}: {share!r}; allowed is a share from 0 to 1")
    less = LEVELS[level]
    layers = {"layers": [f"spread-{max(1, int(less.layers * (settings // ONE_LAYER)))}"]}
    methods = [*METHODS, LEARNED[positions]] if less.learns else [*METHODS]
    tried: dict[str, Any] = {
        "methods": methods,
        "grids": {site: layers | grid for site, grid in TRIED.items()},
        "aim": aim,
        "collateral_limit": lost,
        "neither_limit": neither,
    }
    tried |= {"draws": CLAIMED} if aim == "pairs" else {}
    measured = {name: fields | less.changes.get(name, {}) for name, fields in MEASURED.items()}
    cell = measured | {
        "task": "jsonl" if is_file else name,
        "options": {"file": str(Path(name).resolve()), **options} if is_file else options,
        "model": model,
        "steering": STEERING | tried | {"positions": positions} | less.changes.get("steering", {}),
    }
    label = Path(name).stem if is_file else name.rpartition(":")[2]
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", label).lstrip("_.-")[:100] or "mine"
    out = {"left_out": left_out(level)} if level else {}
    return parse_study({"study": "fit", "threads": threads, "cells": {label: cell}, **out})
