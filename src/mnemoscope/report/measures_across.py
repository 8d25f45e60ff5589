"""What compares cells: whether seeds find the same neurons, and whether what one task teaches works on another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.intervals import Tree, spread
from mnemoscope.report.records import DIRECTIONS, Run
from mnemoscope.report.resampling import shared_mean
from mnemoscope.statistics import Estimate, over_seeds

MEASURE = ["site", "shared_initialization", "what", "layer", "top"]


def measure_seeds(run: Run) -> Tree:
    """By label: how alike each two seeds are, beside what it would be by chance; the mean and the range of all twos."""
    if run.seeds is None:
        return {}
    return {str(label): _alike(rows) for label, rows in run.seeds.groupby("label", sort=True)}


def _alike(rows: pd.DataFrame) -> list[Tree]:
    table = []
    for values, part in rows.groupby(MEASURE, dropna=False, sort=True):
        row: Tree = dict(zip(MEASURE, values, strict=True))
        middle, low, high = (float(part[key].mean()) for key in ("chance", "chance_low", "chance_high"))
        by_chance = Estimate(middle, low, high, len(part))
        table.append({**row, "value": spread(part.value), "chance": by_chance, "twos": len(part)})
    return table


def measure_transfer(run: Run, tasks: Tree) -> Tree:
    """By source and target: shift of the source's vectors on the target's pairs, and accuracy of its probes there.

    Args:
        tasks: the finished numbers of each label; they tell which layer a source's probe reads best at home.
    """
    tree: Tree = {}
    if run.transfer_steering is not None:
        for (source, target), rows in run.transfer_steering.groupby(["source", "target"], observed=True, sort=True):
            tree.setdefault(str(source), {})[str(target)] = {
                direction: _vectors(rows[rows.direction == direction], direction) for direction in DIRECTIONS
            }
    if run.transfer_probes is not None:
        for (source, target), rows in run.transfer_probes.groupby(["source", "target"], sort=True):
            place = tree.setdefault(str(source), {}).setdefault(str(target), {})
            place |= _probes(rows, tasks.get(str(source), {}).get("probe"))
    return tree


def _vectors(rows: pd.DataFrame, direction: str) -> Tree:
    """By method: shift of the vector, and of Gaussian shifts of the same norm."""
    return {
        str(method): {
            name: _over_seeds(part[part.role == role], lambda p: p.after == DIRECTIONS[direction][0])
            for name, role in (("shift", "vector"), ("gaussian", "gaussian"))
        }
        for method, part in rows.groupby("method", observed=True, sort=True)
    }


def _probes(rows: pd.DataFrame, home: Tree | None) -> Tree:
    """Accuracy by layer, and at the layer that is best where the probe comes from."""
    layers = sorted(rows.layer.unique().tolist())
    by_layer = [_over_seeds(rows[rows.layer == layer], lambda p: (p.score > 0) == (p.label == 1)) for layer in layers]
    at_home = [entry.estimate for entry in home["accuracy"]] if home else []
    known = bool(at_home) and not np.isnan(at_home).all()
    best = layers.index(int(np.nanargmax(at_home))) if known else None
    return {
        "probe": by_layer[best] if best is not None else Estimate.undefined(),
        "probe_layer": float(layers[best]) if best is not None else float("nan"),
        "probe_by_layer": by_layer,
    }


def _over_seeds(rows: pd.DataFrame, hits: Any) -> Estimate:
    parts = [
        shared_mean(hits(part), part.group, f"transfer/{part.source.iloc[0]}/{seed}")
        for seed, part in rows.groupby("seed")
    ]
    return over_seeds(parts)
