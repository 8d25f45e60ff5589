"""The detector: how it ranks prompts (N) beside what needs no state, its reliability, and vectors behind its gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.drawing import INK, MEMORIZED, OTHER, TONE, Dot, Line, Panel, against, dots_panel, lines_panel
from mnemoscope.report.page import TOO_FEW, Answer, Chapter, Exhibit, Table, View
from mnemoscope.report.records import Cell
from mnemoscope.report.rows import Part
from mnemoscope.report.words import LISTS, NBSP, RIVALS, Direction, answered, interval, listed, percent, ranged
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import Estimate, auroc, mean, proportion

SCORES: dict[str, str] = {"p_memorized": "the detector", **RIVALS}
LEAST = 30  # prompts of each behaviour in a family whose ranking is judged apart
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ANSWERED_RIGHT = ("memory", "novel")  # lists that a gated vector should leave alone


def measure(cell: Cell) -> dict[str, Any]:
    """How the detector ranks test prompts; why there is none where none was fitted."""
    if cell.detection is None:
        return {"no_detector": cell.no_detector or None}
    table = cell.detection
    known = table[table.followed.isin(("memorized", "generalized"))]
    conflict, others = known[known.examples == "conflict"], sorted(set(table.examples) - {"conflict", *ANSWERED_RIGHT})
    by_family = {
        str(family): {key: int((rows.followed == key).sum()) for key in ("memorized", "generalized")}
        | _rankings(rows, LEAST)
        for family, rows in conflict.groupby("family")
    }
    asked = table.examples == "conflict"
    memorized = (conflict.followed == "memorized").astype(int)
    areas, gate = _rankings(conflict), None
    if conflict.p_memorized_below.notna().any():
        gate = auroc(conflict.p_memorized_below, memorized, conflict.group)
    found = {
        "auroc": areas,
        "other": proportion(table.followed[asked] == "other", table.group[asked]),
        "by_family": by_family,
        "held_out": {other: _rankings(known[known.examples == other]) for other in others},
        "reliability": _reliability(conflict),
        "brier": mean((conflict.p_memorized - memorized) ** 2, conflict.group),
        "unlike": {str(k): proportion(rows.unlike, rows.group) for k, rows in table.groupby("examples")},
        "readable_from": float(conflict.readable_from.median()),
        "gate": gate,
        "given_up": areas["p_memorized"].estimate - gate.estimate if gate else None,
    }
    return {"detection": found}


def _rankings(rows: pd.DataFrame, least: int = 1) -> dict[str, Any]:
    """Area under the ROC curve of each score for ``memorized``; NaN with fewer than ``least`` of either behaviour."""
    label_N = (rows.followed == "memorized").astype(int)
    if min(label_N.sum(), (1 - label_N).sum()) < least:
        return {score: Estimate.undefined(len(rows)) for score in SCORES}
    return {score: auroc(rows[score], label_N, rows.group) for score in SCORES}


def _reliability(rows: pd.DataFrame) -> list[dict[str, Estimate]]:
    place_N = np.clip(np.digitize(rows.p_memorized, BINS) - 1, 0, len(BINS) - 2)
    bins = []
    for number in range(len(BINS) - 1):
        part = rows[place_N == number]
        said = proportion(part.p_memorized, part.group)
        bins.append({"said": said, "memorized": proportion(part.followed == "memorized", part.group)})
    return bins


def measure_gated(cell: Cell, direction: Direction, lists: dict[str, pd.DataFrame]) -> dict[str, Any] | None:
    """What a vector does behind the gate, from its rows by list; None where no detector was fitted."""
    if cell.gate is None:
        return None
    target = Toward.of(direction)
    found: dict[str, Any] = {"acted": {}, "shift": {}, "collateral": {}, "recall_by_family": None}
    for name, rows in lists.items():
        acts = cell.gate[(cell.gate.direction == direction) & (cell.gate.examples == name)].set_index("example").acts
        if not acts.index.is_unique or not set(rows.example) <= set(acts.index):
            path = cell.folder / "records" / "gate.parquet"
            raise InputError(f"{path}: examples of {name!r} are not those of steering")
        acts_N = acts.loc[rows.example].to_numpy(bool)
        after_N = np.where(acts_N, rows.after, rows.before)
        found["acted"][name] = proportion(acts_N, rows.group)
        if name == "memory":
            found["recall_by_family"] = recall_by_family(cell, rows.assign(after=after_N))
        if name in ANSWERED_RIGHT:
            change_N = (after_N == "correct").astype(float) - (rows.before == "correct").to_numpy(float)
            found["collateral"][name] = mean(change_N, rows.group)
        elif (rows.before == target.opposite).all():
            found["shift"][name] = proportion(after_N == target, rows.group)
    return found


def recall_by_family(cell: Cell, rows: pd.DataFrame) -> dict[str, Any] | None:
    """Where facts to recall are asked in several families: the share that is right, before and after, of each."""
    if cell.info["memory_is_conflict"] or rows.family.nunique() < 2:
        return None
    return {
        str(family): {when: proportion(part[when] == "correct", part.group) for when in ("before", "after")}
        for family, part in rows.groupby("family", observed=True, sort=True)
    }


def chapter(view: View) -> Chapter | None:
    """Rankings and reliability, then vectors behind the gate; None where no detector was asked for."""
    task, found = view.task, view.task.get("detection")
    if found is None:
        return Chapter(answer(task)) if "no_detector" in task else None
    strange = [f"{percent(s.estimate)} of {LISTS.get(k, k)}" for k, s in found.unlike.items() if s.known]
    texts = [f"Unlike what it was fitted on: {listed(strange)}."] if strange else []
    dots = against(SCORES["p_memorized"], {name: found.auroc[score] for score, name in SCORES.items()})
    bins = [entry for entry in found.reliability if entry["memorized"].known]
    lines = [Line("perfect", [0, 1], [0.0, 1.0], OTHER, width=1)]
    lines.append(Line("", [b["said"].estimate for b in bins], [b["memorized"] for b in bins], MEMORIZED))
    ticks = {x: f"{100 * x:.0f} %" for x in BINS}
    panels = [dots_panel("ranked right, all conflicts", dots, reference=50)]
    panels.append(lines_panel("of those, memorized", lines, "P(memorized)", ticks=ticks, axis="share"))
    gated = [_gated_panel(block, direction) for direction, block in task.steering.items() if "gated" in block]
    return Chapter(answer(task), [Exhibit("ranking", panels, texts, table(found)), Exhibit("gated", gated)])


def answer(task: Part) -> Answer:
    """Whether the detector ranks prompts right before they are answered."""
    question, found = "Can it be foreseen?", task.get("detection")
    if found is None:
        return Answer("detector", question, "No detector", sentence=f"None could be fitted: {task.no_detector}.")
    ours = found.auroc["p_memorized"]
    if not ours.known:
        return Answer("detector", question, "Not measured", sentence="The test prompts show one behaviour only.")
    best = max(("input_only", "input_repeats"), key=lambda name: found.auroc[name].estimate)
    inputs = found.auroc[best]
    rivals = {RIVALS[best].capitalize(): inputs, "the model's own certainty": found.auroc["top_gap"]}
    verdict = "It cannot surely be foreseen"
    if ours.low > 0.5:
        beaten = all(ours.low > rival.estimate for rival in rivals.values() if rival.known)
        verdict = "It can be foreseen" if beaten else "It can be foreseen, not surely better than without states"
    verdict = TOO_FEW if ours.too_few else verdict
    memory, rule = (answered(key, task.documents) for key in ("memorized", "generalized"))
    sentence = f"of the cases, a prompt that will be {memory} gets a higher P(memorized) than one {rule}."
    beside = listed([f"{name} ranks {percent(rival.estimate)}" for name, rival in rivals.items() if rival.known])
    left_out = f"Left out: {percent(found.other.estimate)} that give neither answer."
    note = f"95{NBSP}% interval: {interval(ours)}. {left_out} {beside}. Mean squared error: {found.brier.estimate:.3f}."
    mark = (inputs.estimate, RIVALS[best])
    return Answer("detector", question, verdict, percent(ours.estimate), sentence, note, ours, mark)


def table(found: Part) -> Table:
    """Within each phrasing, how the detector ranks prompts, beside what needs no state."""
    parts: dict[str, dict[str, Any]] = {"all conflicts": found.auroc, **found.by_family}
    parts |= {f"held out: {name}": entry for name, entry in found.held_out.items()}
    rows = []
    for name, part in parts.items():
        counts = f"{part['memorized']:,} / {part['generalized']:,}" if "memorized" in part else ""
        rows.append([name, *(ranged(part[s]) if part[s].known else "too few" for s in SCORES), counts])
    columns = ["", *SCORES.values(), "memorized / generalized"]
    return Table("Share of (memorized, generalized) prompts that a score ranks right", columns, rows)


def _gated_panel(block: Part, direction: Direction) -> Panel:
    plain = {"pairs": block.pairs.shift, "conflict": block.conflict_at_chosen.shift}
    dots = []
    for name in (name for name in plain if name in block.gated.shift):
        dots.append(Dot(f"{LISTS[name]}: steered", plain[name], TONE[direction], True))
        dots.append(Dot("gated", block.gated.shift[name], TONE[direction]))
    for name in (name for name in block.gated.collateral if block.collateral[name].known):
        dots += [Dot(LISTS[name], block.collateral[name], INK, True), Dot("gated", block.gated.collateral[name], INK)]
    return dots_panel(direction, dots, reference=0)
