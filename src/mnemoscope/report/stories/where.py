"""Where it acts: single layers, neurons that are needed, and every setting of the sweep, over seeds if several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.drawing import DASHED, INK, MUTED, OTHER, TONE, Line, Panel, lines_panel
from mnemoscope.report.page import Answer, Chapter, Exhibit, View, not_measured
from mnemoscope.report.records import Cell
from mnemoscope.report.rows import Part, parts_of, scalar, shares
from mnemoscope.report.words import AIMS, DIRECTIONS, TOWARDS, Aim, Direction, argmax, percent
from mnemoscope.statistics import Estimate, mean, over_seeds, proportion

PAPERS = "nmd"  # the paper's own method
SETTING = ["direction", "method", "site", "layers", "top", "strength"]
STEERED, KEPT = ("shift", "stay", "other", "margin", "margin_sd"), ("kept",)


def measure(cell: Cell) -> dict[str, Any]:
    """Doses, words, other decoding, ablation and patching; empty where the records have none of it."""

    def measured(rows: pd.DataFrame) -> dict[str, Estimate]:
        return shares(rows, rows.direction.iloc[0])

    def dose(rows: pd.DataFrame) -> dict[str, Estimate]:
        return {**measured(rows), "margin": mean(rows.margin, rows.group, rows.draw)}

    def nested(what: str, keys: list[str], of: Callable[[pd.DataFrame], Any]) -> dict[str, Any]:
        """What ``of`` gives for every combination of the keys, as dictionaries within dictionaries."""
        tree: dict[str, Any] = {}
        rows = cell.effects[cell.effects.what == what]
        for values, part in rows.groupby(keys, observed=True, sort=True) if len(rows) else ():
            *way, last = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            place = tree
            for name in way:
                place = place.setdefault(name, {})
            place[last] = of(part)
        return tree

    def by_layer(rows: pd.DataFrame) -> list[dict[str, Estimate]]:
        layers = range(len(cell.contrast.nmd_LD))
        return [shares(rows[rows.layers == str(layer)], rows.direction.iloc[0]) for layer in layers]

    return {
        "dose": nested("dose", ["method", "direction", "role", "dose"], dose),
        "ablation": nested("ablation", ["method", "direction", "dose"], ablation),
        "patch": {direction: {} for direction in DIRECTIONS} | nested("patch", ["direction", "site"], by_layer),
        "prompt": nested("prompt", ["direction"], measured),
        "context_aware": nested("contrast", ["direction", "dose"], measured),
    }


def ablation(rows: pd.DataFrame) -> dict[str, Any]:
    """What is left of a pair's two sides while neurons are held at their mean, and beside it as many at random."""
    of_role = {role: rows[rows.role == role] for role in ("vector", "random_neurons")}
    tables = {role: _separations(part) for role, part in of_role.items()}
    found: dict[str, Any] = {}
    for role, table in tables.items():
        sides = {side: of_role[role][of_role[role].side == side] for side in ("generalized", "memorized")}
        found[role] = {key: mean(table[key], table.group) for key in ("before", "after", "lost")}
        found[role]["kept"] = {side: proportion(one.after == side, one.group, one.draw) for side, one in sides.items()}
    return found | {"minus_random": _beyond_random(tables["vector"], of_role["random_neurons"])}


def _beyond_random(ours: pd.DataFrame, random: pd.DataFrame) -> Estimate:
    """What is lost beyond random neurons, over pairs and draws; one draw says nothing of others and has no interval."""
    lost = _separations(random, "draw").lost.unstack("example").reindex(columns=ours.index)  # by draw and pair
    if lost.empty:
        return Estimate.undefined()
    each = np.broadcast_arrays(ours.lost - lost, ours.group, lost.index.to_numpy()[:, None])
    found = mean(*map(np.ravel, each))
    return found if len(lost) > 1 else replace(found, low=math.nan, high=math.nan)


