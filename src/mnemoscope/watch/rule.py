"""When a training has arrived: both behaviours are there on the tune split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mnemoscope.config import StopConfig
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example, Kind, Task

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
        if not holds(reached, bound, at_least):
            # In a task of several parts, the measure is that of the worst part.
            parts = [key.removesuffix(f".{name}") for key in measured if key.endswith(f".{name}")]
            place = next((f" in {part}" for part in parts if measured[f"{part}.{name}"] == value), "")
            sure = "" if surely is None else f", surely {reached:.3f}"
            missed.append(f"{name} {value:.3f}{sure}{place} (wanted {'>=' if at_least else '<='} {bound})")
    return missed


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of training."""

    curve: list[dict[str, Any]]  # a measurement each, with the columns of ``records/training.parquet``
    steps: int  # optimizer steps taken
    seconds: float  # wall time
    unmet: list[str]  # conditions of the stop rule that are not met
    precision: str  # of forward and backward passes


def check_kinds(task: Task, drawn: Mapping[Kind, list[Example]]) -> None:
    """Raises InputError where nothing was drawn of a kind that the stop rule asks for."""
    for kind in MEASURED:
        if not drawn[kind]:
            raise InputError(f"task: {task.name} has no {kind} example in the tune split; the stop rule needs some")


def holds(reached: float, bound: float, at_least: bool) -> bool:
    """Whether a measure keeps its bound, a lower one or an upper one."""
    return reached >= bound if at_least else reached <= bound


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
