"""Does it hold up: on what was held out, in halves of the pairs, from seed to seed, from task to task."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report import drawing
from mnemoscope.report.drawing import DASHED, INK, MUTED, OTHER, TONE, Dot, Line, Panel, dots_panel
from mnemoscope.report.intervals import shared_mean
from mnemoscope.report.page import Answer, Chapter, Exhibit, Table, View, not_measured
from mnemoscope.report.records import Cell, Run
from mnemoscope.report.schema import DIRECTIONS, Direction, Halves, SeedsRow, Steered, TaskResults, Transfer
from mnemoscope.report.words import NBSP, TOWARDS, listed, percent, ranged
from mnemoscope.statistics import Estimate, mean_with_range, over_seeds

MEASURE = ["site", "shared_initialization", "what", "layer", "top"]
ALL = -1  # the layer of what belongs to all together


def measure_halves(cell: Cell) -> Halves:
    """How alike the contrasts of two halves of the fit pairs are; the mean over halvings, with their range."""
    rows, layers = cell.halves, range(len(cell.contrast.nmd_LD))

    def of(what: str) -> pd.DataFrame:
        return rows[rows.what == what]

    cosine, overlap, in_layers = of("nmd_cosine"), of("overlap"), of("overlap_in_layers")
    by_layer = {
        what: [mean_with_range(part.value[part.layer == layer]) for layer in layers]
        for what, part in (("rho_rank_correlation", of("rho_rank_correlation")), ("nmd_cosine", cosine))
    }
    found = {
        f"{top:g}": {
            "share": mean_with_range(overlap.value[overlap.top == top]),
            "chance": _chance(overlap[overlap.top == top]),
            "chance_in_layers": _chance(in_layers[in_layers.top == top]),
        }
        for top in sorted(overlap.top.unique())
    }
    together = mean_with_range(cosine.value[cosine.layer == ALL])
    return Halves(halvings=int(rows.halving.nunique()), **by_layer, nmd_cosine_all=together, overlap=found)


def _chance(rows: pd.DataFrame) -> Estimate:
    """The permutation distribution of an overlap: its mean and its 95 % interval, averaged over halvings."""
    chance, low, high = (float(rows[key].mean()) for key in ("chance", "chance_low", "chance_high"))
    return Estimate(chance, low, high, int(rows.n.max()))


def measure_seeds(run: Run) -> dict[str, list[SeedsRow]]:
    """By label: how alike each two seeds are, beside what it would be by chance; the mean and the range of all twos."""
    if run.seeds is None:
        return {}
    found: dict[str, list[SeedsRow]] = {}
    for label, rows in run.seeds.groupby("label", sort=True):
        for values, part in rows.groupby(MEASURE, dropna=False, sort=True):
            facts: dict[str, Any] = dict(zip(MEASURE, values, strict=True))
            low, middle, high = (float(part[key].mean()) for key in ("chance_low", "chance", "chance_high"))
            by_chance, value = Estimate(middle, low, high, len(part)), mean_with_range(part.value)
            row = SeedsRow(**facts, value=value, chance=by_chance, twos=len(part))
            found.setdefault(str(label), []).append(row)
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
                        name: _by_seed(part[part.role == role], partial(_hits, direction=direction))
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

    def right(part: pd.DataFrame) -> Any:
        return (part.score > 0) == (part.label == 1)

    chosen_N = np.array([layers.get(key, -1) for key in zip(rows.source.astype(str), rows.seed, strict=True)])
    best = rows[rows.layer.to_numpy() == chosen_N]
    return {
        "probe": _by_seed(best, right) if len(best) else Estimate.undefined(),
        "probe_layer": float(best.groupby("seed").layer.first().mean()) if len(best) else math.nan,
        "probe_by_layer": [_by_seed(rows[rows.layer == layer], right) for layer in sorted(rows.layer.unique())],
    }


def _hits(rows: pd.DataFrame, direction: Direction) -> Any:
    return rows.after == DIRECTIONS[direction][0]


def _by_seed(rows: pd.DataFrame, hits: Callable[[pd.DataFrame], Any]) -> Estimate:
    return over_seeds(
        [
            shared_mean(hits(part), part.group, f"transfer/{part.source.iloc[0]}/{seed}")
            for seed, part in rows.groupby("seed")
        ]
    )


# --- the story -----------------------------------------------------------------------------------------------------

Found = tuple[str, float, Estimate, Estimate]  # between what, share of neurons, overlap, overlap by chance


def chapter(view: View) -> Chapter:
    """What was held out, then halves and seeds."""
    task, seeds = view.task, view.seeds
    held = [(d, b) for d, b in task.steering.items() if any(each.shift.known for each in b.held_out.values())]
    exhibits = [Exhibit("held-out", [_held_out_panel(block, direction) for direction, block in held])]
    if overlaps(task, seeds):
        exhibits.append(Exhibit("steady", [_overlap_panel(task, seeds), _likeness_panel(task, seeds)]))
    return Chapter(answer(task, seeds), exhibits)


def answer(task: TaskResults, seeds: list[SeedsRow]) -> Answer:
    """Whether the same neurons are found again: between seeds where there are several, else between halves."""
    question, found, texts, again = "Does it hold up?", overlaps(task, seeds), [], []
    for between, words in (("seeds", "two seeds"), ("halves", "two halves of the fit pairs")):
        for _, top, share, chance in [entry for entry in found if entry[0] == between][:1]:
            text = f"of their top {100 * top:g}{NBSP}% of neurons by |rho| are the same in {words}"
            by_chance = f"{percent(chance.estimate)}, up to {percent(chance.high)}"
            texts.append((percent(share.estimate), f"{text}; by chance {by_chance}."))
            again += [between] if share.estimate > chance.high else []
    if not texts:
        return not_measured("holds", question, task)
    verdict = f"The same neurons again, between {listed(again)}" if again else "Not the same neurons again"
    notes = [f"{number} {text}" for number, text in texts[1:]]
    if rows := seed_rows(seeds, "rank_correlation"):
        notes.append(f"The seeds began with {'the same' if rows[0].shared_initialization else 'different'} weights.")
    return Answer("holds", question, verdict, *texts[0], " ".join(notes))


def seed_rows(seeds: list[SeedsRow], what: str) -> list[SeedsRow]:
    """Rows of one measure between seeds; where some seeds began alike and some did not, those that began alike."""
    rows = [row for row in seeds if row.what == what]
    return [row for row in rows if row.shared_initialization] or rows


def overlaps(task: TaskResults, seeds: list[SeedsRow]) -> list[Found]:
    """Overlap of the strongest neurons, between halves of the pairs and between seeds, as far as known."""
    halves = task.consistency["halves"].overlap
    found: list[Found] = [("halves", float(top), entry["share"], entry["chance"]) for top, entry in halves.items()]
    found += [("seeds", row.top, row.value, row.chance) for row in seed_rows(seeds, "overlap")]
    return sorted((entry for entry in found if entry[2].known), key=lambda entry: (entry[1], entry[0]))


def _held_out_panel(block: Steered, direction: Direction) -> Panel:
    held = [(f"another {name}", each.shift) for name, each in block.held_out.items() if each.shift.known]
    dots = [Dot(name, shift, TONE[direction], True) for name, shift in held]
    return dots_panel(direction, [Dot("as fitted", block.pairs.shift, TONE[direction]), *dots])


def _overlap_panel(task: TaskResults, seeds: list[SeedsRow]) -> Panel:
    dots = [
        Dot(f"top {100 * top:g} %, {between}", value, INK, between == "seeds", mark=chance.estimate)
        for between, top, value, chance in overlaps(task, seeds)
    ]
    return dots_panel("same neurons found again", dots)


def _likeness_panel(task: TaskResults, seeds: list[SeedsRow]) -> Panel:
    """Rank correlation of rho by layer, and what two seeds share beside chance."""
    lines = [Line("halves", task.contrast.layers, task.consistency["halves"].rho_rank_correlation)]
    for name, what, dash in (("seeds", "rank_correlation", DASHED), ("aligned", "aligned_cosine", drawing.DOTTED)):
        rows = sorted((row for row in seed_rows(seeds, what) if row.layer >= 0), key=lambda row: row.layer)
        layers = [row.layer for row in rows]
        if rows:
            lines.append(Line(name, layers, [row.value for row in rows], MUTED, dash))
            lines.append(Line("", layers, [row.chance for row in rows], OTHER, width=0))
    return drawing.lines_panel("likeness by layer", lines, chance=0)


# --- from task to task ---------------------------------------------------------------------------------------------


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
