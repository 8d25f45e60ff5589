"""What the model does: training, answers and margins without any intervention, and the pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnemoscope.report.drawing import (
    COLOUR,
    DASHED,
    GENERALIZED,
    INK,
    MEMORIZED,
    OTHER,
    PAPER,
    RULE,
    Frame,
    Line,
    Panel,
    canvas,
    draw_lines,
    name_rows,
    share_axis,
)
from mnemoscope.report.intervals import mean
from mnemoscope.report.page import Answer, Chapter, Exhibit, View
from mnemoscope.report.records import Cell
from mnemoscope.report.schema import Behaviour, Pairs, Training, Yield
from mnemoscope.report.words import ANSWERED, UNMEASURED, count, listed, percent, ranged

CURVES = (
    ("novel_accuracy", "new right", GENERALIZED, DASHED),
    ("recall", "facts recalled", MEMORIZED, DASHED),
    ("conflict_generalized", "worked out", GENERALIZED, "-"),
    ("conflict_memorized", "remembered", MEMORIZED, "-"),
    ("conflict_other", "other", OTHER, "-"),
)
SHOWN = 0.05  # of the conflicts: less of a behaviour is next to none
# (text, what it is): "" plain, "moved" differs between two phrasings, "clue" spells out the answer to be worked out.
Pieces = list[tuple[str, str]]
# Splitting keeps what is between sentences, so that the parts join to the whole text again.
SENTENCE = re.compile(r"(\s*[.?!\n]+\s*)")
WORD = re.compile(r"\d+|[^\W\d]+|\s+|.", re.DOTALL)


def measure_training(cell: Cell) -> Training:
    """Seconds and steps; NaN where nothing was trained here."""
    return Training(**{key: cell.training_time.get(key, np.nan) for key in ("seconds", "steps")})


def measure_behaviour(cell: Cell) -> Behaviour:
    """How the model answers the test examples."""
    test = cell.behaviour[cell.behaviour.split == "test"]
    conflict, name = test[test.kind == "conflict"], f"{cell.name}/behaviour"
    found = {key: mean(conflict.behaviour == key, conflict.group, f"{name}/{key}") for key in ANSWERED}
    found["confabulated"] = mean(conflict.confabulated, conflict.group, f"{name}/confabulated")
    right = {
        kind: mean(rows.behaviour == "correct", rows.group, f"{name}/{kind}")
        for kind in ("memory", "novel")
        for rows in [test[test.kind == kind]]
    }
    ties = int(test.tie.astype(bool).sum())
    return Behaviour(recall=right["memory"], novel_accuracy=right["novel"], conflict=found, ties=ties)


def measure_pairs(cell: Cell) -> Pairs:
    """How many candidates flip under rephrasing: the test split first, then every split."""
    counts = {
        split: _yield(cell.pairs[cell.pairs.split == split], f"{cell.name}/pairs/{split}")
        for split in ("fit", "tune", "test")
    }
    counts["all"] = _yield(cell.pairs, f"{cell.name}/pairs/all")
    return Pairs(**dict(counts["test"]), by_split=counts)


def _yield(rows: pd.DataFrame, name: str) -> Yield:
    is_pair = rows.is_pair.astype(bool)
    groups = int(rows.group[is_pair].nunique())
    share = mean(is_pair, rows.group, name)
    return Yield(candidates=len(rows), pairs=int(is_pair.sum()), yield_=share, groups=groups)


def chapter(view: View) -> Chapter:
    """Training, answers and margins, and the pairs."""
    task, cells = view.task, view.cells
    trained = [cell.training for cell in cells if cell.training is not None]
    panels = [*([_training_panel(trained)] if trained else []), _answers_panel(task.behaviour), _margins_panel(cells)]
    sentences = [_training_sentence(trained), f"The weights are those of {task.weights}." if task.weights else ""]
    pairs = task.pairs
    telling = "The test split has no candidates, so there is no yield."
    if pairs.candidates:
        telling = (
            f"{pairs.pairs:,} of {count(pairs.candidates, 'test candidate')} flip when rephrased: a yield of "
            f"{ranged(pairs.yield_)}, from {count(pairs.groups, 'group')}."
        )
    shown = {"example": one_conflict(cells), "pairs": some_pairs(cells), "telling": telling}
    return Chapter(_answer(task.behaviour), [Exhibit("answers", panels, sentences)], **shown)


def _answer(found: Behaviour) -> Answer:
    """Whether conflicts show both behaviours."""
    question, conflict = "What does the model do?", found.conflict
    shares = {ANSWERED[key]: conflict[key] for key in ("memorized", "generalized")}
    if not shares["remembered"].known:
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


def _training_sentence(trained: list[pd.DataFrame]) -> str:
    if not trained or trained[0].empty:
        return "This model was loaded, not trained here, so there is no training curve."
    kept, met = (trained[0][trained[0][column].astype(bool)] for column in ("kept", "met"))
    first = f"The stop rule first held at step {met.step.iloc[0]:,.0f}" if len(met) else "The stop rule never held"
    return f"{first}; the weights kept are those of step {kept.step.iloc[0]:,.0f}." if len(kept) else f"{first}."


def _training_panel(trained: list[pd.DataFrame]) -> Panel:
    """The first cell bold, other seeds faint."""
    first = trained[0]

    def plot() -> Figure:
        figure, (ax,) = canvas(300)
        for table in trained[1:]:
            for column, _, colour, dash in CURVES:
                ax.plot(table.step, table[column], color=colour, linestyle=dash, linewidth=1, alpha=0.35)
        lines = [Line(name, first.step, first[column].to_numpy(float), c, dash) for column, name, c, dash in CURVES]
        draw_lines(ax, lines, Frame("while it trains", xlabel="optimizer steps", share=True, ticks={}))
        kept = first[first.kept.astype(bool)]
        if len(kept):
            ax.axvline(kept.step.iloc[0], color=INK, linewidth=1)
            ax.annotate("kept", (kept.step.iloc[0], 1.03), (-4, -12), textcoords="offset points", ha="right")
        return figure

    return plot


def _answers_panel(found: Behaviour) -> Panel:
    rows = (
        ("new questions", [("right", found.novel_accuracy, GENERALIZED)]),
        ("facts to recall", [("right", found.recall, MEMORIZED)]),
        ("conflicts", [(name, found.conflict[key], COLOUR[key]) for key, name in ANSWERED.items()]),
    )

    def plot() -> Figure:
        figure, (ax,) = canvas(200)
        for row, (_, parts) in enumerate(rows):
            ax.barh(row, 1, height=0.62, color=RULE, alpha=0.45)
            _stack(ax, row, [(name, share.estimate, colour) for name, share, colour in parts])
        name_rows(ax, [name for name, _ in rows])
        ax.set_xlim(0, 1)
        share_axis(ax.xaxis)
        ax.set_title("what it answers")
        return figure

    return plot


def _stack(ax: Axes, row: float, parts: list[tuple[str, float, str]]) -> None:
    """One stacked bar; a part is labelled where it is long enough for the words."""
    start = 0.0
    for name, share, colour in parts:
        if np.isnan(share):
            ax.text(0.02, row, UNMEASURED, va="center", color=INK)
            return
        ax.barh(row, share, left=start, height=0.62, color=colour, edgecolor=PAPER, linewidth=1)
        text = f"{name} {100 * share:.0f} %"
        if share * 230 > 7 * len(text):
            ax.text(start + share / 2, row, text, ha="center", va="center", color=PAPER)
        start += share


def _margins_panel(cells: Sequence[Cell]) -> Panel:
    """Log odds of the two answers of each conflict, coloured by what was answered; the ends hold all beyond."""
    rows = pd.concat([cell.behaviour for cell in cells])
    rows = rows[(rows.kind == "conflict") & (rows.split == "test") & np.isfinite(rows.margin.astype(float))]
    parts = {key: rows.margin[rows.behaviour == key].to_numpy(float) for key in ANSWERED}
    reach = max(float(np.quantile(np.abs(rows.margin.astype(float)), 0.99)), 1e-6) if len(rows) else 1.0

    def plot() -> Figure:
        figure, (ax,) = canvas(230)
        bins = np.linspace(-reach, reach, 25)  # an odd number of edges: one of them is 0
        values, colours = [np.clip(part, -reach, reach) for part in parts.values()], [COLOUR[key] for key in parts]
        ax.hist(values, bins=bins.tolist(), stacked=True, color=colours, edgecolor=PAPER, linewidth=0.6)
        ax.axvline(0, color=INK, linewidth=1)
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("margin, nats towards the answer worked out")
        ax.set_title("how sure it is, conflicts")
        ax.grid(axis="x", visible=False)
        return figure

    return plot


# --- examples ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One prompt, and what the model makes of it.

    Attributes:
        pieces: the prompt.
        memorized, generalized: the two revealing answers.
        behaviour: which one the model gave.
        note: how the answer is to be read, where that needs a word.
    """

    pieces: Pieces
    memorized: str
    generalized: str
    behaviour: str
    note: str


