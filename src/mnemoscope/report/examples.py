"""Real examples from the records, cut into pieces that the page can mark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import pandas as pd

from mnemoscope.report.records import DIRECTIONS, Cell

# (text, what it is): "" plain, "moved" differs between two phrasings, "clue" spells out the answer to be worked out.
Pieces = list[tuple[str, str]]

# Splitting keeps what is between sentences, so that the parts join to the whole text again.
SENTENCE = re.compile(r"(\s*[.?!\n]+\s*)")
WORD = re.compile(r"\d+|[^\W\d]+|\s+|.", re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """One prompt, and what the model makes of it.

    Attributes:
        item: what is asked.
        pieces: the prompt.
        memorized, generalized: the two revealing answers.
        behaviour: which one the model gave.
    """

    item: str
    pieces: Pieces
    memorized: str
    generalized: str
    behaviour: str


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
    generalized = row.generalized.strip()
    return Shown(row["item"], _clues(pieces, generalized), row.memorized.strip(), generalized, behaviour)


def some_pairs(cells: Sequence[Cell], most: int = 3) -> list[tuple[Shown, Shown]]:
    """Test pairs of different groups: (the phrasing that is remembered, the one that is worked out)."""
    rows = cells[0].pairs
    rows = rows[(rows.split == "test") & rows.is_pair.astype(bool)].drop_duplicates("group").head(most)
    return [_pair(row) for _, row in rows.iterrows()]


def _pair(row: pd.Series) -> tuple[Shown, Shown]:
    a, b = difference(row.prompt_a, row.prompt_b)
    shown = [_shown(row, pieces, behaviour) for pieces, behaviour in ((a, row.behaviour_a), (b, row.behaviour_b))]
    first, second = sorted(shown, key=lambda side: side.behaviour, reverse=True)  # "memorized" before "generalized"
    return first, second


@dataclass(frozen=True)
class Written:
    """What a model writes behind a prompt, by itself and steered.

    Attributes:
        toward: the behaviour steered to.
        plain, steered: the texts, the two revealing answers marked where they stand.
    """

    prompt: str
    toward: str
    plain: Pieces
    steered: Pieces


def written(cells: Sequence[Cell]) -> list[Written]:
    """Every sample of the first cell; none was picked by what came out."""
    if cells[0].samples is None:
        return []
    rows = cells[0].samples.to_dict("records")
    return [
        Written(
            str(row["prompt"]),
            DIRECTIONS[str(row["direction"])][0],
            *(
                _answers(str(row[key]), row["memorized"].strip(), row["generalized"].strip())
                for key in ("plain", "steered")
            ),
        )
        for row in rows
    ]


def _answers(text: str, memorized: str, generalized: str) -> Pieces:
    """The text with every place marked that spells out one of the answers."""
    kinds = {memorized: "memorized", generalized: "generalized"}
    word = re.compile("|".join(rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in kinds))
    pieces: Pieces = []
    done = 0
    for found in word.finditer(text):
        pieces += [(text[done : found.start()], ""), (found[0], kinds[found[0]])]
        done = found.end()
    return [piece for piece in [*pieces, (text[done:], "")] if piece[0]]


def difference(a: str, b: str) -> tuple[Pieces, Pieces]:
    """Both texts with what differs marked: sentences or words that change places, else words that are not the same."""
    first, second = SENTENCE.split(a), SENTENCE.split(b)
    if sorted(first) != sorted(second):
        first, second = WORD.findall(a), WORD.findall(b)
    parts = (first, second)
    matches: list[tuple[str, int, int, int, int]]
    if sorted(first) == sorted(second):  # the same parts in another order: mark those that moved
        matches = [("equal" if x == second[i] else "replace", i, i + 1, i, i + 1) for i, x in enumerate(first)]
    else:
        matches = [(match[0], *match[1:]) for match in SequenceMatcher(None, first, second, False).get_opcodes()]
    marked: tuple[Pieces, Pieces] = ([], [])
    for kind, *bounds in matches:
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            text = "".join(parts[side][start:end])
            if text:
                marked[side].append((text, "" if kind == "equal" or text.isspace() else "moved"))
    return marked


def _clues(pieces: Pieces, answer: str) -> Pieces:
    """The pieces with every place marked that spells out the answer to be worked out."""
    word = re.compile(rf"(?<!\w)({re.escape(answer)})(?!\w)")
    cut = [(part, what, number % 2) for text, what in pieces for number, part in enumerate(word.split(text)) if part]
    return [(part, f"{what} clue".strip() if is_clue else what) for part, what, is_clue in cut]


def reversed_sum(shown: Shown) -> str:
    """For a sum written last digit first, what it stands for: ``123 + 456 = 579 is written 975``; else empty."""
    operands = re.fullmatch(r"(\d+)\+(\d+)", shown.item)
    total = str(int(operands[1]) + int(operands[2])) if operands else ""
    if operands is None or total == total[::-1] or shown.generalized != total[::-1]:
        return ""
    return f"{operands[1]} + {operands[2]} = {total} is written {shown.generalized}"
