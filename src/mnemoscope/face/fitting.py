"""Running the study of a fit: pairs, vectors with their controls, and a detector for one model and data, in a time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemoscope.behaviour import Asking, Prompting, draw_candidates, prepare, score
from mnemoscope.config import LayoutConfig, StudyConfig, dump_study
from mnemoscope.face.recipe import LEVELS, MEASURED, Level, fitting_study
from mnemoscope.interventions import Binding
from mnemoscope.models import load_model, models_that_fit, use_layout
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import read_text
from mnemoscope.runs.telling import Progress, shown
from mnemoscope.runs.waiting import warn_of_waiting
from mnemoscope.study.cells import Opened
from mnemoscope.tasks import SPLITS, Example, Task, build_task, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Of the time of a fit, by stage: means of one run each on two models (docs/LOG.md).
SHARES = {"train": 0.02, "behaviour": 0.025, "pairs": 0.1, "probes": 0.025, "steering": 0.66, "effects": 0.095}
SHARES |= {"detection": 0.025, "neutral": 0.05, "cards": 0.0}
TIMED = 128  # prompts that are read to see how fast a model is
REPORTING = 10.0  # seconds of the start and the report


def full_draw(task: Task, seed: int = 0) -> list[Example]:
    """The distinct conflicts that a fit reads: as many as it draws of each split, with their rephrasings."""
    found = dict[str, Example]()
    for split in SPLITS:
        rng = np.random.default_rng([seed, len(split)])
        drawn = draw(task, rng, MEASURED["pairs"][f"{split}_examples"], "conflict", split)
        found |= {example.prompt: example for example in drawn}
        both = draw_candidates(task, drawn, rng, MEASURED["pairs"]["rephrasings"])
        found |= {other.prompt: other for _, other in both}
    return list(found.values())


def seconds_of(each: float, tokens: float, level: Level = LEVELS[0]) -> float:
    """How long a fit takes that reads so many ``tokens``, where a pass takes ``each`` second for one of them."""
    return each * (level.passes * tokens + level.tokens) + REPORTING


def tokens_in(asking: Asking, examples: Sequence[Example]) -> int:
    """Tokens of prompts."""
    return sum(map(len, asking.tokens([asking.text(example.prompt) for example in examples]))) if examples else 0


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
        choices: ``budget``, minutes that it may take, default: as many as it needs; ``settings`` tried in either
            direction at most; ``positions``, ``decision`` or ``all``; ``aim``,
            ``conflict`` or ``pairs``; ``lost`` and ``neither``, shares of other answers and of steered prompts that a
            vector may cost on tune; ``threads`` (default: one for each processor); ``progress``, True to show how far
            it is, or what is called with (cell, stage, done, total, note); and for a model and a task given by name
            ``dtype``, ``device_map`` and ``layout``, and ``workers``: processes with so many threads and a copy of the
            model each, where memory has room for them (default: 1, which has all threads; a script that asks for more
            must be one that ``multiprocessing`` can import).

    Raises:
        InputError, StudyError: see ``mnemoscope.fit``.
    """
    import torch

    from mnemoscope.study.run import run_study

    of_study = ("settings", "positions", "aim", "lost", "neither", "threads", "workers", "progress", "budget")
    of_model, began = ("dtype", "device_map", "layout"), time.monotonic()
    for name in choices:
        if name not in (*of_study, *of_model):
            raise InputError(f"{name}: fit has no such argument; it has {', '.join((*of_study, *of_model))}")
    progress: Progress | bool | None = choices.pop("progress", None)
    budget, workers = choices.pop("budget", None), choices.pop("workers", 1)
    if budget is not None and not 0 < budget < math.inf:
        raise InputError(f"budget: {budget!r}; allowed is a number of minutes above 0")
    if workers != 1 and not (isinstance(model, str | Path) and isinstance(task, str | Path) and workers > 1):
        raise InputError(f"workers: {workers!r}; allowed is 1, or more where model and task are given by name")
    shape = {name: value for name in of_model if (value := choices.pop(name, None)) is not None}
    choices["threads"] = choices.get("threads") or os.cpu_count() or 1
    chat = {"chat": {"system": prompting.system, "reply": prompting.reply}} if prompting.chat else {}
    if isinstance(model, str | Path):
        described: dict[str, Any] = {"folder": str(model), **shape, **chat}
        config = fitting_study(described, task, options, **choices)
        _task_of(config, task)  # before a large model is opened for nothing
        given = model
        model, tokenizer = load_model(model, **shape | {"layout": _layout_of(config)})
        if workers > 1 and (shape.get("device_map") or models_that_fit(given, workers) < workers):
            workers, choices["threads"] = 1, workers * choices["threads"]
            config = fitting_study(described, task, options, **choices)
    else:
        assert tokenizer is not None
        described = {"opened": Binding.of(model, tokenizer).weights, **shape, **chat}
        config = fitting_study(described, task, options, **choices)
        if layout := _layout_of(config):
            use_layout(model, layout)
    if model.device.type == "cpu":
        warn_of_waiting(choices["threads"])
    if budget is not None:
        asking = Asking(model, tokenizer, batch_size=MEASURED["pairs"]["batch_size"], prompting=prompting)
        levels = [fitting_study(described, task, options, **choices, level=n) for n in range(len(LEVELS))]
        with _left_as_it_was(model), shown(progress) as tell:
            tell("fit", "budget", 0, 1, "timing the model")
            torch.set_num_threads(workers * choices["threads"])  # as the study will, one way or the other
            config = _within(60 * budget, began, asking, task, options, levels, out)
    opened = Opened(model, tokenizer, task if isinstance(task, Task) else None)
    with _left_as_it_was(model), shown(progress, SHARES) as tell:
        if budget is not None:
            tell("fit", "budget", 1, 1, f"left out to keep to {budget:g} minutes: {config.left_out or 'nothing'}")
        run_study(config, out, tell, workers=workers, opened=opened)
    return model, tokenizer