def _separations(rows: pd.DataFrame, *apart: str) -> pd.DataFrame:
    """One row per pair, averaged over draws unless ``apart``: separation ``before`` and ``after``, ``lost``, the group.

    The separation is the margin of the generalized side minus that of the memorized one.
    """
    keys, sides = ["example", *apart], ("generalized", "memorized")
    first, second = (rows[rows.side == side].groupby(keys)[["margin_before", "margin"]].mean() for side in sides)
    table = (first - second).set_axis(["before", "after"], axis=1)
    groups = rows.drop_duplicates("example").set_index("example").group.reindex(table.index.get_level_values(0))
    return table.assign(lost=table.before - table.after, group=groups.to_numpy())


def measure_sweep(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row per setting and list of examples, over the ``seeds`` that tried it; no interval within a seed."""
    # A place that both aims try has one row for each; they are the same.
    tables, keys = [cell.sweep.drop_duplicates([*SETTING, "examples"]) for cell in cells], [*SETTING, "examples"]
    rows = []
    for values, part in pd.concat(tables).groupby(keys, sort=True, observed=True):
        row: dict[str, Any] = {key: scalar(value) for key, value in zip(keys, values, strict=True)}
        for key in STEERED if row["examples"] in AIMS else KEPT:
            each = zip(part[key], part.n, strict=True)
            row[key] = over_seeds([Estimate(float(x), math.nan, math.nan, int(n)) for x, n in each])
        rows.append({**row, "seeds": len(part)})
    return rows


def measure_layers(sweep: Sequence[dict[str, Any]], contrast: Part, aim: Aim) -> dict[str, Any]:
    """Where the difference is, layer by layer, beside where a shift of one layer acts, at one strength for all.

    Of the strengths that every method tried on single layers, at every site where it tried any, that which steers most
    pairs, or conflicts where these are aimed at, on average is shown; of the shares of neurons, for each layer that
    which steers most.
    """
    shift = {}
    for direction in DIRECTIONS:
        rows = single_layers(sweep, direction, aim)
        places, tried = {(row.method, row.site) for row in rows}, {}
        for strength in dict.fromkeys(row.strength for row in rows):
            part = [row for row in rows if row.strength == strength]
            if {(row.method, row.site) for row in part} == places:
                tried[strength] = sum(row.shift.estimate for row in part) / len(part)
        strength = max(tried, key=lambda strength: tried[strength], default=math.nan)
        methods: dict[str, dict[str, list[Estimate]]] = {}
        for method, site in dict.fromkeys((row.method, row.site) for row in rows if row.strength == strength):
            of = [row for row in rows if (row.method, row.site, row.strength) == (method, site, strength)]
            by_layer = ([row.shift for row in of if int(row.layers) == layer] for layer in contrast.layers)
            best = [max(found, key=lambda s: s.estimate, default=Estimate.undefined()) for found in by_layer]
            methods.setdefault(method, {})[site] = best
        shift[direction] = {"strength": strength, "methods": methods}
    return {key: contrast[key] for key in ("layers", "mean_abs_nmd", "max_abs_rho")} | {"shift": shift}


def single_layers(sweep: Sequence[dict[str, Any]], direction: Direction, aim: Aim) -> list[Part]:
    """What single layers do to the tune list of an aim: the settings, and the ``shift`` of each."""
    rows: list[Part] = parts_of(list(sweep))
    return [row for row in rows if (row.direction, row.examples) == (direction, aim) and row.layers.isdigit()]


def chapter(view: View) -> Chapter:
    """Layers, needed neurons; the sweep is folded."""
    task, by_layer, to = view.task, view.task.by_layer, TOWARDS[view.task.documents]
    if argmax(by_layer.max_abs_rho) is None:
        return Chapter(answer(task))
    differs = {"strongest |rho|": by_layer.max_abs_rho, "mean |NMD|": by_layer.mean_abs_nmd}
    panels = [lines_panel(name, [Line("", by_layer.layers, values, fill=True)]) for name, values in differs.items()]
    acts = [d for d in DIRECTIONS if by_layer.shift[d].methods or task.patch.get(d, {}).get("block")]
    panels += [_acts_panel(task, direction) for direction in acts]
    held = {d: task.ablation.get(block.chosen.method, {}).get(d) for d, block in task.steering.items()}
    texts = [_needed(found, to[direction]) for direction, found in held.items() if found]
    ablated = [_ablation_panel(found, direction) for direction, found in held.items() if found]
    return Chapter(answer(task), [Exhibit("depth", panels), Exhibit("ablation", ablated, texts)])


def answer(task: Part) -> Answer:
    """The layer that steers most pairs by itself, of all that were tried alone, beside where |rho| is largest."""
    question, shows = "Where does it act?", argmax(task.by_layer.max_abs_rho)
    if shows is None:
        return not_measured("where", question, task)
    best: dict[Direction, Part] = {}
    alone = set[str]()
    for direction in DIRECTIONS:
        rows = [row for row in single_layers(task.sweep, direction, task.aim) if row.shift.known]
        best |= {direction: max(rows, key=lambda row: row.shift.estimate)} if rows else {}
        alone |= {row.layers for row in rows}
    if not best:
        return Answer("where", question, "In several layers together", sentence="No single layer was tried.")
    found, what = [], "pairs" if task.aim == "pairs" else "conflicts"
    for d, row in best.items():
        how = f"{TOWARDS[task.documents][d]} by layer {row.layers} alone ({row.method}, strength {row.strength:g})"
        found.append((percent(row.shift.estimate), f"of tune {what} are steered {how}."))
    layers = {row.layers for row in best.values()}
    verdict = f"Most in layer {layers.pop()}" if len(layers) == 1 else "In another layer for each direction"
    if len(alone) < len(task.by_layer.layers):
        verdict = f"{len(alone)} of {len(task.by_layer.layers)} layers were tried alone"
    notes = [*(" ".join(each) for each in found[1:]), f"|rho| is largest in layer {shows}."]
    return Answer("where", question, verdict, *found[0], " ".join(notes))


def _acts_panel(task: Part, direction: Direction) -> Panel:
    """Each method at the site at which one layer alone steers most; the others are in ``results.json``."""
    layers, lines = task.by_layer.layers, []
    for method, sites in task.by_layer.shift[direction].methods.items():
        site = max(sites, key=lambda s: max(np.nan_to_num(shift.estimate, nan=-1.0) for shift in sites[s]))
        tone = INK if method == PAPERS else OTHER
        tone = TONE[direction] if method == task.steering[direction].chosen.method else tone
        lines.append(Line(method if len(sites) == 1 else f"{method}, {site}", layers, sites[site], tone, band=False))
    if patched := task.patch.get(direction, {}).get("block"):
        lines.append(Line("state put in", layers, [s.shift for s in patched], MUTED, DASHED, 1.4, band=False))
    return lines_panel(direction, lines, "acts: layer", axis="share")


def _needed(found: dict[str, Part], towards: str) -> str:
    """Whether the neurons are needed more than random ones, at the largest share that was held."""
    known = [top for top in sorted(found, key=float) if found[top].minus_random.known]
    if not known:
        return ""
    one, beyond = found[known[-1]].vector, found[known[-1]].minus_random
    verdict = {1: "needed", -1: "needed less than random ones", 0: "not surely needed more than random ones"}
    return (
        f"{towards.capitalize()}: {verdict[beyond.sign]}. Holding {100 * float(known[-1]):g}\u00a0% takes "
        f"{one.lost.estimate:.1f} of {one.before.estimate:.1f} nats, {beyond.estimate:+.1f} ({beyond.low:.1f} to "
        f"{beyond.high:.1f}) against random neurons."
    )


def _ablation_panel(found: dict[str, Part], direction: Direction) -> Panel:
    x = sorted(found, key=float)
    before, places = found[x[0]].vector.before, [0.0, *(100 * float(top) for top in x)]
    lines = [
        Line(name, places, [before, *(found[top][role].after for top in x)], tone)
        for name, role, tone in (("its neurons", "vector", TONE[direction]), ("random", "random_neurons", OTHER))
    ]
    ticks = {place: f"{place:g} %" for place in places}
    return lines_panel(direction, lines, "neurons held", "separation, nats", ticks, chance=0)
