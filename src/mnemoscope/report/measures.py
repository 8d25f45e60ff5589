"""One cell's numbers, from its records; every leaf with an interval is an ``Estimate``.

Shapes: N rows of a table, L layers, D neurons.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.errors import InputError
from mnemoscope.report.records import Cell, Contrast
from mnemoscope.statistics import Estimate, auroc, proportion

Tree = dict[str, Any]

# direction of turning -> (the behaviour it aims at, the behaviour it starts from)
DIRECTIONS = {"to_generalized": ("generalized", "memorized"), "to_memorized": ("memorized", "generalized")}
TURNED = ("pairs", "conflict")
CONTROLS = ("random_neurons", "gaussian")
SIGNIFICANT = 0.05


def rng_for(name: str) -> np.random.Generator:
    """The random stream of one number: it depends on the number's name alone, so equal records give equal bytes."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def mean(values_N: Any, groups_N: Any, name: str, *, signed: bool = False) -> Estimate:
    """The mean of the values that are not NaN, with a bootstrap interval clustered by group.

    Args:
        values_N: 0/1 values, differences of such (then ``signed``), or margins.
        groups_N: the group of each.
        name: the number's name, which seeds its bootstrap.
        signed: the values are differences, which could be negative.
    """
    values = np.asarray(values_N, dtype=np.float64)
    return proportion(values, np.asarray(groups_N, dtype=str), rng_for(name), signed=signed)


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


def measure_probes(cell: Cell) -> Tree:
    """What a linear probe reads from each layer, beside what the input alone and shuffled labels give."""
    name = f"{cell.name}/probe"
    layers = list(range(len(cell.contrast.nmd)))
    of_kind = {kind: cell.probes[cell.probes.kind == kind] for kind in ("state", "input_only", "shuffled")}
    input_only = of_kind["input_only"]
    state, shuffled = (_by_layer(of_kind[kind], layers) for kind in ("state", "shuffled"))
    for layer in layers:
        _check_same_states(cell, state[layer], input_only, layer)
    return {
        "site": cell.contrast.site,
        "layers": layers,
        "accuracy": [_accuracy(state[layer], f"{name}/{layer}") for layer in layers],
        "auroc": [_auroc(state[layer], f"{name}/{layer}/auroc") for layer in layers],
        "input_only": _accuracy(input_only, f"{name}/input_only"),
        "input_only_auroc": _auroc(input_only, f"{name}/input_only/auroc"),
        "shuffled": _accuracy(of_kind["shuffled"], f"{name}/shuffled"),
        "shuffled_by_layer": [_accuracy(shuffled[layer], f"{name}/shuffled/{layer}") for layer in layers],
        "minus_input_only": [_beyond(state[layer], input_only, f"{name}/{layer}/minus") for layer in layers],
        "best": _cross_fitted(state, input_only, f"{name}/best"),
    }


def _by_layer(rows: pd.DataFrame, layers: list[int]) -> dict[int, pd.DataFrame]:
    return {layer: rows[rows.layer == layer] for layer in layers}


def _check_same_states(cell: Cell, rows: pd.DataFrame, others: pd.DataFrame, layer: int) -> None:
    """Differences are taken state by state, so the two kinds must list the same states in the same order."""
    if not all(np.array_equal(rows[column], others[column]) for column in ("group", "label")):
        raise InputError(
            f"{cell.folder / 'records' / 'probes.parquet'}: the states of layer {layer} are not those of 'input_only'"
        )


def _right(rows: pd.DataFrame) -> np.ndarray:
    """1.0 where the sign of the score names the behaviour, else 0.0, shape (N,)."""
    return ((rows.score.to_numpy() > 0) == (rows.label.to_numpy() == 1)).astype(np.float64)


def _accuracy(rows: pd.DataFrame, name: str) -> Estimate:
    return mean(_right(rows), rows.group, name)


def _auroc(rows: pd.DataFrame, name: str) -> Estimate:
    if rows.label.nunique() < 2:
        return Estimate.undefined(len(rows))
    return auroc(rows.score.to_numpy(), rows.label.to_numpy(), rows.group.to_numpy(dtype=str), rng_for(name))


def _beyond(rows: pd.DataFrame, input_only: pd.DataFrame, name: str) -> Estimate:
    """Accuracy of the probe minus that of the input alone, state by state."""
    return mean(_right(rows) - _right(input_only), rows.group, name, signed=True)


def _cross_fitted(states: dict[int, pd.DataFrame], input_only: pd.DataFrame, name: str) -> Tree:
    """Accuracy at the best layer, without choosing it on what it is scored on.

    The test groups are cut into two halves; each half is scored at the layer that is best in the other half.
    """
    layers = list(states)
    if input_only.empty:
        return {"picked": [], "accuracy": Estimate.undefined(0), "minus_input_only": Estimate.undefined(0)}
    right_LN = np.stack([_right(rows) for rows in states.values()])
    groups_N = input_only.group.to_numpy()
    half_N = np.array([zlib.crc32(str(group).encode()) % 2 for group in groups_N])
    scored_N, picked = np.full(len(groups_N), np.nan), []
    for half in (0, 1):
        elsewhere = half_N != half
        if elsewhere.any():
            pick = int(right_LN[:, elsewhere].mean(axis=1).argmax())
            scored_N[half_N == half] = right_LN[pick, half_N == half]
            picked.append(layers[pick])
    return {
        "picked": sorted(set(picked)),
        "accuracy": mean(scored_N, groups_N, f"{name}/accuracy"),
        "minus_input_only": mean(scored_N - _right(input_only), groups_N, f"{name}/minus", signed=True),
    }


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