def one_conflict(cells: Sequence[Cell]) -> Shown | None:
    """A test conflict of a middling margin, so that it is neither the easiest nor an accident.

    One whose answer reads the same backwards is passed over: it could not show how sums are written.
    """
    rows = cells[0].behaviour
    rows = rows[(rows.kind == "conflict") & (rows.split == "test") & rows.behaviour.isin(["memorized", "generalized"])]
    answers = rows.generalized.str.strip()
    rows = rows[answers != answers.str[::-1]]
    if rows.empty:
        return None
    distance = rows.margin.astype(float).abs()
    row = rows.iloc[int((distance - distance.median()).abs().to_numpy().argmin())]
    return _shown(row, [(row.prompt, "")], row.behaviour)


def _shown(row: pd.Series, pieces: Pieces, behaviour: str) -> Shown:
    """A prompt with every place marked that spells out the answer to be worked out."""
    generalized = row.generalized.strip()
    word = re.compile(rf"(?<!\w)({re.escape(generalized)})(?!\w)")
    cut = [(part, what, number % 2) for text, what in pieces for number, part in enumerate(word.split(text)) if part]
    marked = [(part, f"{what} clue".strip() if is_clue else what) for part, what, is_clue in cut]
    return Shown(marked, row.memorized.strip(), generalized, behaviour, reversed_sum(row["item"], generalized))


