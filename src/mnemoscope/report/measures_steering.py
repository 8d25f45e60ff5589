"""Does the turning work, beside which control, at what cost: one cell's steered test examples.

Each method has two settings, chosen on the tune split: one for pairs, and one, with the same share of neurons, for
conflicts as they are drawn: pairs are among them, but most lie further from the tipping point. ``pairs`` and its
controls are judged under the first, ``conflict`` and its own under the second.

Shapes: N rows of a table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.errors import InputError
from mnemoscope.report.intervals import Tree
from mnemoscope.report.measures_detector import measure_gated, recall_by_family
from mnemoscope.report.records import AIMS, CONTROLS, DIRECTIONS, Cell
from mnemoscope.report.resampling import shared_mean
from mnemoscope.statistics import Estimate

KEYS = ["aim", "direction", "method", "role", "examples"]
# What steering should leave alone, and what is right there; conflict_rest has the target's behaviour already.
KEPT = {"memory": "correct", "novel": "correct", "conflict_rest": ""}


class Steered:
    """The steering table of a cell, cut once into the parts that numbers are computed from."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._table = cell.read_steering()
        self._places = self._table.groupby(KEYS, observed=True).indices
        self.lists = sorted(self._table.examples.unique())
        self.held_out = sorted(n for n in self.lists if n.startswith("pairs_") and n != "pairs_unreachable")

    def rows(self, aim: str, direction: str, method: str, role: str, examples: str) -> pd.DataFrame:
        """Test examples of one list under one setting and role; no rows where there are none."""
        return self._table.iloc[self._places.get((aim, direction, method, role, examples), [])]


def measure_steering(cell: Cell) -> Tree:
    """Every method in every direction, the best one of each by the tune split, and what a uniform push would do."""
    steered = Steered(cell)
    chosen = {aim: cell.chosen[aim]["methods"] for aim in AIMS}
    by_method = {
        method: {
            direction: measure_direction(steered, method, direction, {aim: chosen[aim][method] for aim in AIMS})
            for direction in DIRECTIONS
            if direction in chosen["pairs"][method]
        }
        for method in sorted(chosen["pairs"])
    }
    best = {aim: cell.chosen[aim]["best"] for aim in AIMS}
    return {
        "steering": {
            direction: {
                **by_method[best["pairs"][direction]][direction],
                "best_conflict": by_method[best["conflict"][direction]][direction],
            }
            for direction in DIRECTIONS
        },
        "steering_by_method": by_method,
        "logit": {direction: _logit(steered, best["pairs"][direction], direction) for direction in DIRECTIONS},
    }


def measure_direction(steered: Steered, method: str, direction: str, chosen: dict[str, Tree]) -> Tree:
    """One method in one direction: shifts, controls, what is left of them, and collateral.

    Args:
        chosen: the method's settings by aim and direction.
    """
    cell = steered.cell

    def vector(aim: str, examples: str) -> pd.DataFrame:
        return steered.rows(aim, direction, method, "vector", examples)

    pairs, conflict = (shares(vector(aim, aim), direction, cell) for aim in AIMS)
    controls = {name: {aim: steered.rows(aim, direction, method, name, aim) for aim in AIMS} for name in CONTROLS}
    return {
        "chosen": chosen["pairs"][direction],
        "chosen_conflict": chosen["conflict"][direction],
        "pairs": pairs,
        "conflict": conflict,
        "confabulated": pairs["confabulated"],
        "pairs_unreachable": shares(vector("pairs", "pairs_unreachable"), direction, cell),
        "held_out": {
            name.removeprefix("pairs_"): shares(vector("pairs", name), direction, cell) for name in steered.held_out
        },
        "conflict_at_chosen": shares(vector("pairs", "conflict"), direction, cell),
        "controls": {name: _control(parts, direction, cell) for name, parts in controls.items()},
        "minus_control": {
            name: {aim: _difference(cell, vector(aim, aim), part, direction) for aim, part in parts.items()}
            for name, parts in controls.items()
        },
        "collateral": _collateral(cell, direction, {name: vector("pairs", name) for name in KEPT}),
        "collateral_conflict": _collateral(cell, direction, {name: vector("conflict", name) for name in KEPT}),
        **recall_by_family(cell, vector("pairs", "memory")),
        **measure_gated(cell, direction, {name: vector("pairs", name) for name in steered.lists}),
    }


