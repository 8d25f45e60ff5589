"""By degrees, needed or not, and at most: what one cell's test pairs do under interventions that choose nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.intervals import Tree
from mnemoscope.report.measures_steering import shares
from mnemoscope.report.records import DIRECTIONS, Cell
from mnemoscope.report.resampling import shared_mean

SIDES = ("generalized", "memorized")


def measure_effects(cell: Cell) -> Tree:
    """Dose-response, ablation, patching, words and other decoding; empty where the records have none of it."""
    kinds = ("dose", "ablation", "patch", "prompt", "contrast")
    of_what = {what: cell.effects[cell.effects.what == what] for what in kinds}
    return {
        "dose": _nested(of_what["dose"], ["method", "direction", "role", "dose"], cell, _dose),
        "ablation": _nested(of_what["ablation"], ["method", "direction", "dose"], cell, _ablation),
        "patch": _patches(of_what["patch"], cell),
        "prompt": _nested(of_what["prompt"], ["direction"], cell, _shares),
        "context_aware": _nested(of_what["contrast"], ["direction", "dose"], cell, _shares),
    }


def _nested(rows: pd.DataFrame, keys: list[str], cell: Cell, measure: Any) -> Tree:
    """``measure`` of every combination of the keys, as dictionaries within dictionaries."""
    if rows.empty:
        return {}
    tree: Tree = {}
    for values, part in rows.groupby(keys, observed=True, sort=True):
        place, names = tree, [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = measure(part, cell)
    return tree


def _shares(rows: pd.DataFrame, cell: Cell) -> Tree:
    return shares(rows, str(rows.direction.iloc[0]), cell)


def _dose(rows: pd.DataFrame, cell: Cell) -> Tree:
    return {"margin": shared_mean(rows.margin, rows.group, cell.name), **_shares(rows, cell)}


def _patches(rows: pd.DataFrame, cell: Cell) -> Tree:
    """By direction and site, a list over layers."""
    layers = range(len(cell.contrast.nmd))
    return {
        direction: {
            str(site): [shares(part[part.layers == str(layer)], direction, cell) for layer in layers]
            for site in dict.fromkeys(rows.site)
            for part in [rows[(rows.direction == direction) & (rows.site == site)]]
        }
        for direction in DIRECTIONS
    }


def _ablation(rows: pd.DataFrame, cell: Cell) -> Tree:
    """What is left of a pair's two sides while neurons are held at their mean, and beside it as many at random.

    The separation of a pair is the margin of the side that is worked out minus that of the side that is remembered.
    """
    roles = {role: _separations(rows[rows.role == role]) for role in ("vector", "random_neurons")}
    tree: Tree = {}
    for role, table in roles.items():
        tree[role] = {
            key: shared_mean(table[key], table.group, cell.name, signed=True) for key in ("before", "after", "lost")
        }
        tree[role]["kept"] = {
            side: shared_mean(part.after == side, part.group, cell.name)
            for side in SIDES
            for part in [rows[(rows.role == role) & (rows.side == side)]]
        }
    ours, theirs = roles["vector"], roles["random_neurons"]
    beyond = ours.lost - theirs.lost.reindex(ours.index)
    tree["minus_random"] = shared_mean(beyond, ours.group, cell.name, signed=True)
    return tree


def _separations(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per pair, averaged over draws: separation ``before`` and ``after``, what is ``lost``, and the group."""
    by_pair = rows.groupby(["example", "side"], observed=True)[["margin_before", "margin"]].mean().unstack("side")
    groups = rows.drop_duplicates("example").set_index("example").group
    table = pd.DataFrame({"group": groups}).sort_index()
    for key, column in (("before", "margin_before"), ("after", "margin")):
        found = by_pair.get(column, pd.DataFrame(index=table.index))
        table[key] = found.get("generalized", np.nan) - found.get("memorized", np.nan)
    return table.assign(lost=table.before - table.after)
