"""The curve of a training: a row for each measurement, in a file that others can read while it grows."""

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
from mnemoscope.watch.rule import unmet

FILE, PICTURE = "emergence.parquet", "emergence.png"
SHARES = ("conflict_memorized", "conflict_generalized", "conflict_other", "novel_accuracy", "recall")
When = Literal["both", "overtaken"]
WHEN: tuple[When, ...] = get_args(When)


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
        shares = [name for name in SHARES if name in table]
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
