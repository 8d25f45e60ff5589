"""What steering costs: answers that should stay, and text in which nothing is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report import words
from mnemoscope.report.drawing import DASHED, INK, OTHER, TONE, Dot, Line, Panel, dots_panel, lines_panel
from mnemoscope.report.page import TOO_FEW, Answer, Chapter, Exhibit, Table, View, marked, not_measured
from mnemoscope.report.records import Cell
from mnemoscope.report.rows import Part
from mnemoscope.report.words import AIMS, KEPT, LISTS, Direction, changes, counted, for_aim, points, points_interval
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import Estimate, mean, proportion


def measure_kept(
    cell: Cell, direction: Direction, lists: dict[str, pd.DataFrame]
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """By list of what should stay: the change in accuracy, negative is damage, and what is lost.

    Lost is of the examples that were answered right before the share that is not any more.
    """
    change, lost = dict[str, Estimate](), dict[str, Estimate]()
    for name, rows in lists.items():
        right = Toward.of(direction) if name == "conflict_rest" else "correct"
        before, after = rows.before == right, rows.after == right
        change[name] = mean(after.astype(np.float64) - before.astype(np.float64), rows.group)
        lost[name] = proportion(~after[before], rows.group[before])
    if cell.info["memory_is_conflict"] and direction == "to_generalized":
        # The memory examples are the conflicts themselves: steering them is the aim, not the damage.
        change["memory"] = lost["memory"] = Estimate.undefined()
    return change, lost


def measure(cell: Cell) -> dict[str, Any]:
    """Divergence on neutral text by direction and dose, in nats a token; None where it was not measured."""
    if cell.neutral is None:
        return {"neutral": None}
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for (direction, dose), rows in cell.neutral.groupby(["direction", "dose"]):
        acts_N = rows.acts.astype(float)
        measures = {"first": rows.kl_first, "next": rows.kl_next, "same_top": rows.same_top * 1.0, "acted": acts_N}
        measures |= {"first_gated": rows.kl_first * acts_N, "next_gated": rows.kl_next * acts_N}
        entry = {key: mean(values, rows.text) for key, values in measures.items()}
        found.setdefault(str(direction), {})[f"{dose:g}"] = entry
    return {"neutral": found}


def chapter(view: View) -> Chapter:
    """What else changes, on questions, on neutral text, and in what it writes."""
    task, to, shown = view.task, words.TOWARDS[view.task.documents], _written(view)
    neutral = Exhibit("neutral", [_neutral_panel(doses, d) for d, doses in task.get("neutral", {}).items()])
    if not any(change.known for block in task.steering.values() for change in block.collateral.values()):
        return Chapter(answer(task), [neutral], **shown)
    notes = [damage(task, direction) for direction in task.steering]
    if task.memory_is_conflict:
        notes.append(f"Facts to recall, {to['to_generalized']}, are left out: here they are the conflicts themselves.")
    panels = [_collateral_panel(block, direction) for direction, block in task.steering.items()]
    return Chapter(answer(task), [Exhibit("collateral", panels, notes), neutral], [table(task)], **shown)


def answer(task: Part) -> Answer:
    """The largest loss among what should stay, and whether any loss is sure."""
    question, to = "What does it cost?", words.TOWARDS[task.documents]
    losses: dict[tuple[Direction, str], Estimate] = {}
    lost = {direction: changes(for_aim(block, task.aim), task.aim) for direction, block in task.steering.items()}
    for direction, by_list in lost.items():
        losses |= {(direction, k): c for k, c in by_list.items() if c.known and k in counted(direction)}
    if not losses:
        return not_measured("cost", question, task)
    sure = {place: change for place, change in losses.items() if change.sign < 0}
    (direction, key), worst = min((sure or losses).items(), key=lambda found: found[1].estimate)
    verdict = f"It damages {LISTS[key]}" if sure else "No sure damage"
    verdict = TOO_FEW if worst.too_few else verdict
    sentence = f"in accuracy on {LISTS[key]}, {to[direction]}{'' if sure else ', is the largest loss'}."
    note = f"95{words.NBSP}% interval: {points_interval(worst)}, of {words.count(worst.n, 'answer')}."
    others = [d for d in task.steering if d != direction and any(place[0] == d for place in losses)]
    note += "".join(f" {to[d].capitalize()}: {words.largest_loss(lost[d], d)}." for d in others)
    return Answer("cost", question, verdict, points(worst.estimate, sign=True), sentence, note)


def damage(task: Part, direction: Direction) -> str:
    """What steering surely damages; what does not count as damage is named apart."""
    block = for_aim(task.steering[direction], task.aim)
    found = dict.fromkeys(KEPT, Estimate.undefined()) | changes(block, task.aim)
    damaged = [f"{LISTS[key]} lose {_loss(found[key])}" for key in counted(direction) if found[key].sign < 0]
    text = words.listed(damaged) if damaged else "no sure damage"
    if not any(found[key].known for key in counted(direction)):
        text = f"damage {words.UNMEASURED}, for there were no such examples"
    text = f"{words.TOWARDS[task.documents][direction].capitalize()}: {text}."
    if direction == "to_memorized" and found["novel"].sign < 0:
        text += f" New questions, which have nothing to remember, lose {_loss(found['novel'])}."
    families = [
        f"{family} {words.percent(share['before'].estimate)} before, {words.percent(share['after'].estimate)} after"
        for family, share in block.get("recall_by_family", {}).items()
    ]
    return f"{text} Facts to recall, right by phrasing: {words.listed(families)}." if families else text


def _loss(change: Estimate) -> str:
    return f"{points(-change.estimate)} ({points_interval(change)})"


def _collateral_panel(block: Part, direction: Direction) -> Panel:
    dots = [
        Dot(name, of[key], INK if key in counted(direction) else OTHER, hollow)
        for key in words.KEPT
        for name, of, hollow in ((LISTS[key], block.collateral, False), ("", block.collateral_conflict, True))
    ]
    return dots_panel(direction, dots, reference=0)


def table(task: Part) -> Table:
    """What changes that should not, under both settings."""
    rows, to = [], words.TOWARDS[task.documents]
    for direction, block in task.steering.items():
        for aim in AIMS:
            for name, change in changes(block, aim).items():
                what = f"{to[direction].capitalize()}, set for {LISTS[aim]}: {LISTS[name]}"
                interval = points_interval(change) if change.known else ""
                rows.append([what, points(change.estimate, sign=True), interval, f"{change.n:,}"])
    return Table("Collateral: change in accuracy, test split", ["", "change", f"95{words.NBSP}% interval", "N"], rows)


def _neutral_panel(doses: dict[str, dict[str, Estimate]], direction: Direction) -> Panel:
    keys, tone = sorted(doses, key=float), TONE[direction]
    looks = {"first": ("steered token", tone, "-"), "next": ("tokens after", tone, DASHED)}
    looks["first_gated"] = ("gated", INK, "-")
    lines = []
    for measure, (name, colour, dash) in looks.items():
        lines.append(Line(name, [float(key) for key in keys], [doses[key][measure] for key in keys], colour, dash))
    return lines_panel(direction, lines, "times the chosen strength", "nats")


def _written(view: View) -> dict[str, Any]:
    """What follows each sampled prompt of the first cell, unsteered and steered, none picked by what came out; and how
    natural the unsteered model finds it.
    """
    cells, to = view.cells, words.TOWARDS[view.task.documents]
    if cells[0].samples is None:
        return {}
    found = []
    for row in cells[0].samples.to_dict("records"):
        kinds = {row["memorized"].strip(): "memorized", row["generalized"].strip(): "generalized"}
        texts = {key: marked(row[key], kinds) for key in ("plain", "steered")}
        found.append({"prompt": row["prompt"], "towards": to[row["direction"]], **texts})
    rows = pd.concat([cell.samples for cell in cells if cell.samples is not None])
    sentence = (
        f"A token of what follows costs the unsteered model {rows.nats_steered.mean():.2f} nats when it was steered, "
        f"{rows.nats_plain.mean():.2f} when it was not ({words.count(len(rows), 'prompt')})."
    )
    return {"written": found, "telling": sentence}
