"""Every setting that was tried on the tune split, over the seeds that tried it, and where in depth turning works.

A number over seeds is their mean with Student's t interval; of one seed it stands alone, for the records hold shares
and not examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mnemoscope.report.intervals import Tree
from mnemoscope.report.records import AIMS, DIRECTIONS, Cell
from mnemoscope.statistics import Estimate, over_seeds

SETTING = ["direction", "method", "site", "layers", "top", "strength"]
NUMBERS = {"turned": ("shift", "stay", "other", "margin", "margin_sd"), "kept": ("kept",)}


def measure_sweep(cells: Sequence[Cell]) -> list[Tree]:
    """A row per setting and list of examples; ``seeds`` says how many tried it."""
    # A place that both aims try has one row for each; they are the same.
    tables = [cell.sweep.drop_duplicates([*SETTING, "examples"]) for cell in cells]
    rows: list[Tree] = []
    for values, part in pd.concat(tables).groupby([*SETTING, "examples"], sort=True, observed=True):
        row: Tree = dict(zip([*SETTING, "examples"], values, strict=True))
        for key in NUMBERS["turned" if row["examples"] in AIMS else "kept"]:
            row[key] = over_seeds([_alone(x, n) for x, n in zip(part[key], part.n, strict=True)])
        rows.append({**row, "seeds": len(part)})
    return rows


def _alone(value: float, n: int) -> Estimate:
    return Estimate.undefined() if math.isnan(value) else Estimate(float(value), math.nan, math.nan, int(n))


def measure_layers(sweep: Sequence[Tree], contrast: Tree) -> Tree:
    """Where the difference shows, layer by layer, beside where a shift of one layer acts, at one strength for all.

    Of the strengths that every method tried on single layers, the one is shown that turns most pairs on average; of the
    shares of neurons, for each layer the one that turns most.
    """
    layers = contrast["layers"]
    single = [row for row in sweep if row["examples"] == "pairs" and str(row["layers"]).isdigit()]
    tree: Tree = {key: contrast[key] for key in ("layers", "mean_abs_nmd", "max_abs_rho")}
    tree["shift"] = {}
    for direction in DIRECTIONS:
        rows = [row for row in single if row["direction"] == direction]
        strength = _common_strength(rows)
        at_equal = [row for row in rows if row["strength"] == strength]
        by_method: Tree = {}
        for method, site in dict.fromkeys((row["method"], row["site"]) for row in at_equal):
            part = [row for row in at_equal if (row["method"], row["site"]) == (method, site)]
            by_method.setdefault(method, {})[site] = [_best(part, layer) for layer in layers]
        tree["shift"][direction] = {"strength": strength, "methods": by_method}
    return tree


def _common_strength(rows: Sequence[Tree]) -> float:
    """NaN where no strength was tried by all methods."""
    methods = {row["method"] for row in rows}
    tried: dict[float, set[str]] = {}
    for row in rows:
        tried.setdefault(row["strength"], set()).add(row["method"])
    common = [strength for strength, by in tried.items() if by == methods]

    def average(strength: float) -> float:
        shifts = [row["shift"].estimate for row in rows if row["strength"] == strength]
        return sum(shifts) / len(shifts)

    return max(common, key=average, default=math.nan)


def _best(rows: Sequence[Tree], layer: int) -> Any:
    found = [row["shift"] for row in rows if int(row["layers"]) == layer]
    return max(found, key=lambda shift: shift.estimate, default=Estimate.undefined())
