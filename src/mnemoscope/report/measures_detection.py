"""Can the behaviour be read? One cell's probes beside their baselines, its learning curve, how steady its contrast is.

Shapes: N rows of a table (test states), L layers.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.errors import InputError
from mnemoscope.report.intervals import Tree, mean, rng_for, spread
from mnemoscope.report.records import Cell
from mnemoscope.statistics import Estimate, auroc

INPUTS = ("input_only", "input_repeats")
UNCERTAINTIES = ("entropy", "top_gap")
ALL = -1  # the layer of what belongs to none, or to all together


def measure_probes(cell: Cell) -> Tree:
    """What a linear probe reads from each layer and position, beside what it has to beat."""
    name, rows = f"{cell.name}/probe", cell.probes
    layers = list(range(len(cell.contrast.nmd)))
    alone = {kind: rows[rows.kind == kind] for kind in (*INPUTS, *UNCERTAINTIES)}
    input_only, shuffled = alone["input_only"], rows[rows.kind == "shuffled"]
    states = _states_by_offset(cell, input_only, layers)
    for kind, part in alone.items():
        _check_same_states(cell, part, input_only, repr(kind))
    by_offset = _by_offset(states, alone, name)
    tree: Tree = {
        "site": cell.contrast.site,
        "layers": layers,
        "accuracy": by_offset["accuracy_by_offset"]["0"],
        "auroc": by_offset["auroc_by_offset"]["0"],
        "best": by_offset["best_by_offset"]["0"],
        **_told_by(INPUTS, alone, name),
        "baselines": _told_by(UNCERTAINTIES, alone, name),
        "shuffled": _accuracy(shuffled, f"{name}/shuffled"),
        "shuffled_by_layer": [
            _accuracy(shuffled[shuffled.layer == layer], f"{name}/shuffled/{layer}") for layer in layers
        ],
        **{
            f"minus_{kind}": [_beyond(states[0][layer], alone[kind], f"{name}/{layer}/{minus}") for layer in layers]
            for kind, minus in (("input_only", "minus"), ("input_repeats", "minus/input_repeats"))
        },
        **by_offset,
    }
    return {**tree, **statements(tree)}


def statements(probe: Tree) -> Tree:
    """What the numbers of a probe say in words; to be said anew of numbers over seeds.

    Args:
        probe: with ``best`` and ``best_by_offset``, whose leaves are estimates.

    Returns:
        ``beats_input_only``, ``beats_input_repeats``: "yes" or "no" where the interval of the cross-fitted difference
        to a probe of the input lies above or below 0, else "unclear". ``known_from``: the earliest offset (tokens
        before the decision position) at which the interval of the cross-fitted accuracy lies above ``chance`` (one
        half), and that of its difference to either probe of the input above 0; NaN where none does.
    """
    by_offset = probe["best_by_offset"].items()
    above = {kind: {offset: best[f"minus_{kind}"].low > 0 for offset, best in by_offset} for kind in INPUTS}
    above["chance"] = {offset: best["accuracy"].low > 0.5 for offset, best in by_offset}
    return {
        **{f"beats_{kind}": _verdict(probe["best"][f"minus_{kind}"]) for kind in INPUTS},
        "known_from": {what: _earliest(known) for what, known in above.items()},
    }


def _verdict(difference: Estimate) -> str:
    return "yes" if difference.low > 0 else "no" if difference.high < 0 else "unclear"


def _earliest(known: dict[str, bool]) -> float:
    """The largest offset at which it is known. Later ones may know less: what one state holds, others need not."""
    return max((float(offset) for offset, is_known in known.items() if is_known), default=math.nan)


def _states_by_offset(cell: Cell, input_only: pd.DataFrame, layers: list[int]) -> dict[int, dict[int, pd.DataFrame]]:
    """Rows of the probes on states by offset and layer; the decision position is always there, even without a row."""
    rows = cell.probes[cell.probes.kind == "state"]
    found = {
        offset: {layer: part[part.layer == layer] for layer in layers}
        for offset in sorted({0, *rows.offset.unique().tolist()})
        for part in [rows[rows.offset == offset]]
    }
    for offset, by_layer in found.items():
        for layer in layers:
            _check_same_states(cell, by_layer[layer], input_only, f"layer {layer}, offset {offset}")
    return found


def _check_same_states(cell: Cell, rows: pd.DataFrame, others: pd.DataFrame, what: str) -> None:
    """Differences are taken state by state, so the two kinds must list the same states in the same order."""
    if not all(np.array_equal(rows[column], others[column]) for column in ("group", "label")):
        raise InputError(
            f"{cell.folder / 'records' / 'probes.parquet'}: the states of {what} are not those of 'input_only'"
        )


def _by_offset(states: dict[int, dict[int, pd.DataFrame]], alone: dict[str, pd.DataFrame], name: str) -> Tree:
    """The decision position has the names, and so the bootstraps, of the numbers that are shown without an offset."""
    tree: Tree = {"offsets": list(states), "accuracy_by_offset": {}, "auroc_by_offset": {}, "best_by_offset": {}}
    for offset, by_layer in states.items():
        here = f"{name}/offset {offset}" if offset else name
        key = str(offset)
        tree["accuracy_by_offset"][key] = [_accuracy(rows, f"{here}/{layer}") for layer, rows in by_layer.items()]
        tree["auroc_by_offset"][key] = [_auroc(rows, f"{here}/{layer}/auroc") for layer, rows in by_layer.items()]
        tree["best_by_offset"][key] = _cross_fitted(by_layer, alone, f"{here}/best")
    return tree


def _told_by(kinds: tuple[str, ...], alone: dict[str, pd.DataFrame], name: str) -> Tree:
    """What probes tell that see no state: accuracy and area under the ROC curve of each kind."""
    accuracy = {kind: _accuracy(alone[kind], f"{name}/{kind}") for kind in kinds}
    return {**accuracy, **{f"{kind}_auroc": _auroc(alone[kind], f"{name}/{kind}/auroc") for kind in kinds}}


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


def _cross_fitted(states: dict[int, pd.DataFrame], alone: dict[str, pd.DataFrame], name: str) -> Tree:
    """Accuracy at the best layer, without choosing it on what it is scored on, and its difference to each baseline.

    The test groups are cut into two halves; each half is scored at the layer that is best in the other half.
    """
    groups_N = alone["input_only"].group.to_numpy()
    scored_N, picked = np.full(len(groups_N), np.nan), []
    right_LN = np.stack([_right(rows) for rows in states.values()])
    half_N = np.array([zlib.crc32(str(group).encode()) % 2 for group in groups_N])
    for half in (0, 1):
        elsewhere = half_N != half
        if elsewhere.any():
            pick = int(right_LN[:, elsewhere].mean(axis=1).argmax())
            scored_N[half_N == half] = right_LN[pick, half_N == half]
            picked.append(list(states)[pick])
    # The difference to the input alone keeps the name it had when it was the only one, and with it its bootstrap.
    names = {kind: "minus" if kind == "input_only" else f"minus/{kind}" for kind in alone}
    return {
        "picked": sorted(set(picked)),
        "accuracy": mean(scored_N, groups_N, f"{name}/accuracy"),
        **{
            f"minus_{kind}": mean(scored_N - _right(rows), groups_N, f"{name}/{names[kind]}", signed=True)
            for kind, rows in alone.items()
        },
    }


def measure_learning(cell: Cell) -> Tree:
    """What fewer fit pairs give; each number the mean over its draws, with their range."""
    rows = cell.learning
    sizes = sorted(rows.pairs.unique().tolist())
    keys = {size: "all" if size == sizes[-1] else str(size) for size in sizes}
    at_layer = rows.layer != ALL
    parts = {
        "accuracy": rows[rows.what == "accuracy"],
        "nmd_cosine": rows[(rows.what == "nmd_cosine") & ~at_layer],
        "nmd_cosine_at_layer": rows[(rows.what == "nmd_cosine") & at_layer],
    }
    return {
        "picked": sorted(parts["accuracy"].layer.unique().tolist()),
        "pairs": {keys[size]: float(size) for size in sizes},
        **{
            what: {keys[size]: spread(part.value[part.pairs == size]) for size in sizes} for what, part in parts.items()
        },
    }


def measure_consistency(cell: Cell) -> Tree:
    """How alike the contrasts of two halves of the fit pairs are; the mean over halvings, with their range."""
    rows, layers = cell.halves, range(len(cell.contrast.nmd))
    of_what: dict[Any, pd.DataFrame] = {what: rows[rows.what == what] for what in rows.what.unique()}
    none = rows.iloc[:0]
    by_layer = {
        what: [spread(part.value[part.layer == layer]) for layer in layers]
        for what in ("rho_rank_correlation", "nmd_cosine")
        for part in [of_what.get(what, none)]
    }
    cosine, overlap, in_layers = (of_what.get(k, none) for k in ("nmd_cosine", "overlap", "overlap_in_layers"))
    halves = {
        "halvings": int(rows.halving.nunique()),
        **by_layer,
        "nmd_cosine_all": spread(cosine.value[cosine.layer == ALL]),
        "overlap": {
            f"{top:g}": {
                "share": spread(overlap.value[overlap.top == top]),
                "chance": _chance(overlap[overlap.top == top]),
                "chance_in_layers": _chance(in_layers[in_layers.top == top]),
            }
            for top in sorted(overlap.top.unique())
        },
    }
    return {"halves": halves}


def _chance(rows: pd.DataFrame) -> Estimate:
    """The permutation distribution of an overlap: its mean and its 95 % interval, averaged over halvings."""
    chance, low, high = (float(rows[key].mean()) for key in ("chance", "chance_low", "chance_high"))
    return Estimate(chance, low, high, int(rows.n.max()))