def shares(rows: pd.DataFrame, direction: str, cell: Cell) -> Tree:
    """Of steered examples: how many answer with the target behaviour, keep the source's, or do neither."""
    target, source = DIRECTIONS[direction]
    wanted = {"shift": target, "stay": source, "other": "other"}
    found: Tree = {key: shared_mean(rows.after == after, rows.group, cell.name) for key, after in wanted.items()}
    if "confabulated" in rows:
        found["confabulated"] = shared_mean(rows.confabulated, rows.group, cell.name)
    return found


def _control(parts: dict[str, pd.DataFrame], direction: str, cell: Cell) -> Tree:
    """All draws of a control pooled, and beside it the draw that shifts most."""
    bare = {aim: part.drop(columns="confabulated") for aim, part in parts.items()}
    tree: Tree = {aim: shares(part, direction, cell) for aim, part in bare.items()}
    tree["draws"] = {aim: int(part.draw.nunique()) for aim, part in bare.items()}
    tree["worst"] = {aim: shares(_worst_draw(part, direction), direction, cell) for aim, part in bare.items()}
    return tree


def _worst_draw(rows: pd.DataFrame, direction: str) -> pd.DataFrame:
    shift = (rows.after == DIRECTIONS[direction][0]).groupby(rows.draw).mean()
    return rows[rows.draw == shift.idxmax()] if len(shift) else rows


def _difference(cell: Cell, vector: pd.DataFrame, control: pd.DataFrame, direction: str) -> Estimate:
    """Shift under the vector minus the mean shift under a control's draws, example by example."""
    target = DIRECTIONS[direction][0]
    if vector.empty or control.empty:
        return Estimate.undefined()
    if set(vector.example) != set(control.example):
        raise InputError(
            f"{cell.folder / 'records' / 'steering.parquet'}: {direction}, {vector.examples.iloc[0]}: the vector and "
            f"the control {control.role.iloc[0]!r} were not tried on the same examples"
        )
    control_mean = (control.after == target).groupby(control.example).mean()
    difference = (vector.after == target).astype(np.float64) - control_mean.loc[vector.example].to_numpy()
    return shared_mean(difference, vector.group, cell.name, signed=True)


def _collateral(cell: Cell, direction: str, lists: dict[str, pd.DataFrame]) -> Tree:
    """Changes, after minus before, in what steering should leave alone; negative is damage."""
    changes: Tree = {}
    for name, rows in lists.items():
        right = KEPT[name] or DIRECTIONS[direction][0]
        change = (rows.after == right).astype(np.float64) - (rows.before == right).astype(np.float64)
        changes[name] = shared_mean(change, rows.group, cell.name, signed=True)
    if cell.info["memory_is_conflict"] and direction == "to_generalized":
        # The memory examples are the conflicts themselves: turning them is the aim, not the damage.
        changes["memory"] = Estimate.undefined()
    return changes


def _logit(steered: Steered, method: str, direction: str) -> Tree:
    """What the vector's mean effect on the margin would turn if every pair got exactly that push, whatever it asks.

    A shift that moves all margins alike is no more than a bias on the two answers.
    """
    cell, sign = steered.cell, 1 if direction == "to_generalized" else -1
    rows = steered.rows("pairs", direction, method, "vector", "pairs")
    effect = rows.margin - rows.margin_before
    pushed = _crossed(sign * (rows.margin_before + effect.mean()))
    turned = _crossed(sign * rows.margin)
    return {
        "method": method,
        "push": shared_mean(effect, rows.group, cell.name, signed=True),
        "shift": shared_mean(pushed, rows.group, cell.name),
        "vector": shared_mean(turned, rows.group, cell.name),
        "vector_minus_logit": shared_mean(turned - pushed, rows.group, cell.name, signed=True),
    }


def _crossed(towards_N: Any) -> np.ndarray:
    """1.0 where the target's answer is the likelier one, NaN where that is not known."""
    towards_N = np.asarray(towards_N, dtype=np.float64)
    return np.where(np.isnan(towards_N), np.nan, towards_N > 0)
