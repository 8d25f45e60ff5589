"""Real examples from the records, cut into pieces that the page can mark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import pandas as pd

from mnemoscope.report.records import Cell

# (text, what it is): "" plain, "moved" differs between the two phrasings, "clue" spells out the answer to be worked out.
Pieces = list[tuple[str, str]]

# Splitting keeps what is between sentences, so that the parts join to the whole text again.
SENTENCE = re.compile(r"(\s*[.?!\n]+\s*)")
WORD = re.compile(r"\d+|[^\W\d]+|\s+|.", re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """One prompt, and what the model makes of it.

    Attributes:
        pieces: the prompt.
        memorized, generalized: the two revealing answers.
        behaviour: which one the model gave.
    """

    pieces: Pieces
    memorized: str
    generalized: str
    behaviour: str


def one_conflict(cells: Sequence[Cell]) -> Shown | None:
    """The first test conflict of a middling margin, so that it is neither the easiest nor an accident."""
    rows = cells[0].behaviour
    rows = rows[(rows.kind == "conflict") & rows.behaviour.isin(["memorized", "generalized"])]
    if rows.empty:
        return None
    distance = rows.margin.astype(float).abs()
    row = rows.loc[(distance - distance.median()).abs().idxmin()]
    return Shown(_clues([(row.prompt, "")], row.generalized), row.memorized.strip(), row.generalized.strip(), row.behaviour)


def some_pairs(cells: Sequence[Cell], most: int = 3) -> list[tuple[Shown, Shown]]:
    """Test pairs of different groups: (the phrasing that is remembered, the one that is worked out)."""
    rows = cells[0].pairs
    rows = rows[(rows.split == "test") & rows.is_pair.astype(bool)].drop_duplicates("group").head(most)
    return [_pair(row) for _, row in rows.iterrows()]


def _pair(row: pd.Series) -> tuple[Shown, Shown]:
    a, b = difference(row.prompt_a, row.prompt_b)
    shown = [
        Shown(_clues(pieces, row.generalized), row.memorized.strip(), row.generalized.strip(), behaviour)
        for pieces, behaviour in ((a, row.behaviour_a), (b, row.behaviour_b))
    ]
    first, second = sorted(shown, key=lambda side: side.behaviour, reverse=True)  # "memorized" before "generalized"
    return first, second


def difference(a: str, b: str) -> tuple[Pieces, Pieces]:
    """Both texts with what differs marked: whole sentences where they only change places, else words."""
    parts = [SENTENCE.split(text) for text in (a, b)]
    if sorted(parts[0]) != sorted(parts[1]):
        parts = [WORD.findall(text) for text in (a, b)]
        matches = SequenceMatcher(None, *parts, autojunk=False).get_opcodes()
    else:
        matches = [("equal" if x == y else "replace", i, i + 1, i, i + 1) for i, (x, y) in enumerate(zip(*parts, strict=True))]
    marked: tuple[Pieces, Pieces] = ([], [])
    for kind, *bounds in matches:
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            text = "".join(parts[side][start:end])
            if text:
                marked[side].append((text, "" if kind == "equal" or text.isspace() else "moved"))
    return marked


def _clues(pieces: Pieces, generalized: str) -> Pieces:
    """The pieces with every place marked that spells out the answer to be worked out."""
    word = re.compile(rf"(?<!\w)({re.escape(generalized.strip())})(?!\w)")
    cut = [(part, what, number % 2) for text, what in pieces for number, part in enumerate(word.split(text)) if part]
    return [(part, f"{what} clue".strip() if is_clue else what) for part, what, is_clue in cut]


def sums_are_reversed(cells: Sequence[Cell]) -> str | None:
    """For sums written last digit first, an example such as ``123 + 456 = 579 is written 975``; else None."""
    rows = cells[0].behaviour
    for item, written in rows[rows.kind == "conflict"][["item", "generalized"]].itertuples(index=False):
        operands = re.fullmatch(r"(\d+)\+(\d+)", item)
        if operands is None:
            return None
        total = str(int(operands[1]) + int(operands[2]))
        if total != total[::-1]:
            is_reversed = written.strip() == total[::-1]
            return f"{operands[1]} + {operands[2]} = {total} is written {written.strip()}" if is_reversed else None
    return None
