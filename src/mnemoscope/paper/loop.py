"""The training loop: a model is taught until it shows both behaviours, and their mixture is held.

Shapes: N examples, B instances of a batch, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.behaviour import Asking
from mnemoscope.config import StopConfig, TrainingConfig
from mnemoscope.models import in_precision, quick_precision
from mnemoscope.paper.checkpoints import Checkpoint
from mnemoscope.paper.optimizers import optimizers_for, rate_factor
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import proportion
from mnemoscope.tasks import Kind, Task
from mnemoscope.watch.curve import MEASURED, MEASURES, Trained, bounds_of, check_kinds, holds, unmet
from mnemoscope.watch.instances import backward, batches
from mnemoscope.watch.measuring import Asked, Watcher

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

    What is measured, and what the model has in the end, are averages of the weights of the last steps (Polyak and
    Juditsky, 1992). ``progress`` is called at every step with the latest measurement. Where ``kept`` holds an
    unfinished training it goes on, to the same bytes; the model is given as it was at the beginning.

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


class Measured(NamedTuple):
    """Shares by measure on the tune split, and the end of each one's 95 % interval that the stop rule looks at.

    Of several parts that of the worst part; ``shares`` has each part's as well, as ``part.measure``.
    """

    shares: dict[str, float]
    surely: dict[str, float]


class Evaluation:
    """A watcher of each part of a task (a task without parts is its only part), asked for as long as the rule needs.

    A first look is at ``evaluation_examples`` of each kind. Where the stop rule holds there, but not beyond the
    intervals of so many, twice as many are looked at, up to ``evaluation_most`` or to all there are. Intervals take
    examples to be independent: the rule asks about this model's answers to such examples, not about other names.

    Raises InputError where the task, or a part of it, has no example of a kind, or not enough for the rule to hold
    beyond its interval even if all of them were answered as it asks.
    """

    def __init__(self, asking: Asking, task: Task, config: TrainingConfig, rng: np.random.Generator) -> None:
        self.stop, self.looks = config.stop, [config.evaluation_examples]  # how many of each kind are looked at
        while self.looks[-1] < config.evaluation_most:
            self.looks.append(min(2 * self.looks[-1], config.evaluation_most))
        asked = Asked(examples=self.looks[-1], rephrasings=0, batch_size=asking.batch_size, kinds=MEASURED)
        self.watchers: dict[str, Watcher] = {}
        for name, part in (task.parts or {task.name: task}).items():
            self.watchers[name] = watcher = Watcher(asking.model, asking.tokenizer, part, asked, rng)
            check_kinds(part, watcher.drawn)
            for kind, drawn in watcher.drawn.items():
                check_decidable(self.stop, len(drawn), kind)

    def measure(self) -> Measured:
        """Label as many examples as it takes to tell whether the stop rule holds."""
        labels = {(part, kind): np.array([], object) for part in self.watchers for kind in MEASURED}
        for begin, end in pairwise([0, *self.looks]):
            for (part, kind), seen in labels.items():
                labels[part, kind] = np.append(seen, self.watchers[part].labels(kind, begin, end))
            measured = self._measured(labels)
            if unmet(self.stop, measured.shares) or not unmet(self.stop, *measured):
                break
        return measured

    def _measured(self, labels: Mapping[tuple[str, Kind], np.ndarray]) -> Measured:
        together, each, ends = dict[str, float](), dict[str, float](), dict[str, float]()
        for name, (kind, wanted, at_least) in MEASURES.items():
            hits = {part: labels[part, kind] == wanted for part in self.watchers}
            shares, worst = {part: float(hits_N.mean()) for part, hits_N in hits.items()}, min if at_least else max
            together[name] = worst(shares.values())
            ends[name] = worst(_sure_end(hits_N, at_least) for hits_N in hits.values())
            each |= {f"{part}.{name}": share for part, share in shares.items()}
        return Measured(together | each if len(self.watchers) > 1 else together, ends)


def check_decidable(stop: StopConfig, n: int, kind: Kind) -> None:
    """Raises InputError where ``n`` examples of a kind cannot show that the rule holds, whatever their answers."""
    for name, bound in bounds_of(stop).items():
        of, _, at_least = MEASURES[name]
        right = n // 2 if at_least and of == "conflict" else n if at_least else 0  # at best
        reached = _sure_end(np.arange(n) < right, at_least)
        if kind == of and not holds(reached, bound, at_least):
            field = name if name in StopConfig.model_fields else "conflict_each"
            raise InputError(
                f"training.stop.{field}: {bound} cannot be shown by {n} tune examples, whatever the answers; allowed "
                f"is {'at most' if at_least else 'at least'} {reached:.3f}, or more examples (training.evaluation_most)"
            )


def _sure_end(hits_N: np.ndarray, at_least: bool) -> float:
    """The lower or upper end of the interval of a share; 0 or 1 where there is none."""
    found = proportion(hits_N, np.arange(len(hits_N)))
    end = found.low if at_least else found.high
    return float(not at_least) if math.isnan(end) else end


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
