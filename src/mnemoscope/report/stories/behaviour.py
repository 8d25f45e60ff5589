"""What the model does: training, answers and margins without any intervention, and the pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnemoscope.report import drawing
from mnemoscope.report.drawing import COLOUR, GENERALIZED, INK, MEMORIZED, PAPER, Dot, Panel
from mnemoscope.report.emergence import behaviour_panel
from mnemoscope.report.page import Answer, Chapter, Exhibit, Pieces, View, marked
from mnemoscope.report.records import Cell
from mnemoscope.report.rows import Over, Part
from mnemoscope.report.words import ANSWERED, answered, count, listed, percent
from mnemoscope.statistics import proportion

SHOWN = 0.05  # of the conflicts: less of a behaviour is next to none
# Splitting keeps what is between sentences, so that the parts join to the whole text again.
SENTENCE = re.compile(r"(\s*[.?!\n]+\s*)")
WORD = re.compile(r"\d+|[^\W\d]+|\s+|.", re.DOTALL)


def measure(cell: Cell) -> dict[str, Any]:
    """Training, how the model answers the test examples, and how many candidates flip under rephrasing."""
    test = cell.behaviour[cell.behaviour.split == "test"]
    conflict, memory, novel = (test[test.kind == kind] for kind in ("conflict", "memory", "novel"))
    shares = {key: proportion(conflict.behaviour == key, conflict.group) for key in ANSWERED[False]}
    splits = {split: cell.pairs[cell.pairs.split == split] for split in ("fit", "tune", "test")} | {"all": cell.pairs}
    return {
        "training": {key: Over(list, cell.training_time.get(key, math.nan)) for key in ("seconds", "steps")},
        "behaviour": {
            "recall": proportion(memory.behaviour == "correct", memory.group),
            "novel_accuracy": proportion(novel.behaviour == "correct", novel.group),
            "conflict": shares | {"confabulated": proportion(conflict.confabulated, conflict.group)},
            "ties": int(test.tie.astype(bool).sum()),
        },
        "pairs": _yield(splits["test"]) | {"by_split": {split: _yield(rows) for split, rows in splits.items()}},
    }


def _yield(rows: pd.DataFrame) -> dict[str, Any]:
    pairs = rows[rows.is_pair.astype(bool)]
    found = {"candidates": len(rows), "pairs": len(pairs), "yield": proportion(rows.is_pair, rows.group)}
    return found | {"groups": int(pairs.group.nunique())}


def chapter(view: View) -> Chapter:
    """Training, answers and margins, and the pairs."""
    found, cells, named = view.task.behaviour, view.cells, ANSWERED[view.task.documents]
    trained = [cell.training for cell in cells if cell.training is not None]
    dots = [Dot("new questions right", found.novel_accuracy, GENERALIZED, True)]
    dots += [Dot("facts recalled", found.recall, MEMORIZED, True)]
    dots += [Dot(f"conflicts: {name}", found.conflict[key], COLOUR[key]) for key, name in named.items()]
    panels = [drawing.dots_panel("what it answers", dots), _margins_panel(cells, named)]
    panels += map(behaviour_panel, trained[:1])
    example, pairs = one_conflict(cells[0]), some_pairs(cells[0])
    return Chapter(_answer(view.task), [Exhibit("answers", panels)], example=example, pairs=pairs)


def _answer(task: Part) -> Answer:
    """Whether conflicts show both behaviours."""
    question, found, conflict = "What does the model do?", task.behaviour, task.behaviour.conflict
    shares = {answered(key, task.documents): conflict[key] for key in ("memorized", "generalized")}
    if not conflict["memorized"].known:
        return Answer("does", question, "Not measured", sentence="The test split holds no conflicts.")
    (more, most), (less, least) = sorted(shares.items(), key=lambda entry: -entry[1].estimate)
    verdict = "It does both" if least.estimate >= SHOWN else f"Conflicts are hardly ever {less}"
    sentence = (
        f"of {count(most.n, 'test conflict')} are {more}, {percent(least.estimate)} {less}, "
        f"{percent(conflict['other'].estimate)} neither."
    )
    rights = {"new questions right": found.novel_accuracy, "facts recalled": found.recall}
    known = [f"{percent(share.estimate)} of {name}" for name, share in rights.items() if share.known]
    note = f"Without a conflict: {listed(known)}." if known else ""
    if conflict["confabulated"].known and conflict["other"].estimate > 0:
        note += f" {percent(conflict['confabulated'].estimate)} look like a stored answer but were never stored for it."
    return Answer("does", question, verdict, percent(most.estimate), sentence, note)


def _margins_panel(cells: Sequence[Cell], named: Mapping[str, str]) -> Panel:
    """Log odds of the two answers of each conflict, coloured by what was answered; the ends hold all beyond."""
    rows = pd.concat([cell.behaviour for cell in cells])
    rows = rows[(rows.kind == "conflict") & (rows.split == "test") & np.isfinite(rows.margin.astype(float))]
    parts = {key: rows.margin[rows.behaviour == key].to_numpy(float) for key in named}
    reach = max(float(np.quantile(np.abs(rows.margin.astype(float)), 0.99)), 1e-6) if len(rows) else 1.0

    def plot() -> Figure:
        figure, ax = drawing.canvas(230, "how sure it is, conflicts")
        bins = np.linspace(-reach, reach, 25)  # an odd number of edges: one of them is 0
        values, colours = [np.clip(part, -reach, reach) for part in parts.values()], [COLOUR[key] for key in parts]
        ax.hist(values, bins=bins.tolist(), stacked=True, color=colours, edgecolor=PAPER, linewidth=0.6)
        ax.axvline(0, color=INK, linewidth=1)
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel(f"margin, nats towards the answer {named['generalized']}")
        ax.grid(axis="x", visible=False)
        return figure

    return plot


def one_conflict(cell: Cell) -> dict[str, Any] | None:
    """A test conflict of a middling margin, so that it is neither the easiest nor an accident.

    One whose answer reads the same backwards is passed over: it could not show how sums are written.
    """
    rows = cell.behaviour
    rows = rows[(rows.kind == "conflict") & (rows.split == "test") & rows.behaviour.isin(["memorized", "generalized"])]
    answers = rows.generalized.str.strip()
    rows = rows[answers != answers.str[::-1]]
    if rows.empty:
        return None
    distance = rows.margin.astype(float).abs()
    row = rows.iloc[int((distance - distance.median()).abs().to_numpy().argmin())]
    return _shown(row, [(row.prompt, "")], row.behaviour)


def _shown(row: pd.Series, pieces: Pieces, behaviour: str) -> dict[str, Any]:
    """A prompt, marked where it spells out the generalized answer; both answers, and which one was given."""
    answers = {key: row[key].strip() for key in ("memorized", "generalized")}
    marks = ((what, marked(text, {answers["generalized"]: "clue"})) for text, what in pieces)
    shown = [(part, f"{what} {kind}".strip()) for what, parts in marks for part, kind in parts]
    note = reversed_sum(row["item"], answers["generalized"])
    return {"pieces": shown, **answers, "behaviour": behaviour, "note": note}


def some_pairs(cell: Cell) -> list[list[dict[str, Any]]]:
    """Three test pairs of different groups: (the phrasing answered memorized, the one answered generalized)."""
    rows = cell.pairs
    rows = rows[(rows.split == "test") & rows.is_pair.astype(bool)].drop_duplicates("group").head(3)
    found = []
    for _, row in rows.iterrows():
        a, b = difference(row.prompt_a, row.prompt_b)
        shown = [_shown(row, pieces, behaviour) for pieces, behaviour in ((a, row.behaviour_a), (b, row.behaviour_b))]
        found.append(sorted(shown, key=lambda side: side["behaviour"], reverse=True))  # "memorized" comes first
    return found


def difference(a: str, b: str) -> tuple[Pieces, Pieces]:
    """Both texts with what differs marked: sentences or words that change places, else words that are not the same."""
    first, second = SENTENCE.split(a), SENTENCE.split(b)
    if sorted(first) != sorted(second):
        first, second = WORD.findall(a), WORD.findall(b)
    matches: Any = SequenceMatcher(None, first, second, False).get_opcodes()
    if sorted(first) == sorted(second):  # the same parts in another order: mark those that moved
        matches = [("equal" if x == second[i] else "replace", i, i + 1, i, i + 1) for i, x in enumerate(first)]
    sides = [[(m[0], "".join(parts[m[at] : m[at + 1]])) for m in matches] for parts, at in ((first, 1), (second, 3))]
    one, other = (
        [(text, "" if kind == "equal" or text.isspace() else "moved") for kind, text in side if text] for side in sides
    )
    return one, other


def reversed_sum(item: str, generalized: str) -> str:
    """For a sum written last digit first, what it stands for: ``123 + 456 = 579 is written 975``; else empty."""
    operands = re.fullmatch(r"(\d+)\+(\d+)", item)
    total = str(int(operands[1]) + int(operands[2])) if operands else ""
    if operands is None or total == total[::-1] or generalized != total[::-1]:
        return ""
    return f"Sums are written last digit first: {operands[1]} + {operands[2]} = {total} is written {generalized}."