def some_pairs(cells: Sequence[Cell], most: int = 3) -> list[tuple[Shown, Shown]]:
    """Test pairs of different groups: (the phrasing that is remembered, the one that is worked out)."""
    rows = cells[0].pairs
    rows = rows[(rows.split == "test") & rows.is_pair.astype(bool)].drop_duplicates("group").head(most)
    found = []
    for _, row in rows.iterrows():
        a, b = difference(row.prompt_a, row.prompt_b)
        shown = [_shown(row, pieces, behaviour) for pieces, behaviour in ((a, row.behaviour_a), (b, row.behaviour_b))]
        first, second = sorted(shown, key=lambda side: side.behaviour, reverse=True)  # "memorized" comes first
        found.append((first, second))
    return found


def difference(a: str, b: str) -> tuple[Pieces, Pieces]:
    """Both texts with what differs marked: sentences or words that change places, else words that are not the same."""
    first, second = SENTENCE.split(a), SENTENCE.split(b)
    if sorted(first) != sorted(second):
        first, second = WORD.findall(a), WORD.findall(b)
    matches: list[tuple[str, int, int, int, int]]
    if sorted(first) == sorted(second):  # the same parts in another order: mark those that moved
        matches = [("equal" if x == second[i] else "replace", i, i + 1, i, i + 1) for i, x in enumerate(first)]
    else:
        matches = [(match[0], *match[1:]) for match in SequenceMatcher(None, first, second, False).get_opcodes()]
    marked: tuple[Pieces, Pieces] = ([], [])
    for kind, *bounds in matches:
        for side, parts, (start, end) in ((0, first, bounds[:2]), (1, second, bounds[2:])):
            text = "".join(parts[start:end])
            if text:
                marked[side].append((text, "" if kind == "equal" or text.isspace() else "moved"))
    return marked


def reversed_sum(item: str, generalized: str) -> str:
    """For a sum written last digit first, what it stands for: ``123 + 456 = 579 is written 975``; else empty."""
    operands = re.fullmatch(r"(\d+)\+(\d+)", item)
    total = str(int(operands[1]) + int(operands[2])) if operands else ""
    if operands is None or total == total[::-1] or generalized != total[::-1]:
        return ""
    return f"Sums are written last digit first: {operands[1]} + {operands[2]} = {total} is written {generalized}."
