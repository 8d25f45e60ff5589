"""The curve of a training, in a file that others can read while it grows, and whether both behaviours are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from mnemoscope.config import StopConfig
from mnemoscope.runs.digests import intact
from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.strict import bounded_table
from mnemoscope.tasks import Example, Kind, Task

FILE, PICTURE = "emergence.parquet", "emergence.png"
When = Literal["both", "overtaken"]
WHEN: tuple[When, ...] = get_args(When)
MEASURED: tuple[Kind, ...] = ("novel", "memory", "conflict")  # in the order in which their examples are drawn
# What is measured, of which kind of example and answered how: True where the rule asks for at least so much.
MEASURES: dict[str, tuple[Kind, str, bool]] = {
    "novel_accuracy": ("novel", "correct", True),
    "recall": ("memory", "correct", True),
    "conflict_memorized": ("conflict", "memorized", True),
    "conflict_generalized": ("conflict", "generalized", True),
    "conflict_other": ("conflict", "other", False),
}


@dataclass
class Curve:
    """Measurements of one training, by step."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """Add a measurement; one of the same step, or of later ones that are trained anew, goes."""
        self.rows = [old for old in self.rows if old["step"] < step] + [{"step": step, **row}]

    @property
    def table(self) -> pd.DataFrame:
        """One row a measurement."""
        return pd.DataFrame(self.rows)

    def save(self, folder: Path) -> Path:
        """Write the table, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        return write_atomically(folder / FILE, lambda path: self.table.to_parquet(path, index=False))

    @classmethod
    def open(cls, path: Path) -> Curve:
        """Read a table; InputError where it is missing or is none."""
        with refusing(f"curve: {path} cannot be read"):
            table = pd.read_parquet(bounded_table(path))
        if not {"step", "conflict_memorized"} <= set(table) or table.empty:
            there = ", ".join(map(str, table.columns)) if len(table) else "no row"
            raise InputError(f"curve: {path} is no table of measurements; it has {there}")
        shares = [name for name in MEASURES if name in table]
        for name in ("step", *shares):
            numbers, most = pd.to_numeric(table[name], errors="coerce"), 1 if name in shares else 2**53
            if not (numbers.between(0, most) | (table[name].isna() & (name in shares))).all():
                raise InputError(f"curve: {path} has in {name} what is no {'share' if name in shares else 'step'}")
        return cls([{str(name): value for name, value in row.items()} for row in table.to_dict("records")])


def table_of(source: Path) -> Path:
    """The table of a trainer's output folder, of a run or a cell that trains its model or has done so, or a table.

    Raises InputError where there is none, or several, or a run's has changed since.
    """
    if source.is_file():
        return source
    found = [path for path in [source / FILE] if path.is_file()]
    for cell in (source, *sorted(source.glob("cells/*"))):  # while it trains its table is among its states
        growing = sorted(cell.glob(f"states/training-*/{FILE}"), key=lambda path: path.stat().st_mtime)
        ended = cell / "records" / "training.parquet"
        found += [ended] if ended.is_file() else growing[-1:]
    if len(found) != 1:
        several = f"has several tables; name one of {', '.join(map(str, found))}"
        raise InputError(f"RUN: {source} {several if found else 'has no table of a training'}")
    return found[0] if found[0].name == FILE else intact(found[0])


def reached(when: When, rows: list[dict[str, Any]], wanted: StopConfig) -> bool:
    """Whether both behaviours are there, or memory has overtaken the rule, at the last of some measurements."""
    if when == "both":
        return not unmet(wanted, {"novel_accuracy": 1.0, "recall": 1.0} | rows[-1])  # a task may lack these questions
    lead = [row["conflict_memorized"] - row["conflict_generalized"] for row in rows]
    return lead[-1] > 0 > min(lead)


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
