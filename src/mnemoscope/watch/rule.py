"""When a training has arrived: both behaviours on the tune split, beyond the intervals of what was looked at.

Shapes: N examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mnemoscope.behaviour import Asking
from mnemoscope.config import StopConfig, TrainingConfig
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import proportion
from mnemoscope.tasks import Example, Kind, Task
from mnemoscope.watch.measuring import Asked, Watcher

MEASURED: tuple[Kind, ...] = ("novel", "memory", "conflict")  # in the order in which their examples are drawn
# What is measured, of which kind of example and answered how: True where the rule asks for at least so much.
MEASURES: dict[str, tuple[Kind, str, bool]] = {
    "novel_accuracy": ("novel", "correct", True),
    "recall": ("memory", "correct", True),
    "conflict_memorized": ("conflict", "memorized", True),
    "conflict_generalized": ("conflict", "generalized", True),
    "conflict_other": ("conflict", "other", False),
}


def bounds_of(stop: StopConfig) -> dict[str, float]:
    """The bound of each measure: the least, of `conflict_other` the most."""
    return {name: getattr(stop, name, stop.conflict_each) for name in MEASURES}


def unmet(stop: StopConfig, measured: Mapping[str, float], surely: Mapping[str, float] | None = None) -> list[str]:
    """Unmet conditions of the stop rule, as text; empty where the rule holds.

    ``surely``: the end of each measure's interval that the rule looks at; without it the measures themselves count.
    """
    missed = []
    for name, bound in bounds_of(stop).items():
        at_least, value = MEASURES[name][2], measured[name]
        reached = value if surely is None else surely[name]
        if not _holds(reached, bound, at_least):
            # In a task of several parts, the measure is that of the worst part.
            parts = [key.removesuffix(f".{name}") for key in measured if key.endswith(f".{name}")]
            place = next((f" in {part}" for part in parts if measured[f"{part}.{name}"] == value), "")
            sure = "" if surely is None else f", surely {reached:.3f}"
            missed.append(f"{name} {value:.3f}{sure}{place} (wanted {'>=' if at_least else '<='} {bound})")
    return missed


class Measured(NamedTuple):
    """What a model shows on the tune split.

    ``shares``: by measure, named as in the emergence curve; of several parts that of the worst part, so that the stop
    rule holds only where it holds in every part, and then each part's as ``part.measure``. ``surely``: of each measure
    the end of its 95 % interval that the rule looks at, the worst part's.
    """

    shares: dict[str, float]
    surely: dict[str, float]


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of training."""

    curve: list[dict[str, Any]]  # a measurement each, with the columns of ``records/training.parquet``
    steps: int  # optimizer steps taken
    seconds: float  # wall time
    unmet: list[str]  # conditions of the stop rule that are not met
    precision: str  # of forward and backward passes


class Evaluation:
    """A watcher of each part of a task (a task without parts is its only part), asked for as long as the rule needs.

    A first look is at ``evaluation_examples`` of each kind. Where the stop rule holds there, but not beyond the
    intervals of so many, twice as many are looked at, and so on up to ``evaluation_most`` or to all there are. Examples
    are taken to be independent: the rule asks about this model's answers to such examples, not about other names.

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


def check_kinds(task: Task, drawn: Mapping[Kind, list[Example]]) -> None:
    """Raises InputError where nothing was drawn of a kind that the stop rule asks for."""
    for kind in MEASURED:
        if not drawn[kind]:
            raise InputError(f"task: {task.name} has no {kind} example in the tune split; the stop rule needs some")


def check_decidable(stop: StopConfig, n: int, kind: Kind) -> None:
    """Raises InputError where ``n`` examples of a kind cannot show that the rule holds, whatever their answers."""
    for name, bound in bounds_of(stop).items():
        of, _, at_least = MEASURES[name]
        right = n // 2 if at_least and of == "conflict" else n if at_least else 0  # at best
        reached = _sure_end(np.arange(n) < right, at_least)
        if kind == of and not _holds(reached, bound, at_least):
            field = name if name in StopConfig.model_fields else "conflict_each"
            raise InputError(
                f"training.stop.{field}: {bound} cannot be shown by {n} tune examples, whatever the answers; allowed "
                f"is {'at most' if at_least else 'at least'} {reached:.3f}, or more examples (training.evaluation_most)"
            )


def _holds(reached: float, bound: float, at_least: bool) -> bool:
    return reached >= bound if at_least else reached <= bound


def _sure_end(hits_N: np.ndarray, at_least: bool) -> float:
    """The lower or upper end of the interval of a share; 0 or 1 where there is none."""
    found = proportion(hits_N, np.arange(len(hits_N)))
    end = found.low if at_least else found.high
    return float(not at_least) if math.isnan(end) else end


def how_to_mix(trained: Trained, size: str = "model.layers") -> str:
    """One line with the unmet conditions and the fields to change; ``size`` is the field of capacity."""
    last = trained.curve[-1]
    learned = min(last["novel_accuracy"], last["recall"]) >= 0.9
    advice = [] if learned else ["train longer (training.steps) or with another training.learning_rate"]
    if last["conflict_generalized"] < last["conflict_memorized"]:
        mend = "memory wins: raise training.weight_decay, lower options.memorized_share, or store more (options)"
    else:
        mend = "the rule wins: raise options.memorized_share, lower training.weight_decay, or store less (options)"
    tries, reasons = "; ".join([*advice, mend, f"or change {size}"]), "; ".join(trained.unmet)
    return f"after {trained.steps} steps the model does not show both behaviours: {reasons}. Try: {tries}"
