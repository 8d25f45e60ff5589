"""One cell's numbers, from its records; every leaf with an interval is an ``Estimate``.

Shapes: N rows of a table, L layers, D neurons.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.intervals import Tree, mean
from mnemoscope.report.measures_detection import measure_consistency, measure_learning, measure_probes
from mnemoscope.report.measures_detector import measure_detector, measure_neutral
from mnemoscope.report.measures_effects import measure_effects
from mnemoscope.report.measures_steering import measure_steering
from mnemoscope.report.records import Cell, Contrast
from mnemoscope.statistics import Estimate

SIGNIFICANT = 0.05


def measure(cell: Cell) -> Tree:
    """Everything ``results.json`` says about one cell, with ``Estimate`` leaves."""
    return {
        "training": {
            "seconds": float(cell.training_time.get("seconds", np.nan)),
            "steps": cell.training_time.get("steps", np.nan),
        },
        "behaviour": measure_behaviour(cell),
        "pairs": measure_pairs(cell),
        "contrast": measure_contrast(cell.contrast),
        "probe": measure_probes(cell),
        "learning": measure_learning(cell),
        "consistency": measure_consistency(cell),
        **measure_steering(cell),
        **measure_effects(cell),
        **measure_detector(cell),
        **measure_neutral(cell),
    }


def measure_behaviour(cell: Cell) -> Tree:
    """How the model answers the test examples, without any intervention."""
    test = cell.behaviour[cell.behaviour.split == "test"]
    conflict, name = test[test.kind == "conflict"], f"{cell.name}/behaviour"
    of_kind = {kind: test[test.kind == kind] for kind in ("memory", "novel")}
    shares = {
        behaviour: mean(conflict.behaviour == behaviour, conflict.group, f"{name}/{behaviour}")
        for behaviour in ("memorized", "generalized", "other")
    }
    shares["confabulated"] = mean(conflict.confabulated, conflict.group, f"{name}/confabulated")
    right = {k: mean(rows.behaviour == "correct", rows.group, f"{name}/{k}") for k, rows in of_kind.items()}
    return {
        "recall": right["memory"],
        "novel_accuracy": right["novel"],
        "conflict": shares,
        "ties": int(test.tie.astype(bool).sum()),
    }


def measure_pairs(cell: Cell) -> Tree:
    """How many candidates flip under rephrasing: the test split first, then every split."""
    splits = {split: cell.pairs[cell.pairs.split == split] for split in ("fit", "tune", "test")}
    counts = {split: _yield(rows, f"{cell.name}/pairs/{split}") for split, rows in splits.items()}
    counts["all"] = _yield(cell.pairs, f"{cell.name}/pairs/all")
    return {**counts["test"], "by_split": counts}


def _yield(rows: pd.DataFrame, name: str) -> Tree:
    is_pair = rows.is_pair.astype(bool)
    return {
        "candidates": len(rows),
        "pairs": int(is_pair.sum()),
        "yield": mean(is_pair, rows.group, name),
        "groups": int(rows.group[is_pair].nunique()),
    }


def measure_contrast(contrast: Contrast) -> Tree:
    """Per layer: mean |NMD|, the largest |rho| and the share of neurons that differ, family-wise."""
    p_LD = contrast.p_family_wise
    known_LD = ~np.isnan(p_LD)
    significant_LD = np.where(known_LD, p_LD <= SIGNIFICANT, np.nan)
    return {
        "site": contrast.site,
        "layers": list(range(len(p_LD))),
        "mean_abs_nmd": [_nan_safe(np.mean, row) for row in np.abs(contrast.nmd)],
        "max_abs_rho": [_nan_safe(np.max, row) for row in np.abs(contrast.rho)],
        "significant_fraction": [_nan_safe(np.mean, row) for row in significant_LD],
        "significant": Estimate(_nan_safe(np.mean, significant_LD), np.nan, np.nan, int(known_LD.sum())),
        "pairs": contrast.pairs,
        "groups": contrast.groups,
    }


def _nan_safe(function: Any, values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(function(known)) if len(known) else float("nan")