def _layout_of(config: StudyConfig) -> LayoutConfig | None:
    """Where the model of a fit has its parts, if that was said."""
    return next(iter(config.cells.values())).model.layout


def _within(
    seconds: float,
    began: float,
    asking: Asking,
    task: str | Path | Task,
    options: dict[str, Any],
    levels: Sequence[StudyConfig],
    out: Path,
) -> StudyConfig:
    """The study that leaves out least and ends within ``seconds`` of ``began``, or that which a run folder holds."""
    begun = any(out.glob("cells/*/stages/*.json"))  # else a fit was stopped before it kept anything
    before = read_text(out / "study.yaml", "out") if begun and (out / "study.yaml").is_file() else None
    for config in levels:
        if dump_study(config) == before:
            return config
    made = _task_of(levels[0], task)
    asking, rng = replace(asking, boundary=made.boundary), np.random.default_rng(0)
    facts = made.facts_to_know()
    sample = [facts[i] for i in rng.permutation(len(facts))[:TIMED]] or draw(made, rng, TIMED, "conflict", "fit")
    took, labels = math.inf, np.array([])
    for _ in range(3):  # the first pass of a length takes memory, and longer
        clock = time.monotonic()
        labels = score(asking, prepare(asking, sample, whole=True), margins=False).behaviour_N
        took = min(took, time.monotonic() - clock)
    known = {e.item for e, label in zip(sample, labels, strict=True) if label == "correct"} if facts else set()
    if known:  # of those that were not asked, as many are taken to be known
        unasked = sorted({fact.item for fact in facts} - {fact.item for fact in sample})
        known |= {item for item in unasked if rng.random() < len(known) / len(sample)}
        made = made.knowing(known)
    each, tokens = took / max(1, tokens_in(asking, sample)), tokens_in(asking, full_draw(made))
    left = seconds - (time.monotonic() - began)
    for level, config in zip(LEVELS, levels, strict=True):
        if seconds_of(each, tokens, level) <= left:
            return config
    spent = (time.monotonic() - began) / 60
    least = math.ceil(spent + seconds_of(each, tokens, LEVELS[-1]) / 60)
    raise InputError(
        f"budget: {seconds / 60:g} minutes; the least that can be fitted takes about {least}, the {spent:.1f} included "
        "that went to opening and timing the model"
    )


def _task_of(config: StudyConfig, task: str | Path | Task) -> Task:
    """The task of a fit; InputError where no item of a split has two phrasings, so that it cannot have pairs."""
    (cell,) = config.cells.values()
    made = task if isinstance(task, Task) else build_task(cell.task, cell.options, 0)
    for split in SPLITS:
        drawn = draw(made, np.random.default_rng(0), 200, "conflict", split)
        if drawn and not any(draw_candidates(made, drawn, np.random.default_rng(0), 1)):
            raise InputError(
                f"task: every item of its {split} split has one phrasing; pairs need items with two or more"
            )
    return made


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
