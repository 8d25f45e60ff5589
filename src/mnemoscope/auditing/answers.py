"""Answers in replies: how each kind is found, and when two are the same."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from mnemoscope.behaviour import phrase_of

Kind = Literal["number", "choice", "short"]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")
STATED = (re.compile(r"####\s*(.+)"), re.compile(r"\\boxed\{([^{}]*)\}"), re.compile(r"(?i)answer\s*(?:is|:)\s*(.+)"))
CHOICE = re.compile(r"\(([A-Z])\)|\b([A-Z])\b(?=[).:,]|\s*$)", re.MULTILINE)


def found_in(reply: str, kind: Kind) -> str | None:
    """The answer of a reply in its normal form; None where it has none.

    ``number``: the last one behind the last ``####``, else in the last ``\\boxed{}``, else on the line of the last
    "answer is" or "answer:", else of all. ``choice``: the last letter in brackets, or alone before a mark, in the same
    places. ``short``: the first phrase.
    """
    if kind == "short":
        return normal(phrase_of(reply), kind) or None
    told = next((lines[-1] for pattern in STATED if (lines := pattern.findall(reply))), None)
    for text in (told, reply) if told is not None else (reply,):
        parts = NUMBER.findall(text) if kind == "number" else ["".join(two) for two in CHOICE.findall(text)]
        if parts:
            return normal(parts[-1], kind)
    return None


def states_one(reply: str, kind: Kind) -> bool:
    """Whether a reply says which of its numbers or letters is its answer; a short one begins with it."""
    return kind == "short" or any(pattern.search(reply) for pattern in STATED)


def stated(answer: str, kind: Kind) -> str:
    """A right answer as it would be found: "18 dollars" is 18."""
    return found_in(answer, kind) or normal(answer, kind)


def label_of(found: str | None, own: str, original: str, place: int) -> str:
    """``right`` or ``wrong`` of an original (place 0); of a variant ``solved``, ``recited`` or ``neither``."""
    if not place:
        return "right" if found == own else "wrong"
    return "solved" if found == own else "recited" if found == original else "neither"


def normal(answer: str, kind: Kind) -> str:
    """An answer in the form in which two are compared: a number by its value, words in lower case."""
    text = answer.strip()
    if kind == "number":
        plain = text.replace(",", "").strip("$€£% ")
        try:
            return str(Fraction(plain))
        except (ValueError, ZeroDivisionError):
            return plain
    if kind == "choice":
        return text.strip("().: ")
    return "".join(text.casefold().strip(".,;:!?\"' ").split())  # some tokenizers drop spaces
