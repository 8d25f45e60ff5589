"""Running the study of a fit: pairs, vectors with their controls, and a detector for one model and data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemoscope.behaviour import Asking, Prompting, draw_candidates
from mnemoscope.config import StudyConfig
from mnemoscope.face.recipe import MEASURED, Choices, fitting_study
from mnemoscope.interventions import Binding
from mnemoscope.models import load_model, models_that_fit, use_layout
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.telling import shown
from mnemoscope.runs.waiting import warn_of_waiting
from mnemoscope.study.cells import Opened
from mnemoscope.tasks import SPLITS, Example, Task, build_task, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Of the time of a fit, by stage: means of one run each on two models (docs/LOG.md).
SHARES = {"train": 0.02, "behaviour": 0.025, "pairs": 0.1, "probes": 0.025, "steering": 0.66, "effects": 0.095}
SHARES |= {"detection": 0.025, "neutral": 0.05, "cards": 0.0}
# A fit takes as long as so many passes over every token of its data and one over so many more tokens, which are learned
# from and judged however few there are; and seconds of the start and the report (docs/LOG.md).
PASSES, LEARNED_FROM, REPORTING = 2.0, 94_800, 10.0


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


def seconds_of(each: float, tokens: float) -> float:
    """Seconds of a fit that reads so many ``tokens``, where a pass takes ``each`` seconds for one of them."""
    return each * (PASSES * tokens + LEARNED_FROM) + REPORTING


def tokens_in(asking: Asking, examples: Sequence[Example]) -> int:
    """The number of tokens of all prompts."""
    return sum(map(len, asking.tokens([asking.text(example.prompt) for example in examples]))) if examples else 0


def fit_run(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerFast | None,
    task: str | Path | Task,
    out: Path,
    prompting: Prompting,
    options: dict[str, Any],
    **chosen: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Run the study of a fit; returns its model and tokenizer.

    Args:
        chosen: fields of ``Choices`` (``threads``: default one for each processor); ``progress``, True to show how far
            it is, or what is called with (cell, stage, done, total, note); ``layout``; for a model given by name
            ``dtype`` and ``device_map``; with a task given by name ``workers``, too: processes with so many threads
            and a copy of the model each, where memory has room for them (default: 1, which has all threads; a script
            that asks for more must be one that ``multiprocessing`` can import).

    Raises:
        InputError, StudyError: see ``mnemoscope.fit``.
    """
    from mnemoscope.study.run import run_study

    of_study, of_model = tuple(Choices.__dataclass_fields__), ("dtype", "device_map", "layout")
    allowed = (*of_study, "workers", "progress", *of_model)
    for name in chosen:
        if name not in allowed:
            raise InputError(f"{name}: fit has no such argument; it has {', '.join(allowed)}")
    workers, is_open = chosen.get("workers", 1), not isinstance(model, str | Path)
    for name in ("dtype", "device_map"):
        if is_open and chosen.get(name) is not None:
            raise InputError(f"{name}: {chosen[name]!r}; not for an open model, which is as it is")
    if workers != 1 and (is_open or isinstance(task, Task) or workers < 1):
        raise InputError(f"workers: {workers!r}; allowed is 1, or more where model and task are given by name")
    choices = Choices(**{name: chosen[name] for name in of_study if name in chosen})
    choices = replace(choices, threads=chosen.get("threads") or os.cpu_count() or 1)
    described: dict[str, Any] = {name: chosen[name] for name in of_model if chosen.get(name) is not None}
    if prompting.chat:
        described["chat"] = {"system": prompting.system, "reply": prompting.reply}
    described |= {"opened": Binding.of(model, tokenizer).weights} if is_open else {"folder": str(model)}
    config = fitting_study(described, task, options, choices)
    layout = next(iter(config.cells.values())).model.layout
    if isinstance(model, str | Path):
        _task_of(config, task)  # before a large model is opened for nothing
        named, shape = model, {name: described[name] for name in of_model if name in described}
        model, tokenizer = load_model(named, **shape | {"layout": layout})
        if workers > 1 and ("device_map" in shape or models_that_fit(named, workers) < workers):
            choices = replace(choices, threads=workers * choices.threads)
            workers, config = 1, fitting_study(described, task, options, choices)
    elif layout:
        use_layout(model, layout)
    assert tokenizer is not None, "an open model has one"
    if model.device.type == "cpu":
        warn_of_waiting(choices.threads)
    opened = Opened(model, tokenizer, task if isinstance(task, Task) else None)
    with _left_as_it_was(model), shown(chosen.get("progress"), SHARES) as tell:
        run_study(config, out, tell, workers=workers, opened=opened)
    return model, tokenizer


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
