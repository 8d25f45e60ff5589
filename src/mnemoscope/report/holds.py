"""Does it hold up: on what was held out, in halves of the pairs, from seed to seed, from task to task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report import drawing
from mnemoscope.report.drawing import DASHED, INK, MUTED, OTHER, TONE, Dot, Line, Panel, dots_panel
from mnemoscope.report.page import TOO_FEW, Answer, Chapter, Exhibit, Table, View, not_measured
from mnemoscope.report.records import Cell, Run
from mnemoscope.report.schema import DIRECTIONS, Halves, SeedsRow, TaskResults, Transfer
from mnemoscope.report.words import NBSP, TOWARDS, listed, percent, ranged
from mnemoscope.statistics import LEAST_GROUPS, Estimate, mean_with_range, over_seeds, proportion

MEASURE = ["site", "shared_initialization", "what", "layer", "top"]
ALL = -1  # the layer of what belongs to all together


def measure_halves(cell: Cell) -> Halves:
    """How alike the contrasts of two halves of the fit pairs are; the mean over halvings, with their range."""
    layers, of = range(len(cell.contrast.nmd_LD)), dict(iter(cell.halves.groupby("what")))
    cosine, rank, overlap, in_layers = (
        of.get(what, cell.halves[:0]) for what in ("nmd_cosine", "rho_rank_correlation", "overlap", "overlap_in_layers")
    )
    found = {
        f"{top:g}": {
            "share": mean_with_range(part.value),
            "chance": _chance(part, int(part.n.max())),
            "chance_in_layers": _chance(within := in_layers[in_layers.top == top], int(within.n.max())),
        }
        for top, part in overlap.groupby("top")
    }
    return Halves(
        halvings=int(cell.halves.halving.nunique()),
        rho_rank_correlation=[mean_with_range(rank.value[rank.layer == layer]) for layer in layers],
        nmd_cosine=[mean_with_range(cosine.value[cosine.layer == layer]) for layer in layers],
        nmd_cosine_all=mean_with_range(cosine.value[cosine.layer == ALL]),
        overlap=found,
    )


def _chance(rows: pd.DataFrame, n: int) -> Estimate:
    """A permutation distribution: its mean and its 95 % interval, averaged over halvings or twos of seeds."""
    chance, low, high = (float(rows[key].mean()) for key in ("chance", "chance_low", "chance_high"))
    return Estimate(chance, low, high, n)


def measure_seeds(run: Run) -> dict[str, list[SeedsRow]]:
    """By label: how alike each two seeds are, beside what it would be by chance; the mean and the range of all twos."""
    if run.seeds is None:
        return {}
    found: dict[str, list[SeedsRow]] = {}
    for label, rows in run.seeds.groupby("label", sort=True):
        for values, part in rows.groupby(MEASURE, dropna=False, sort=True):
            facts: dict[str, Any] = dict(zip(MEASURE, values, strict=True))
            numbers = {"value": mean_with_range(part.value), "chance": _chance(part, len(part)), "twos": len(part)}
            found.setdefault(str(label), []).append(SeedsRow(**facts, **numbers))
    return found


def measure_transfer(run: Run, layers: dict[tuple[str, int], int]) -> dict[str, dict[str, Transfer]]:
    """By source and target: shift of the source's vectors on the target's pairs, and accuracy of its probes there, by
    label and seed at the layer that reads the tune split best (``layers``).
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if run.transfer_steering is not None:
        for (source, target), rows in run.transfer_steering.groupby(["source", "target"], observed=True, sort=True):
            found[str(source), str(target)] = {
                direction: {
                    str(method): {
                        name: _by_seed(part[part.role == role], part.after == DIRECTIONS[direction][0], draws=True)
                        for name, role in (("shift", "vector"), ("gaussian", "gaussian"))
                    }
                    for method, part in rows[rows.direction == direction].groupby("method", observed=True, sort=True)
                }
                for direction in DIRECTIONS
            }
    if run.transfer_probes is not None:
        for (source, target), rows in run.transfer_probes.groupby(["source", "target"], sort=True):
            found.setdefault((str(source), str(target)), {}).update(_probes(rows, layers))
    tree: dict[str, dict[str, Transfer]] = {}
    for (source, target), numbers in found.items():
        tree.setdefault(source, {})[target] = Transfer(**numbers)
    return tree


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


def answer(task: TaskResults, seeds: list[SeedsRow]) -> Answer:
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


def seed_rows(seeds: list[SeedsRow], what: str) -> list[SeedsRow]:
    """Rows of one measure between seeds; where some seeds began alike and some did not, those that began alike."""
    rows = [row for row in seeds if row.what == what]
    return [row for row in rows if row.shared_initialization] or rows


def overlaps(task: TaskResults, seeds: list[SeedsRow]) -> list[Found]:
    """Overlap of the strongest neurons, between halves of the pairs and between seeds, as far as known.

    Beside what it would be by chance within layers: where two sets prefer the same layers, they share neurons by that.
    """
    halves = task.consistency["halves"].overlap
    found: list[Found] = [
        ("halves", float(top), each["share"], each["chance_in_layers"]) for top, each in halves.items()
    ]
    within = seed_rows(seeds, "overlap_in_layers") or seed_rows(seeds, "overlap")  # records of version 0.1
    found += [("seeds", row.top, row.value, row.chance) for row in within]
    return sorted((entry for entry in found if entry[2].known), key=lambda entry: (entry[1], entry[0]))


def _likeness_panel(task: TaskResults, seeds: list[SeedsRow]) -> Panel:
    """Rank correlation of rho by layer, and what two seeds share beside chance."""
    lines = [Line("halves", task.contrast.layers, task.consistency["halves"].rho_rank_correlation)]
    for name, what, dash in (("seeds", "rank_correlation", DASHED), ("aligned", "aligned_cosine", drawing.DOTTED)):
        rows = sorted((row for row in seed_rows(seeds, what) if row.layer >= 0), key=lambda row: row.layer)
        if rows:
            layers = [row.layer for row in rows]
            lines.append(Line(name, layers, [row.value for row in rows], MUTED, dash))
            lines.append(Line("", layers, [row.chance for row in rows], OTHER, width=0))
    return drawing.lines_panel("likeness by layer", lines, chance=0)


def transfer(matrix: dict[str, dict[str, Transfer]]) -> Table | None:
    """What vectors and probes of each task do on pairs of each; None without a second task."""
    rows = []
    for source, target, found in ((s, t, found) for s, targets in matrix.items() for t, found in targets.items()):
        row = [f"{source} on {target}"]
        for by_method in (found.to_generalized, found.to_memorized):
            carried = by_method["best" if "best" in by_method else min(by_method)] if by_method else {}
            row.append(" / ".join(ranged(share) for share in carried.values()))
        rows.append([*row, ranged(found.probe) if found.probe else ""])
    columns = ["", *(f"steered {towards} / Gaussian" for towards in TOWARDS.values()), "probe right"]
    return Table("Learned on one task, tried on another of the same model", columns, rows) if rows else None
