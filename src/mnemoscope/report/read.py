"""Can the behaviour be read: probes on states beside all that they have to beat, how early, and from how few pairs.

Shapes: N rows of a table (test states), L layers.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import pandas as pd

from mnemoscope.errors import InputError
from mnemoscope.report.drawing import DASHED, INK, OTHER, Dot, Line, Panel, dots_panel, lines_panel
from mnemoscope.report.intervals import mean, ranking
from mnemoscope.report.page import Answer, Chapter, Exhibit, View, not_measured
from mnemoscope.report.records import Cell
from mnemoscope.report.schema import BestLayer, Learning, Probe, TaskResults
from mnemoscope.report.words import NBSP, RIVALS, argmax, beyond, interval, layers, percent
from mnemoscope.statistics import Estimate, mean_with_range

INPUTS = ("input_only", "input_repeats")
UNCERTAINTIES = ("entropy", "top_gap")
ALL = -1  # the layer of what belongs to none, or to all together


def measure_probes(cell: Cell) -> Probe:
    """What a linear probe reads from each layer and position, beside what it has to beat."""
    name, rows = f"{cell.name}/probe", cell.probes
    layers_L = list(range(len(cell.contrast.nmd_LD)))
    alone = {kind: rows[rows.kind == kind] for kind in (*INPUTS, *UNCERTAINTIES)}
    states = _states_by_offset(cell, alone["input_only"], layers_L)
    for kind, part in alone.items():
        _check_same_states(cell, part, alone["input_only"], repr(kind))
    shuffled = rows[rows.kind == "shuffled"]
    # The decision position has the names, and so the resamples, of the numbers that are shown without an offset.
    places = {offset: f"{name}/offset {offset}" if offset else name for offset in states}
    accuracy, auroc = (
        {str(k): [score(part, f"{places[k]}/{n}{end}") for n, part in found.items()] for k, found in states.items()}
        for score, end in ((_accuracy, ""), (_auroc, "/auroc"))
    )
    best = {str(offset): _cross_fitted(found, alone, f"{places[offset]}/best") for offset, found in states.items()}
    minus = {
        kind: [_minus(states[0][layer], alone[kind], f"{name}/{layer}/{end}") for layer in layers_L]
        for kind, end in (("input_only", "minus"), ("input_repeats", "minus/input_repeats"))
    }
    return Probe(
        site=cell.contrast.site,
        layers=layers_L,
        accuracy=accuracy["0"],
        auroc=auroc["0"],
        best=best["0"],
        **_of_kinds(INPUTS, alone, name),
        baselines=_of_kinds(UNCERTAINTIES, alone, name),
        shuffled=_accuracy(shuffled, f"{name}/shuffled"),
        shuffled_by_layer=[_accuracy(shuffled[shuffled.layer == n], f"{name}/shuffled/{n}") for n in layers_L],
        minus_input_only=minus["input_only"],
        minus_input_repeats=minus["input_repeats"],
        offsets=list(states),
        accuracy_by_offset=accuracy,
        auroc_by_offset=auroc,
        best_by_offset=best,
    )


def _states_by_offset(cell: Cell, input_only: pd.DataFrame, layers_L: list[int]) -> dict[int, dict[int, pd.DataFrame]]:
    """Rows of the probes on states by offset and layer; the decision position is always there, even without a row."""
    rows = cell.probes[cell.probes.kind == "state"]
    found = {
        offset: {layer: part[part.layer == layer] for layer in layers_L}
        for offset in sorted({0, *rows.offset.unique().tolist()})
        for part in [rows[rows.offset == offset]]
    }
    for offset, by_layer in found.items():
        for layer in layers_L:
            _check_same_states(cell, by_layer[layer], input_only, f"layer {layer}, offset {offset}")
    return found


def _check_same_states(cell: Cell, rows: pd.DataFrame, others: pd.DataFrame, what: str) -> None:
    """Differences are taken state by state, so the two kinds must list the same states in the same order."""
    if not all(np.array_equal(rows[column], others[column]) for column in ("group", "label")):
        path = cell.folder / "records" / "probes.parquet"
        raise InputError(f"{path}: the states of {what} are not those of 'input_only'")


def _of_kinds(kinds: tuple[str, ...], alone: dict[str, pd.DataFrame], name: str) -> dict[str, Estimate]:
    """Accuracy and area under the ROC curve of probes that see no state."""
    accuracy = {kind: _accuracy(alone[kind], f"{name}/{kind}") for kind in kinds}
    return {**accuracy, **{f"{kind}_auroc": _auroc(alone[kind], f"{name}/{kind}/auroc") for kind in kinds}}


def _right(rows: pd.DataFrame) -> np.ndarray:
    """1.0 where the sign of the score names the behaviour, else 0.0, shape (N,)."""
    return ((rows.score.to_numpy() > 0) == (rows.label.to_numpy() == 1)).astype(np.float64)


def _accuracy(rows: pd.DataFrame, name: str) -> Estimate:
    return mean(_right(rows), rows.group, name)


def _auroc(rows: pd.DataFrame, name: str) -> Estimate:
    return ranking(rows.score, rows.label, rows.group, name)


def _minus(rows: pd.DataFrame, input_only: pd.DataFrame, name: str) -> Estimate:
    """Accuracy of the probe minus that of the input alone, state by state."""
    return mean(_right(rows) - _right(input_only), rows.group, name, signed=True)


def _cross_fitted(states: dict[int, pd.DataFrame], alone: dict[str, pd.DataFrame], name: str) -> BestLayer:
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
    # The difference to the input alone keeps the name it had when it was the only one, and with it its resamples.
    names = {kind: "minus" if kind == "input_only" else f"minus/{kind}" for kind in alone}
    minus = {
        f"minus_{kind}": mean(scored_N - _right(rows), groups_N, f"{name}/{names[kind]}", signed=True)
        for kind, rows in alone.items()
    }
    return BestLayer(picked=sorted(set(picked)), accuracy=mean(scored_N, groups_N, f"{name}/accuracy"), **minus)


def measure_learning(cell: Cell) -> Learning:
    """What fewer fit pairs give; each number the mean over its draws, with their range."""
    rows = cell.learning
    sizes = sorted(rows.pairs.unique().tolist())
    keys = {size: "all" if size == sizes[-1] else str(size) for size in sizes}
    parts = {
        "accuracy": rows[rows.what == "accuracy"],
        "nmd_cosine": rows[(rows.what == "nmd_cosine") & (rows.layer == ALL)],
        "nmd_cosine_at_layer": rows[(rows.what == "nmd_cosine") & (rows.layer != ALL)],
    }
    curves = {
        what: {keys[size]: mean_with_range(part.value[part.pairs == size]) for size in sizes}
        for what, part in parts.items()
    }
    picked = sorted(parts["accuracy"].layer.unique().tolist())
    return Learning(picked=picked, pairs={keys[size]: float(size) for size in sizes}, **curves)


def chapter(view: View) -> Chapter:
    """The probe by layer, beside its rivals, by position and by number of pairs."""
    probe, learning = view.task.probe, view.task.learning
    if argmax(entry.estimate for entry in probe.accuracy) is None:
        return Chapter(answer(view.task))
    panels = [_layers_panel(probe), _rivals_panel(probe)]
    panels += [_offsets_panel(probe)] if len(probe.best_by_offset) > 1 else []
    panels += [_learning_panel(learning)] if len(learning.accuracy) > 1 else []
    return Chapter(answer(view.task), [Exhibit("probe", panels)])


def answer(task: TaskResults) -> Answer:
    """Whether a probe reads the behaviour, and more than the input gives away."""
    probe, question, accuracy = task.probe, "Can it be read?", task.probe.best.accuracy
    if not accuracy.known:
        return not_measured("read", question, task)
    # Of the two ways to read the input, the one that leaves least.
    kind = min(INPUTS, key=lambda k: np.nan_to_num(getattr(probe.best, f"minus_{k}").estimate, nan=math.inf))
    difference, alone = getattr(probe.best, f"minus_{kind}"), getattr(probe, kind)
    verdict = "A probe does not surely read it"
    if difference.sign > 0:
        verdict = "A probe reads it, beyond the input"
    elif accuracy.low > 0.5:
        verdict = (
            f"A probe reads it, {'but the input alone is better' if difference.sign else 'not surely beyond the input'}"
        )
    sentence = f"of test states are read right by a linear probe on {layers(probe.best.picked)}."
    note = f"95{NBSP}% interval: {interval(accuracy)}."
    if difference.known:
        note += f" That is {beyond(difference)} than from {RIVALS[kind]} ({percent(alone.estimate)})."
    shown = percent(accuracy.estimate)
    return Answer("read", question, verdict, shown, sentence, note, accuracy, (alone.estimate, RIVALS[kind]))


def _layers_panel(probe: Probe) -> Panel:
    lines = [
        Line("the state", probe.layers, probe.accuracy),
        Line("shuffled", probe.layers, probe.shuffled_by_layer, OTHER, DASHED, band=False, width=1.4),
        Line("input alone", probe.layers, [probe.input_only] * len(probe.layers), OTHER, width=1.4),
    ]
    return lines_panel("right, by layer", lines, chance=0.5, axis="percent")


def _rivals_panel(probe: Probe) -> Panel:
    """The probe with its layer chosen elsewhere, then all that it has to beat, as far as known."""
    found = {"the state": probe.best.accuracy, RIVALS["input_only"]: probe.input_only}
    found |= {RIVALS["input_repeats"]: probe.input_repeats, **{RIVALS[k]: probe.baselines[k] for k in UNCERTAINTIES}}
    known = [(name, value) for name, value in {**found, "shuffled labels": probe.shuffled}.items() if value.known]
    dots = [Dot(name, value, OTHER if number else INK, number > 0) for number, (name, value) in enumerate(known)]
    return dots_panel("right, by what it looks at", dots, reference=50)


def _offsets_panel(probe: Probe) -> Panel:
    offsets = sorted(probe.best_by_offset, key=int, reverse=True)
    places = range(len(offsets))
    lines = [Line("the state", places, [probe.best_by_offset[offset].accuracy for offset in offsets])]
    for name, alone, dash in (("input alone", probe.input_only, "-"), ("repeats", probe.input_repeats, DASHED)):
        lines.append(Line(name, places, [alone] * len(offsets), OTHER, dash, width=1.4, band=False))
    ticks = {float(place): f"{-int(offset)}" for place, offset in enumerate(offsets)}
    return lines_panel("how early", lines, "tokens from the decision", ticks=ticks, chance=0.5, axis="percent")


def _learning_panel(learning: Learning) -> Panel:
    keys = sorted(learning.accuracy, key=lambda key: learning.pairs[key])
    lines = [Line("", range(len(keys)), [learning.accuracy[key] for key in keys])]
    ticks = {float(place): f"{learning.pairs[key]:.0f}" for place, key in enumerate(keys)}
    return lines_panel("from how many pairs", lines, "fit pairs", ticks=ticks, chance=0.5, axis="percent")
