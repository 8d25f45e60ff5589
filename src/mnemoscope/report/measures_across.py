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


def measure_transfer(run: Run, layers: dict[tuple[str, int], int]) -> Tree:
    """By source and target: shift of the source's vectors on the target's pairs, and accuracy of its probes there.

    Args:
        layers: by label and seed, the layer at which the source's probe reads the tune split best.
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
            place |= _probes(rows, layers)
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


def _probes(rows: pd.DataFrame, layers: dict[tuple[str, int], int]) -> Tree:
    """Accuracy by layer, and at each seed's layer that reads best on tune where the probe comes from."""

    def right(part: pd.DataFrame) -> Any:
        return (part.score > 0) == (part.label == 1)

    chosen_N = np.array([layers.get(key, -1) for key in zip(rows.source.astype(str), rows.seed, strict=True)])
    best = rows[rows.layer.to_numpy() == chosen_N]
    return {
        "probe": _over_seeds(best, right) if len(best) else Estimate.undefined(),
        "probe_layer": float(best.groupby("seed").layer.first().mean()) if len(best) else float("nan"),
        "probe_by_layer": [_over_seeds(rows[rows.layer == layer], right) for layer in sorted(rows.layer.unique())],
    }


def _over_seeds(rows: pd.DataFrame, hits: Any) -> Estimate:
    parts = [
        shared_mean(hits(part), part.group, f"transfer/{part.source.iloc[0]}/{seed}")
        for seed, part in rows.groupby("seed")
    ]
    return over_seeds(parts)
