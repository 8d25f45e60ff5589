"""Can the behaviour be read: probes on states beside all that they have to beat, how early, and from how few pairs.

Shapes: N rows of a table (test states), L layers.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.drawing import DASHED, OTHER, Line, Panel, against, dots_panel, lines_panel
from mnemoscope.report.page import TOO_FEW, Answer, Chapter, Exhibit, View, not_measured
from mnemoscope.report.records import Cell
from mnemoscope.report.rows import Part, drawn
from mnemoscope.report.words import NBSP, RIVALS, argmax, beyond, interval, layers, percent
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import Estimate, auroc, mean, mean_with_range, proportion

INPUTS = ("input_only", "input_repeats")
UNCERTAINTIES = ("entropy", "top_gap")
ALL = -1  # the layer of what belongs to none, or to all together


def measure(cell: Cell) -> dict[str, Any]:
    """What a linear probe reads from each layer and position, beside what it has to beat; and of fewer pairs."""
    return {"probe": _measure_probe(cell), "learning": drawn(_measure_learning(cell.learning))}


def _measure_probe(cell: Cell) -> dict[str, Any]:
    rows, layers_L = cell.probes, list(range(len(cell.contrast.nmd_LD)))
    alone = {kind: rows[rows.kind == kind] for kind in (*INPUTS, *UNCERTAINTIES)}
    shuffled, state = rows[rows.kind == "shuffled"], rows[rows.kind == "state"]
    offsets = sorted({0, *state.offset.unique().tolist()})  # the decision position is always there, even without a row
    states = {k: [state[(state.layer == n) & (state.offset == k)] for n in layers_L] for k in offsets}
    named = {f"layer {n}, offset {k}": part for k, found in states.items() for n, part in enumerate(found)}
    for what, part in (named | {repr(kind): part for kind, part in alone.items()}).items():
        # Differences are taken state by state, so all must list the same states in the same order.
        if not all(np.array_equal(part[column], alone["input_only"][column]) for column in ("group", "label")):
            path = cell.folder / "records" / "probes.parquet"
            raise InputError(f"{path}: the states of {what} are not those of 'input_only'")
    accuracy, areas = (
        {str(offset): [score(part) for part in found] for offset, found in states.items()}
        for score in (_accuracy, _ranking)
    )
    best = {str(offset): _cross_fitted(found, alone) for offset, found in states.items()}
    inputs, uncertainties = (
        {kind: _accuracy(alone[kind]) for kind in kinds} | {f"{kind}_auroc": _ranking(alone[kind]) for kind in kinds}
        for kinds in (INPUTS, UNCERTAINTIES)
    )
    minus = {
        f"minus_{kind}": [mean(_right(part) - _right(alone[kind]), part.group) for part in states[0]] for kind in INPUTS
    }
    return {
        "site": cell.contrast.site,
        "layers": layers_L,
        "accuracy": accuracy["0"],
        "auroc": areas["0"],
        "best": best["0"],
        **inputs,
        "baselines": uncertainties,
        "shuffled": _accuracy(shuffled),
        "shuffled_by_layer": [_accuracy(shuffled[shuffled.layer == n]) for n in layers_L],
        **minus,
        "offsets": offsets,
        "accuracy_by_offset": accuracy,
        "auroc_by_offset": areas,
        "best_by_offset": best,
    }


def _right(rows: pd.DataFrame) -> np.ndarray:
    """1.0 where the sign of the score names the behaviour, else 0.0, shape (N,)."""
    return ((rows.score.to_numpy() > 0) == (rows.label.to_numpy() == 1)).astype(np.float64)


def _accuracy(rows: pd.DataFrame) -> Estimate:
    """Over draws too, which only shuffled labels have."""
    return proportion(_right(rows), rows.group, rows.draw if rows.draw.notna().any() else None)


def _ranking(rows: pd.DataFrame) -> Estimate:
    return auroc(rows.score, rows.label, rows.group)


def _cross_fitted(states: list[pd.DataFrame], alone: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Accuracy at the best layer, without choosing it on what it is scored on, and its difference to each baseline.

    The test groups are cut into two halves; each half is scored at the layer that is best in the other half.
    """
    groups_N = alone["input_only"].group.to_numpy()
    scored_N, picked = np.full(len(groups_N), np.nan), set[int]()
    right_LN = np.stack([_right(rows) for rows in states])
    half_N = np.array([zlib.crc32(str(group).encode()) % 2 for group in groups_N])
    for half in (0, 1):
        elsewhere = half_N != half
        if elsewhere.any():
            pick = int(right_LN[:, elsewhere].mean(axis=1).argmax())
            scored_N[half_N == half] = right_LN[pick, half_N == half]
            picked.add(pick)
    minus = {f"minus_{kind}": mean(scored_N - _right(rows), groups_N) for kind, rows in alone.items()}
    return {"picked": sorted(picked), "accuracy": proportion(scored_N, groups_N), **minus}


