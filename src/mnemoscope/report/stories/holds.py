"""Does it hold up: on what was held out, in halves of the pairs, from seed to seed, from task to task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report import drawing
from mnemoscope.report.drawing import DASHED, INK, MUTED, OTHER, TONE, Dot, Line, Panel, dots_panel
from mnemoscope.report.page import TOO_FEW, Answer, Chapter, Exhibit, Table, View, not_measured
from mnemoscope.report.records import Cell, Run
from mnemoscope.report.rows import Part, drawn, scalar
from mnemoscope.report.words import DIRECTIONS, NBSP, Direction, listed, percent, ranged
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import LEAST_GROUPS, Estimate, mean_with_range, over_seeds, proportion

MEASURE = ["site", "shared_initialization", "what", "layer", "top"]
ALL = -1  # the layer of what belongs to all together


def measure(cell: Cell) -> dict[str, Any]:
    """How alike the contrasts of two halves of the fit pairs are; the mean over halvings, with their range."""
    layers, rows = range(len(cell.contrast.nmd_LD)), cell.halves

    def value(what: str, layer: int) -> Estimate:
        return mean_with_range(rows.value[(rows.what == what) & (rows.layer == layer)])

    overlap = {}
    for top in sorted(rows.top[rows.what == "overlap"].unique().tolist()):
        part, within = (rows[(rows.what == what) & (rows.top == top)] for what in ("overlap", "overlap_in_layers"))
        overlap[f"{top:g}"] = {
            "share": mean_with_range(part.value),
            "chance": _chance(part, int(part.n.max())),
            "chance_in_layers": _chance(within, int(within.n.max())),
        }
    found = {
        "halvings": int(rows.halving.nunique()),
        "rho_rank_correlation": [value("rho_rank_correlation", layer) for layer in layers],
        "nmd_cosine": [value("nmd_cosine", layer) for layer in layers],
        "nmd_cosine_all": value("nmd_cosine", ALL),
        "overlap": overlap,
    }
    return {"consistency": {"halves": drawn(found)}}


def _chance(rows: pd.DataFrame, n: int) -> Estimate:
    """A permutation distribution: its mean and its 95 % interval, averaged over halvings or twos of seeds."""
    chance, low, high = (float(rows[key].mean()) for key in ("chance", "chance_low", "chance_high"))
    return Estimate(chance, low, high, n)


def measure_seeds(run: Run) -> dict[str, list[dict[str, Any]]]:
    """By label: how alike each two seeds are, beside what it would be by chance; the mean and the range of all twos."""
    found: dict[str, list[dict[str, Any]]] = {}
    if run.seeds is not None:
        for (label, *values), part in run.seeds.groupby(["label", *MEASURE], dropna=False, sort=True):
            facts = {key: scalar(value) for key, value in zip(MEASURE, values, strict=True)}
            numbers = {"value": mean_with_range(part.value), "chance": _chance(part, len(part)), "twos": len(part)}
            found.setdefault(str(label), []).append(facts | numbers)
    return found


def measure_transfer(run: Run, layers: dict[tuple[str, int], int]) -> dict[str, dict[str, Any]]:
    """By source and target: shift of the source's vectors on the target's pairs, and accuracy of its probes there, by
    label and seed at the layer that reads the tune split best (``layers``).
    """
    tree: dict[str, dict[str, Any]] = {}
    if run.transfer_steering is not None:
        for (source, target), rows in run.transfer_steering.groupby(["source", "target"], observed=True, sort=True):
            tree.setdefault(str(source), {})[str(target)] = {d: _carried(rows, d) for d in DIRECTIONS}
    if run.transfer_probes is not None:
        for (source, target), rows in run.transfer_probes.groupby(["source", "target"], sort=True):
            tree.setdefault(str(source), {}).setdefault(str(target), {}).update(_probes(rows, layers))
    return tree


def _carried(rows: pd.DataFrame, direction: Direction) -> dict[str, Any]:
    """By method what its vector shifts, and what Gaussian shifts do."""
    found = {}
    for method, of in rows[rows.direction == direction].groupby("method", observed=True, sort=True):
        parts = {name: of[of.role == role] for name, role in (("shift", "vector"), ("gaussian", "gaussian"))}
        found[str(method)] = {
            name: _by_seed(part, part.after == Toward.of(direction), draws=True) for name, part in parts.items()
        }
    return found


def _probes(rows: pd.DataFrame, layers: dict[tuple[str, int], int]) -> dict[str, Any]:
    """Accuracy by layer, and at each seed's layer that reads best on tune where the probe comes from."""
    right_N = (rows.score > 0) == (rows.label == 1)
    chosen_N = np.array([layers.get(key, -1) for key in zip(rows.source.astype(str), rows.seed, strict=True)])
    best = rows[rows.layer.to_numpy() == chosen_N]
    return {
        "probe": _by_seed(best, right_N),
        "probe_layer": float(best.groupby("seed").layer.first().mean()),
        "probe_by_layer": [_by_seed(rows[rows.layer == layer], right_N) for layer in sorted(rows.layer.unique())],
    }


