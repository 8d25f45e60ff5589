"""The training loop: a model is taught until it shows both behaviours, and their mixture is held.

Shapes: B instances of a batch, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.behaviour import Asking
from mnemoscope.config import TrainingConfig
from mnemoscope.models import in_precision, quick_precision
from mnemoscope.paper.checkpoints import Checkpoint
from mnemoscope.paper.optimizers import optimizers_for, rate_factor
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Task
from mnemoscope.watch.instances import backward, batches
from mnemoscope.watch.rule import Evaluation, Measured, Trained, unmet

HOPELESS = 0.7  # novel accuracy at `give_up_at` steps below which no rule will be learned
LEAST_SHARE, MOST_SHARE = 0.02, 0.98  # between which a dial is moved


def train(
    asking: Asking,
    task: Task,
    config: TrainingConfig,
    rng: np.random.Generator,
    progress: Callable[[int, dict[str, float]], None] = lambda step, measured: None,
    kept: Checkpoint | None = None,
) -> Trained:
    """Train a model in place until the stop rule holds beyond its intervals, or all steps are taken.

    Weights are averaged over the last steps, exponentially (Polyak and Juditsky, 1992): what is measured, and what the
    model has in the end, are these averages, which hold a mixture that single steps pass by. ``progress`` is called at
    every step with the latest measurement. Where ``kept`` holds an unfinished training it goes on, to the same bytes;
    the model is given as it was at the beginning.

    Raises InputError where the task lacks a kind of example that the stop rule needs or has too few of it, or the dial
    of ``hold``, an instance is too long, or the tokenizer merges its answer with its prompt.
    """
    started = time.perf_counter()
    evaluation = Evaluation(asking, task, config, rng)
    state, measured = _State(asking.model, config, *dial_of(task, config)), dict[str, float]()
    before = state.restore(kept) if kept else 0.0
    for ids_BT, weights_BT in batches(asking, task, config, rng, state.steps, state.dial_at):
        state.step(ids_BT, weights_BT)
        if state.steps % config.evaluate_every == 0 or state.steps in (config.steps, config.give_up_at):
            with state.averaged():
                measured = state.note(evaluation.measure())
            if kept and not state.is_last():
                state.keep(kept, before + time.perf_counter() - started)
        progress(state.steps, measured)
        if state.is_last():
            break
    state.finish()
    state.curve[-1]["kept"] = True
    return Trained(state.curve, state.steps, before + time.perf_counter() - started, state.missed, state.precision)


def dial_of(task: Task, config: TrainingConfig) -> tuple[float | None, int]:
    """First value of the option that holds the mixture, and which way it teaches memory; InputError without such."""
    if config.hold is None:
        return None, 1
    if config.hold.dial not in task.dials:
        allowed = ", ".join(task.dials) or "none, so leave training.hold out"
        raise InputError(f"training.hold.dial: {config.hold.dial!r}; task {task.name!r} has {allowed}")
    return float(getattr(task, config.hold.dial)), task.dials[config.hold.dial]


class _State:
    """State of a training run: optimizers, averaged weights, and the curve with what its last row misses.

    ``dial``: first value of the option that holds the mixture of behaviours; None where nothing holds it. ``way``: 1
    where a larger one teaches memory, else -1.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, dial: float | None = None, way: int = 1) -> None:
        self.model, self.config, self.dial, self.way = model, config, dial, way
        self.precision = quick_precision(model) if config.precision == "auto" else config.precision
        self.optimizers = optimizers_for(model, config)
        self.steps = 0
        self.curve: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self._losses: list[float] = []
        self._averages = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        rate = partial(rate_factor, config=config)
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in self.optimizers]

    def step(self, ids_BT: Tensor, weights_BT: Tensor) -> None:
        """One optimizer step."""
        self.model.train()
        with in_precision(self.model, self.precision):
            self._losses.append(backward(self.model, ids_BT, weights_BT))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        for name, weight in self.model.named_parameters():
            self._averages[name].lerp_(weight.detach(), 1 / min(self.steps, self.config.averaged))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the context the model has the averaged weights, and does not train."""
        latest = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.finish()
        yield
        self.model.load_state_dict(latest, strict=False)  # tied weights are in it once

    def finish(self) -> None:
        """Give the model the averaged weights."""
        self.model.load_state_dict(self._averages, strict=False)
        self.model.eval()

    def is_last(self) -> bool:
        """Whether the training ends with the last measurement: the rule holds, no step is left, or no hope."""
        if not self.curve or self.curve[-1]["step"] < self.steps:
            return False
        # Where every part memorized before it generalized, no loss is left to learn the rule from.
        novel = max(value for name, value in self.curve[-1].items() if name.endswith("novel_accuracy"))
        hopeless = self.config.give_up_at is not None and self.steps >= self.config.give_up_at and novel < HOPELESS
        return not self.missed or self.steps >= self.config.steps or hopeless

    def note(self, measured: Measured) -> dict[str, float]:
        """Add a row to the curve, and move the dial; returns the shares."""
        self.missed = unmet(self.config.stop, *measured)
        row = {"step": self.steps, "loss": float(np.mean(self._losses)), **measured.shares}
        self.curve.append(row | {"met": not self.missed, "kept": False})
        if self.dial is not None:
            self.curve[-1]["dial"] = self._moved(self.dial)
        self._losses.clear()
        return measured.shares

    def dial_at(self, step: int) -> float | None:
        """Value of the dial for instances that are drawn behind so many steps."""
        return next((row["dial"] for row in reversed(self.curve) if row["step"] <= step), self.dial)

    def _moved(self, first: float) -> float:
        """The dial after the last measurement, against what is ahead; log odds keep it between 0 and 1."""
        hold, now, total, learned = self.config.hold, 0.0, 0.0, False
        assert hold is not None, "there is a dial"
        for row in self.curve:
            memorized, generalized = row["conflict_memorized"], row["conflict_generalized"]
            answered = memorized + generalized
            # What is lost again is for the dial to bring back.
            learned = learned or row["novel_accuracy"] >= hold.learned
            now = memorized / answered - hold.target if answered and learned else 0.0
            total += now
        held = float(np.clip(first, LEAST_SHARE, MOST_SHARE))
        odds = math.log(held / (1 - held)) - self.way * (hold.proportional * now + hold.integral * total)
        return float(np.clip(1 / (1 + math.exp(-odds)), LEAST_SHARE, MOST_SHARE))

    def keep(self, kept: Checkpoint, seconds: float) -> None:
        """Save all that a killed training needs to go on after a measurement."""
        tensors = {f"model/{name}": weight.detach() for name, weight in self.model.named_parameters()}
        tensors |= {f"average/{name}": weight for name, weight in self._averages.items()}
        facts = {"steps": self.steps, "curve": self.curve, "missed": self.missed, "seconds": seconds}
        kept.save(tensors, self.optimizers, facts)

    def restore(self, kept: Checkpoint) -> float:
        """Go on from a saved state, if there is one; returns the seconds that it took."""
        found = kept.load(self.optimizers)
        if found is None:
            return 0.0
        tensors, facts = found
        for name, weight in self.model.named_parameters():
            weight.data.copy_(tensors[f"model/{name}"])
            self._averages[name].copy_(tensors[f"average/{name}"])
        self.steps, self.curve, self.missed = facts["steps"], facts["curve"], facts["missed"]
        for optimizer, schedule in zip(self.optimizers, self._schedules, strict=True):
            schedule.last_epoch = self.steps
            for group, first in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = first * rate_factor(self.steps, self.config)
        return float(facts["seconds"])