def _measure_learning(rows: pd.DataFrame) -> dict[str, Any]:
    """What fewer fit pairs give; each number the mean over its draws, with their range."""
    sizes = sorted(rows.pairs.unique().tolist())
    keys = {size: "all" if size == sizes[-1] else str(size) for size in sizes}
    scored, cosine = rows[rows.what == "accuracy"], rows[rows.what == "nmd_cosine"]
    curves = {"accuracy": scored, "nmd_cosine": cosine[cosine.layer == ALL]}
    curves["nmd_cosine_at_layer"] = cosine[cosine.layer != ALL]
    return {
        "picked": sorted(scored.layer.unique().tolist()),
        "pairs": {keys[size]: float(size) for size in sizes},
        **{
            what: {keys[size]: mean_with_range(part.value[part.pairs == size]) for size in sizes}
            for what, part in curves.items()
        },
    }


def verdicts(probe: Part) -> dict[str, Any]:
    """Whether the best layer beats the input, and the earliest offset at which more is known; later ones may know less.

    Surely: by the intervals of all seeds together, or of one.
    """
    above = {"chance": [offset for offset, best in probe.best_by_offset.items() if best.accuracy.low > 0.5]}
    for kind in INPUTS:
        above[kind] = [k for k, best in probe.best_by_offset.items() if best[f"minus_{kind}"].low > 0]
    beats = {f"beats_{kind}": {1: "yes", -1: "no", 0: "unclear"}[probe.best[f"minus_{kind}"].sign] for kind in INPUTS}
    return beats | {"known_from": {what: max(map(float, known), default=math.nan) for what, known in above.items()}}


def chapter(view: View) -> Chapter:
    """The probe by layer, beside its rivals, by position and by number of pairs."""
    probe, learning = view.task.probe, view.task.learning
    if argmax(entry.estimate for entry in probe.accuracy) is None:
        return Chapter(answer(view.task))
    alone = [probe.input_only] * len(probe.layers)
    lines = [
        Line("the state", probe.layers, probe.accuracy),
        Line("shuffled", probe.layers, probe.shuffled_by_layer, OTHER, DASHED, band=False, width=1.4),
        Line("input alone", probe.layers, alone, OTHER, width=1.4),
    ]
    # Its layer chosen elsewhere, the probe beside all that it has to beat.
    rivals = {"the state": probe.best.accuracy, **{RIVALS[kind]: probe[kind] for kind in INPUTS}}
    rivals |= {RIVALS[kind]: probe.baselines[kind] for kind in UNCERTAINTIES} | {"shuffled labels": probe.shuffled}
    panels = [lines_panel("right, by layer", lines, chance=0.5, axis="percent")]
    panels.append(dots_panel("right, by what it looks at", against("the state", rivals), reference=50))
    panels += [_offsets_panel(probe)] if len(probe.best_by_offset) > 1 else []
    if len(learning.accuracy) > 1:
        keys = sorted(learning.accuracy, key=lambda key: learning.pairs[key])
        line = Line("", range(len(keys)), [learning.accuracy[key] for key in keys])
        ticks = dict(enumerate(f"{learning.pairs[key]:.0f}" for key in keys))
        panels.append(lines_panel("from how many pairs", [line], "fit pairs", ticks=ticks, chance=0.5, axis="percent"))
    return Chapter(answer(view.task), [Exhibit("probe", panels)])


def _offsets_panel(probe: Part) -> Panel:
    offsets = sorted(probe.best_by_offset, key=int, reverse=True)
    places = range(len(offsets))
    lines = [Line("the state", places, [probe.best_by_offset[offset].accuracy for offset in offsets])]
    for name, alone, dash in (("input alone", probe.input_only, "-"), ("repeats", probe.input_repeats, DASHED)):
        lines.append(Line(name, places, [alone] * len(offsets), OTHER, dash, width=1.4, band=False))
    ticks = dict(enumerate(f"{-int(offset)}" for offset in offsets))
    return lines_panel("how early", lines, "tokens from the decision", ticks=ticks, chance=0.5, axis="percent")


def answer(task: Part) -> Answer:
    """Whether a probe reads the behaviour, and more than the input gives away."""
    probe, question, accuracy = task.probe, "Can it be read?", task.probe.best.accuracy
    if not accuracy.known:
        return not_measured("read", question, task)
    # Of the two ways to read the input, the one beyond which the best layer reads least.
    kind = min(INPUTS, key=lambda kind: np.nan_to_num(probe.best[f"minus_{kind}"].estimate, nan=math.inf))
    difference, alone = probe.best[f"minus_{kind}"], probe[kind]
    beyond_input = {1: "beyond the input", 0: "not surely beyond the input", -1: "but the input alone is better"}
    reads = difference.sign > 0 or accuracy.low > 0.5
    verdict = f"A probe reads it, {beyond_input[difference.sign]}" if reads else "A probe does not surely read it"
    verdict = TOO_FEW if accuracy.too_few else verdict
    sentence = f"of test states are read right by a linear probe on {layers(probe.best.picked)}."
    note = f"95{NBSP}% interval: {interval(accuracy)}."
    if difference.known:
        note += f" That is {beyond(difference)} than from {RIVALS[kind]} ({percent(alone.estimate)})."
    shown = percent(accuracy.estimate)
    return Answer("read", question, verdict, shown, sentence, note, accuracy, (alone.estimate, RIVALS[kind]))
