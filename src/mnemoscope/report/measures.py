"""One cell's numbers, from its records; every leaf with an interval is an ``Estimate``.

Shapes: N rows of a table, L layers, D neurons.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.errors import InputError
from mnemoscope.report.intervals import Tree, mean
from mnemoscope.report.measures_detection import measure_consistency, measure_learning, measure_probes
from mnemoscope.report.records import Cell, Contrast
from mnemoscope.statistics import Estimate

# direction of turning -> (the behaviour it aims at, the behaviour it starts from)
DIRECTIONS = {"to_generalized": ("generalized", "memorized"), "to_memorized": ("memorized", "generalized")}
TURNED = ("pairs", "conflict")
CONTROLS = ("random_neurons", "gaussian")
SIGNIFICANT = 0.05


def measure(cell: Cell) -> Tree:
    """Everything ``results.json`` says about one cell, with ``Estimate`` leaves."""
    best, methods = cell.chosen["best"], cell.chosen["methods"]
    by_method = {
        method: {
            direction: measure_steering(cell, method, direction, chosen)
            for direction, chosen in methods[method].items()
            if direction in DIRECTIONS
        }
        for method in sorted(methods)
    }
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
        "steering": {direction: by_method[best[direction]][direction] for direction in DIRECTIONS},
        "steering_by_method": by_method,
        "unsteered_margin": {direction: _unsteered_margin(cell, direction) for direction in DIRECTIONS},
        "sweep": measure_sweep(cell),
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


def measure_steering(cell: Cell, method: str, direction: str, chosen: Tree) -> Tree:
    """One method in one direction, on the test split: shifts, controls, what is left of them, and collateral."""
    rows = cell.steering
    rows = rows[(rows.purpose == "final") & (rows.method == method) & (rows.direction == direction)]
    name = f"{cell.name}/steering/{method}/{direction}"
    vector = rows[rows.role == "vector"]
    names = [*CONTROLS, *sorted(set(rows.role) - {*CONTROLS, "vector", "none"})]
    controls = {control: rows[rows.role == control] for control in names}
    return {
        "chosen": chosen,
        **{examples: _shares_on(vector, direction, examples, name) for examples in TURNED},
        "controls": {control: _control(part, direction, f"{name}/{control}") for control, part in controls.items()},
        "minus_control": {
            control: {examples: _difference(cell, vector, part, direction, examples) for examples in TURNED}
            for control, part in controls.items()
        },
        "collateral": _collateral(cell, vector, direction, name),
    }


def shares(rows: pd.DataFrame, direction: str, name: str) -> Tree:
    """Of steered examples: how many answer with the target behaviour, keep the source's, or do neither."""
    target, source = DIRECTIONS[direction]
    wanted = {"shift": target, "stay": source, "other": "other"}
    found: Tree = {key: mean(rows.after == after, rows.group, f"{name}/{key}") for key, after in wanted.items()}
    found["confabulated"] = mean(rows.confabulated, rows.group, f"{name}/confabulated")
    return found


def _shares_on(rows: pd.DataFrame, direction: str, examples: str, name: str) -> Tree:
    return shares(rows[rows.examples == examples], direction, f"{name}/{examples}")


def _control(rows: pd.DataFrame, direction: str, name: str) -> Tree:
    """All draws of a control pooled, and beside it the draw that shifts most."""
    tree: Tree = {examples: _shares_on(rows, direction, examples, name) for examples in TURNED}
    tree["draws"] = int(rows.draw.nunique())
    tree["worst"] = {}
    for examples in TURNED:
        part = rows[rows.examples == examples]
        shift = (part.after == DIRECTIONS[direction][0]).groupby(part.draw).mean()
        worst = part[part.draw == shift.idxmax()] if len(shift) else part
        tree["worst"][examples] = shares(worst, direction, f"{name}/worst/{examples}")
    return tree


def _difference(cell: Cell, vector: pd.DataFrame, control: pd.DataFrame, direction: str, examples: str) -> Estimate:
    """Shift under the vector minus the mean shift under a control's draws, example by example."""
    target = DIRECTIONS[direction][0]
    ours, theirs = (part[part.examples == examples] for part in (vector, control))
    if ours.empty or theirs.empty:
        return Estimate.undefined(len(ours))
    if set(ours.example) != set(theirs.example):
        raise InputError(
            f"{cell.folder / 'records' / 'steering.parquet'}: {direction}, {examples}: the vector and the control "
            f"{theirs.role.iloc[0]!r} were not tried on the same examples"
        )
    control_mean = (theirs.after == target).groupby(theirs.example).mean()
    difference = (ours.after == target).astype(np.float64) - control_mean.loc[ours.example].to_numpy()
    name = f"{cell.name}/{ours.method.iloc[0]}/{direction}/minus/{theirs.role.iloc[0]}/{examples}"
    return mean(difference, ours.group, name, signed=True)


def _collateral(cell: Cell, vector: pd.DataFrame, direction: str, name: str) -> Tree:
    """Changes, after minus before, in what steering should leave alone; negative is damage."""
    target = DIRECTIONS[direction][0]
    good = {"novel": "correct", "memory": "correct", "conflict_rest": target}
    changes: Tree = {}
    for examples, behaviour in good.items():
        rows = vector[vector.examples == examples]
        change = (rows.after == behaviour).astype(np.float64) - (rows.before == behaviour).astype(np.float64)
        changes[examples] = mean(change, rows.group, f"{name}/{examples}", signed=True)
    if cell.info["memory_is_conflict"]:
        # The memory examples are the conflicts themselves: turning them is the aim, not the damage.
        changes["memory"] = Estimate.undefined(0)
    return changes


def measure_sweep(cell: Cell) -> list[Tree]:
    """Every setting tried on the tune split, with what it does to the examples that it is meant to turn."""
    rows = cell.steering
    rows = rows[(rows.purpose == "sweep") & (rows.role != "none") & rows.examples.isin(TURNED)]
    keys = ["direction", "method", "role", "examples", "top", "strength"]
    table = []
    for values, part in rows.groupby(keys, sort=True):
        setting = dict(zip(keys, values, strict=True))
        name = f"{cell.name}/sweep/" + "/".join(str(value) for value in values)
        margin = mean(part.margin, part.group, f"{name}/margin")
        table.append({**setting, **shares(part, str(setting["direction"]), name), "margin": margin})
    return table


def _unsteered_margin(cell: Cell, direction: str) -> Estimate:
    """Where the sweep starts: the mean margin, without any shift, of the phrasings that it turns."""
    sweep = cell.steering[(cell.steering.purpose == "sweep") & (cell.steering.direction == direction)]
    swept = sweep[sweep.examples == "pairs"].example.nunique()
    pairs = cell.pairs[(cell.pairs.split == "tune") & cell.pairs.is_pair.astype(bool)].head(swept)
    margin = np.where(pairs.behaviour_a == DIRECTIONS[direction][1], pairs.margin_a, pairs.margin_b)
    return mean(margin, pairs.group, f"{cell.name}/sweep/{direction}/unsteered")