def _by_seed(rows: pd.DataFrame, hits: pd.Series, draws: bool = False) -> Estimate:
    """Mean over seeds of the share of rows that are hits; undefined without a row. ``draws``: their column counts."""
    by_seed = rows.groupby(["source", "seed"], observed=True)
    return over_seeds(
        [proportion(hits[part.index], part.group, part.draw if draws else None) for (source, seed), part in by_seed]
    )


Found = tuple[str, float, Estimate, Estimate]  # between what, share of neurons, overlap, overlap by chance


def chapter(view: View) -> Chapter:
    """What was held out, then halves and seeds."""
    task, seeds = view.task, view.seeds
    held_out = []
    for direction, block in task.steering.items():
        dots = [Dot("as fitted", block.pairs.shift, TONE[direction])]
        held = {name: each.shift for name, each in block.held_out.items() if each.shift.known}
        dots += [Dot(f"another {name}", shift, TONE[direction], True) for name, shift in held.items()]
        held_out += [dots_panel(direction, dots)] if held else []
    exhibits, found = [Exhibit("held-out", held_out)], overlaps(task, seeds)
    if found:
        dots = [
            Dot(f"top {100 * top:g} %, {between}", value, INK, between == "seeds", mark=chance.estimate)
            for between, top, value, chance in found
        ]
        panels = [dots_panel("same neurons found again", dots), _likeness_panel(task, seeds)]
        exhibits.append(Exhibit("steady", panels))
    return Chapter(answer(task, seeds), exhibits)


def answer(task: Part, seeds: list[Part]) -> Answer:
    """Whether the same neurons are found again: between seeds where there are several, else between halves."""
    question, found, texts, again = "Does it hold up?", overlaps(task, seeds), [], []
    for between, words in (("seeds", "two seeds"), ("halves", "two halves of the fit pairs")):
        for _, top, share, chance in [entry for entry in found if entry[0] == between][:1]:
            text = f"of their top {100 * top:g}{NBSP}% of neurons by |rho| are the same in {words}"
            by_chance = f"{percent(chance.estimate)}, up to {percent(chance.high)}"
            texts.append((percent(share.estimate), f"{text}; by chance, in the same layers, {by_chance}."))
            again += [between] if share.estimate > chance.high else []
    if not texts:
        return not_measured("holds", question, task)
    verdict = f"The same neurons again, between {listed(again)}" if again else "Not the same neurons again"
    verdict = TOO_FEW if task.contrast.groups < LEAST_GROUPS else verdict
    notes = [f"{number} {text}" for number, text in texts[1:]]
    if rows := seed_rows(seeds, "rank_correlation"):
        notes.append(f"The seeds began with {'the same' if rows[0].shared_initialization else 'different'} weights.")
    return Answer("holds", question, verdict, *texts[0], " ".join(notes))


def seed_rows(seeds: list[Part], what: str) -> list[Part]:
    """Rows of one measure between seeds; where some seeds began alike and some did not, those that began alike."""
    rows = [row for row in seeds if row.what == what]
    return [row for row in rows if row.shared_initialization] or rows


def overlaps(task: Part, seeds: list[Part]) -> list[Found]:
    """Overlap of the strongest neurons, between halves of the pairs and between seeds, as far as known.

    Beside what it would be by chance within layers: where two sets prefer the same layers, they share neurons by that.
    """
    halves = task.consistency["halves"].overlap
    found: list[Found] = [
        ("halves", float(top), each["share"], each["chance_in_layers"]) for top, each in halves.items()
    ]
    found += [("seeds", row.top, row.value, row.chance) for row in seed_rows(seeds, "overlap_in_layers")]
    return sorted((entry for entry in found if entry[2].known), key=lambda entry: (entry[1], entry[0]))


def _likeness_panel(task: Part, seeds: list[Part]) -> Panel:
    """Rank correlation of rho by layer, and what two seeds share beside chance."""
    lines = [Line("halves", task.contrast.layers, task.consistency["halves"].rho_rank_correlation)]
    for name, what, dash in (("seeds", "rank_correlation", DASHED), ("aligned", "aligned_cosine", drawing.DOTTED)):
        rows = sorted((row for row in seed_rows(seeds, what) if row.layer >= 0), key=lambda row: row.layer)
        if rows:
            layers = [row.layer for row in rows]
            lines.append(Line(name, layers, [row.value for row in rows], MUTED, dash))
            lines.append(Line("", layers, [row.chance for row in rows], OTHER, width=0))
    return drawing.lines_panel("likeness by layer", lines, chance=0)


def transfer(matrix: dict[str, dict[str, Part]]) -> Table | None:
    """What vectors and probes of each task do on pairs of each; None without a second task."""
    rows = []
    for source, target, found in ((s, t, found) for s, targets in matrix.items() for t, found in targets.items()):
        row = [f"{source} on {target}"]
        for by_method in (found.get(direction) for direction in DIRECTIONS):
            carried = by_method["best" if "best" in by_method else min(by_method)] if by_method else {}
            row.append(" / ".join(ranged(share) for share in carried.values()))
        rows.append([*row, ranged(found["probe"]) if "probe" in found else ""])
    columns = ["", *(f"steered to {toward} / Gaussian" for toward in Toward), "probe right"]
    return Table("Learned on one task, tried on another of the same model", columns, rows) if rows else None
