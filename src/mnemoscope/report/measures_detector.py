"""How good a detector is: its ranking beside what needs no state, its reliability, and what a gate makes of a vector.

Shapes: N rows of a table (test prompts).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.errors import InputError
from mnemoscope.report.intervals import Tree, mean, rng_for
from mnemoscope.report.records import DIRECTIONS, Cell
from mnemoscope.report.resampling import shared_mean
from mnemoscope.statistics import Estimate, auroc

SCORES = ("p_memorized", "input_only", "input_repeats", "entropy", "top_gap")
LEAST = 30  # prompts of each behaviour in a family whose ranking is judged apart
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# What a gated vector should leave alone, and what is right there.
KEPT = {"memory": "correct", "novel": "correct"}


def measure_detector(cell: Cell) -> Tree:
    """Empty where no detector was asked for; the reason where none could be fitted."""
    if cell.detection is None:
        return {"no_detector": cell.no_detector} if cell.no_detector else {}
    table, name = cell.detection, f"{cell.name}/detector"
    known = table[table.followed.isin(("memorized", "generalized"))]
    conflict = known[known.examples == "conflict"]
    others = sorted(set(table.examples) - {"conflict", "memory", "novel"})
    return {
        "detection": {
            "auroc": _rankings(conflict, name),
            "by_family": {
                str(family): {
                    **{b: int((rows.followed == b).sum()) for b in ("memorized", "generalized")},
                    **_rankings(rows, f"{name}/{family}", LEAST),
                }
                for family, rows in conflict.groupby("family")
            },
            "held_out": {other: _rankings(known[known.examples == other], f"{name}/{other}") for other in others},
            "reliability": _reliability(conflict, name),
            "brier": mean((conflict.p_memorized - (conflict.followed == "memorized")) ** 2, conflict.group, name),
            "unlike": {
                str(which): mean(rows.unlike, rows.group, f"{name}/unlike/{which}")
                for which, rows in table.groupby("examples")
            },
            "readable_from": float(conflict.readable_from.median()),
        }
    }


def _rankings(rows: pd.DataFrame, name: str, least: int = 1) -> Tree:
    """Area under the ROC curve of each score for ``memorized``; NaN with fewer than ``least`` of either behaviour."""
    label_N = (rows.followed == "memorized").to_numpy().astype(int)
    if min(label_N.sum(), (1 - label_N).sum()) < least:
        return {score: Estimate.undefined(len(rows)) for score in SCORES}
    groups_N = rows.group.to_numpy(dtype=str)
    return {s: auroc(rows[s].to_numpy(), label_N, groups_N, rng_for(f"{name}/auroc/{s}")) for s in SCORES}


def _reliability(rows: pd.DataFrame, name: str) -> list[Tree]:
    """By probability that was said: how many remembered."""
    place_N = np.clip(np.digitize(rows.p_memorized, BINS) - 1, 0, len(BINS) - 2)
    bins = []
    for number in range(len(BINS) - 1):
        part = rows[place_N == number]
        said = mean(part.p_memorized, part.group, f"{name}/said/{number}")
        bins.append({"said": said, "memorized": mean(part.followed == "memorized", part.group, f"{name}/bin/{number}")})
    return bins


def measure_gated(cell: Cell, direction: str, lists: dict[str, pd.DataFrame]) -> Tree:
    """What a vector does behind the gate; empty where no detector was fitted.

    Args:
        lists: rows of the steering table under the vector, by list.
    """
    if cell.gate is None:
        return {}
    gate = cell.gate[cell.gate.direction == direction]
    target, source = DIRECTIONS[direction]
    found: Tree = {"acted": {}, "shift": {}, "collateral": {}}
    for name, rows in lists.items():
        acts_N = _acts(cell, gate[gate.examples == name], rows, name)
        after_N = np.where(acts_N, rows.after, rows.before)
        found["acted"][name] = shared_mean(acts_N.astype(float), rows.group, cell.name)
        if name == "memory":
            found |= recall_by_family(cell, rows.assign(after=after_N))
        if name in KEPT:
            change_N = (after_N == KEPT[name]).astype(float) - (rows.before == KEPT[name]).to_numpy(float)
            found["collateral"][name] = shared_mean(change_N, rows.group, cell.name, signed=True)
        elif (rows.before == source).all():
            found["shift"][name] = shared_mean((after_N == target).astype(float), rows.group, cell.name)
    return {"gated": found}


def recall_by_family(cell: Cell, rows: pd.DataFrame) -> Tree:
    """Where facts to recall are asked in several families: the share that is right, before and after, of each."""
    if cell.info["memory_is_conflict"] or rows.family.nunique() < 2:
        return {}
    found = {
        str(family): {
            when: shared_mean((part[when] == "correct").astype(float), part.group, cell.name)
            for when in ("before", "after")
        }
        for family, part in rows.groupby("family", observed=True, sort=True)
    }
    return {"recall_by_family": found}


def measure_neutral(cell: Cell) -> Tree:
    """Divergence on neutral text by direction and dose, in nats a token; empty where it was not measured."""
    if cell.neutral is None:
        return {}
    found: Tree = {}
    for (direction, dose), rows in cell.neutral.groupby(["direction", "dose"]):
        name, acts_N = f"{cell.name}/neutral/{direction}/{dose:g}", rows.acts.astype(float)
        entry = {
            key: mean(rows[column] * weight, rows.text, f"{name}/{key}")
            for key, column, weight in (
                ("first", "kl_first", 1.0),
                ("next", "kl_next", 1.0),
                ("first_gated", "kl_first", acts_N),
                ("next_gated", "kl_next", acts_N),
                ("same_top", "same_top", 1.0),
                ("acted", "acts", 1.0),
            )
        }
        found.setdefault(str(direction), {})[f"{dose:g}"] = entry
    return {"neutral": found}


def _acts(cell: Cell, gate: pd.DataFrame, rows: pd.DataFrame, name: str) -> Any:
    acts = gate.set_index("example").acts
    if not acts.index.is_unique or not set(rows.example) <= set(acts.index):
        raise InputError(f"{cell.folder / 'records' / 'gate.parquet'}: examples of {name!r} are not those of steering")
    return acts.loc[rows.example].to_numpy(bool)
