"""The study behind ``fit``: pairs, vectors with their controls, and a detector for one model and data."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemoscope.behaviour import Prompting
from mnemoscope.cells import Opened
from mnemoscope.config import StudyConfig, parse_study
from mnemoscope.errors import InputError
from mnemoscope.models import load_model, use_layout
from mnemoscope.models.layout import Layout
from mnemoscope.steering import Binding
from mnemoscope.tasks import Task, allow_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Tried in each layer; standardized NMD, as huge activations of a few neurons would dominate the plain one.
METHODS = ("standardized-nmd", "gradient", "learned")
NOT_EXPORTED = ("low-rank",)  # it depends on the state, so it is not tried where vectors are to be exported
# In units of each neuron's spread: from shifts that do nothing to those that break a model, whichever it is.
TRIED: dict[str, dict[str, list[Any]]] = {"block": {"tops": [0.5], "strengths": [0.1, 0.2, 0.4, 0.8]}}
ONE_LAYER = len(METHODS) * sum(math.prod(map(len, grid.values())) for grid in TRIED.values())
SETTINGS = 6 * ONE_LAYER
STEERING = {
    "unit": "spread",
    "halving": 2,
    **{"fit_pairs": 300, "fit_others": 200, "learned_steps": 24, "kept_weight": 1.0},
    **{"tune_pairs": 60, "tune_others": 60, "tune_draws_again": 4, "judged_examples": 160},
    "tune_refits": 0,  # refitted controls are judged on test; while settings are compared they would cost the most
    "norm_draws": 0,
    "low_rank": {"refits": 0},
    "controls_of": "best",
    **{"draws": 4, "conflict_draws": 4},
    **{"control_limit": 0.15, "collateral_limit": 0.08, "neither_limit": 0.12},
}
MEASURED: dict[str, Any] = {
    "pairs": {"batch_size": 64, "rephrasings": 3, "fit_examples": 500, "tune_examples": 250}
    | {"test_examples": 500, "behaviour_examples": 300, "at_once": 2048},
    "probes": {"offsets": [0], "pairs": 800},
    "effects": {"pairs": 40, "draws": 1, "doses": [0.0, 0.5, 1.0, 2.0], "ablated": [0.1]}
    | {"methods": "best", "patched": False},
    "detection": {"fitted": True},
    "neutral": {"cuts": 64, "texts": 32, "length": 64, "doses": [0.5, 1.0, 2.0]},
}


def fit_run(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerFast | None,
    task: str | Path | Task,
    out: Path,
    prompting: Prompting,
    options: dict[str, Any],
    **choices: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Run the study of a fit; returns its model and tokenizer.

    Args:
        choices: ``settings`` tried in either direction at most; ``positions``, ``decision`` or ``all``; ``aim``,
            ``conflict`` or ``pairs``; ``threads`` (default: one for each processor); ``progress``, called with (cell,
            stage, done, total, note); and for a model given by name ``dtype``, ``device_map`` and ``layout``.

    Raises:
        InputError, StudyError: see ``mnemoscope.fit``.
    """
    from mnemoscope.study import run_study

    of_study, of_model = ("settings", "positions", "aim", "threads", "progress"), ("dtype", "device_map", "layout")
    for name in choices:
        if name not in (*of_study, *of_model):
            raise InputError(f"{name}: fit has no such argument; it has {', '.join((*of_study, *of_model))}")
    progress: Callable[..., None] = choices.pop("progress", None) or (lambda *_: None)
    shape = {name: value for name in of_model if (value := choices.pop(name, None)) is not None}
    choices["threads"] = choices.get("threads") or os.cpu_count() or 1
    layout = Layout(**shape["layout"]) if "layout" in shape else None
    chat = {"chat": {"system": prompting.system, "reply": prompting.reply}} if prompting.chat else {}
    if isinstance(model, str | Path):
        config = fitting_study({"folder": str(model), **shape, **chat}, task, options, **choices)  # checked first
        model, tokenizer = load_model(model, **shape | {"layout": layout})
    else:
        assert tokenizer is not None
        if layout:
            use_layout(model, layout)
        described = Binding.of(model, tokenizer).weights
        config = fitting_study({"opened": described, **shape, **chat}, task, options, **choices)
    opened = Opened(model, tokenizer, task if isinstance(task, Task) else None)
    with _left_as_it_was(model):
        run_study(config, out, progress, workers=1, opened=opened)
    return model, tokenizer


@contextmanager
def _left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode inside the context; restore the modes of the model and the settings of the process."""
    import torch
    from threadpoolctl import threadpool_limits

    training = {name: module.training for name, module in model.named_modules()}
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    model.eval()
    try:
        with threadpool_limits(os.cpu_count() or 1):  # of numpy, whatever a study sets meanwhile
            yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learning[name])
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def fitting_study(
    model: dict[str, Any],
    task: str | Path | Task,
    options: dict[str, Any],
    settings: int = SETTINGS,
    threads: int = 1,
    positions: str = "decision",
    aim: str = "conflict",
) -> StudyConfig:
    """The study of a fit, with one cell.

    Args:
        model: fields of ``ModelConfig``.
        task: a task's name, ``package.module:Class``, the path of a JSONL file, or a task; ``options``: of the task.
        settings: the budget: settings tried at most in either direction, in evenly spread layers.
        positions: ``decision``, or ``all`` tokens, for vectors to export.
        aim: what vectors are chosen for: ``conflict`` as drawn, which is what a user meets, or ``pairs``.

    Raises:
        InputError: the file does not exist, the budget is below one layer's, or a field is not allowed.
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
    layers = {"layers": [f"spread-{settings // ONE_LAYER}"]}
    methods = METHODS if positions == "all" else METHODS + NOT_EXPORTED
    tried = {"methods": methods, "grids": {site: layers | grid for site, grid in TRIED.items()}, "aim": aim}
    cell = MEASURED | {
        "task": "jsonl" if is_file else name,
        "options": {"file": str(Path(name).resolve()), **options} if is_file else options,
        "model": model,
        "steering": STEERING | tried | {"positions": positions},
    }
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).stem if is_file else name.rpartition(":")[2]).lstrip("_.-")[
        :100
    ]
    return parse_study({"study": "fit", "threads": threads, "cells": {label or "mine": cell}})
