"""When a training has arrived: both behaviours on the tune split, beyond the intervals of what was looked at.

Shapes: N examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mnemoscope.behaviour import Asking, Batch, prepare, score
from mnemoscope.config import StopConfig, TrainingConfig
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import proportion
from mnemoscope.tasks import Example, Kind, Task, draw

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
    each = {"conflict_memorized": stop.conflict_each, "conflict_generalized": stop.conflict_each}
    return {name: each[name] if name in each else getattr(stop, name) for name in MEASURES}


def unmet(stop: StopConfig, measured: Mapping[str, float], surely: Mapping[str, float] | None = None) -> list[str]:
    """Unmet conditions of the stop rule, as text; empty where the rule holds.

    ``surely``: the end of each measure's interval that the rule looks at; without it the measures themselves count.
    """
    missed = []
    for name, bound in bounds_of(stop).items():
        at_least, value = MEASURES[name][2], measured[name]
        reached = value if surely is None else surely[name]
        if not (reached >= bound if at_least else reached <= bound):
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
    """Tune examples of each kind, for each part of a task (a task without parts is its only part), and their labels.

    A first look is at ``evaluation_examples`` of each kind. Where the stop rule holds there, but not beyond the
    intervals of so many, twice as many are looked at, and so on up to ``evaluation_most`` or to all there are. Examples
    are taken to be independent: the rule asks about this model's answers to such examples, not about other names.

    Raises InputError where the task, or a part of it, has no example of a kind, or not enough for the rule to hold
    beyond its interval even if all of them were answered as it asks.
    """

    def __init__(self, asking: Asking, task: Task, config: TrainingConfig, rng: np.random.Generator) -> None:
        self.stop, first, most = config.stop, config.evaluation_examples, config.evaluation_most
        self.askings: dict[str, Asking] = {}
        self._examples: dict[tuple[str, Kind], list[Example]] = {}
        self._batches: dict[tuple[str, Kind, int], list[Batch]] = {}
        self._looks = [first]  # examples of each kind that are looked at
        while self._looks[-1] < most:
            self._looks.append(min(2 * self._looks[-1], most))
        for name, part in (task.parts or {task.name: task}).items():
            self.askings[name] = replace(asking, boundary=part.boundary)
            for kind in MEASURED:
                self._examples[name, kind] = drawn = tune_examples(part, rng, self._looks[-1], kind)
                if why := undecidable(self.stop, len(drawn), kind):
                    raise InputError(why)

    def measure(self) -> Measured:
        """Label as many examples as it takes to tell whether the stop rule holds."""
        labels: dict[tuple[str, Kind], np.ndarray] = {key: np.array([], object) for key in self._examples}
        for look in range(len(self._looks)):
            labels = {key: np.append(seen, self._labels(*key, look)) for key, seen in labels.items()}
            measured = self._measured(labels)
            if unmet(self.stop, measured.shares) or not unmet(self.stop, *measured):
                break
        return measured

    def _labels(self, part: str, kind: Kind, look: int) -> np.ndarray:
        """Labels of the examples that a look adds to the ones before."""
        asking, begin = self.askings[part], self._looks[look - 1] if look else 0
        if (part, kind, look) not in self._batches:
            added = self._examples[part, kind][begin : self._looks[look]]
            self._batches[part, kind, look] = prepare(asking, added)
        return score(asking, self._batches[part, kind, look], margins=False).behaviour_N

    def _measured(self, labels: Mapping[tuple[str, Kind], np.ndarray]) -> Measured:
        shares: dict[str, dict[str, float]] = {}
        surely: dict[str, list[float]] = {name: [] for name in MEASURES}
        for part in self.askings:
            for name, (kind, wanted, at_least) in MEASURES.items():
                hits_N = labels[part, kind] == wanted
                shares.setdefault(part, {})[name] = float(hits_N.mean())
                surely[name].append(_sure_end(hits_N, at_least))
        worst = {name: min if at_least else max for name, (_, _, at_least) in MEASURES.items()}
        each = {f"{part}.{name}": value for part, by_name in shares.items() for name, value in by_name.items()}
        together = {name: pick(by_name[name] for by_name in shares.values()) for name, pick in worst.items()}
        ends = {name: pick(surely[name]) for name, pick in worst.items()}
        return Measured(together if len(shares) == 1 else together | each, ends)


def tune_examples(task: Task, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
    """``n`` tune examples of a kind, fewer where there are no more; InputError where there is none."""
    drawn = draw(task, rng, n, kind, "tune")
    if not drawn:
        raise InputError(f"task: {task.name} has no {kind} example in the tune split; the stop rule needs some")
    return drawn


def undecidable(stop: StopConfig, n: int, kind: Kind) -> str:
    """Why ``n`` examples of a kind cannot show that the rule holds, whatever their answers; empty where they can."""
    for name, bound in bounds_of(stop).items():
        of, _, at_least = MEASURES[name]
        right = n // 2 if at_least and of == "conflict" else n if at_least else 0  # at best
        reached = _sure_end(np.arange(n) < right, at_least)
        if kind == of and not (reached >= bound if at_least else reached <= bound):
            field = name if name in StopConfig.model_fields else "conflict_each"
            return (
                f"training.stop.{field}: {bound} cannot be shown by {n} tune examples, whatever the answers; allowed "
                f"is {'at most' if at_least else 'at least'} {reached:.3f}, or more examples (training.evaluation_most)"
            )
    return ""


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
