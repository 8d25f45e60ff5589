"""Parts of texts that can be swapped: names and numbers, found by their form, and others of their kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

APOSTROPHES = "'\u2019"
WORD = rf"[A-ZÀ-ÖØ-Þ][\w{APOSTROPHES}-]*"
NAME = re.compile(rf"{WORD}(?:(?:\s(?:of|the|de|du|la|le|von|van|bin|di|da)){{0,2}}\s{WORD})*")
NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?![\w])")
YEAR = re.compile(r"1\d{3}|20\d{2}")
MOST = 400  # others that a span is compared with
# Words with a capital that name nothing where they begin a sentence.
BEGINNINGS = """A According After Although An And Another Answer As At Because Before Both But By Context Document
During Each For From He Her His How I If In It Its Most My No Not Of On One Or Our Question She Since So Some That The
Their Then There These They This Those Though To Under Until We What When Where Which While Who Why With Yes You Your"""
PLAIN = set(BEGINNINGS.split())


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` of a text; ``kind``: ``name``, ``year`` or ``number``."""

    start: int
    end: int
    kind: str

    def of(self, text: str) -> str:
        """What stands there."""
        return text[self.start : self.end]


def spans_of(text: str) -> list[Span]:
    """Names and numbers of a text, in order.

    A name is a run of words with capitals. Words such as "The" that a run begins with are no part of it.
    """
    found = list[Span]()
    for match in NAME.finditer(text):
        start, end = match.span()
        while (word := re.match(r"\S+\s*", text[start:end])) and word[0].strip() in PLAIN:
            start += len(word[0])
        end -= 2 if text[start:end].endswith(tuple(f"{mark}s" for mark in APOSTROPHES)) else 0
        if start < end:
            found.append(Span(start, end, "name"))
    for match in NUMBER.finditer(text):
        found.append(Span(*match.span(), "year" if YEAR.fullmatch(match[0]) else "number"))
    return sorted(found, key=lambda span: span.start)


def mentions(text: str, what: str) -> list[tuple[int, int]]:
    """Where a text says something, as whole words, whatever its case."""
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(what)}(?!\w)", text, flags=re.IGNORECASE)]


def swapped(text: str, what: str, instead: str) -> str:
    """The text with something else in all its places; of a name of several words, where its last stands alone, too."""
    found = re.sub(rf"(?<!\w){re.escape(what)}(?!\w)", lambda _: instead, text, flags=re.IGNORECASE)
    last, other = what.split()[-1], instead.split()[-1]
    if last != what and last[0].isupper():
        found = re.sub(rf"(?<!\w){re.escape(last)}(?!\w)", lambda _: other, found)
    return found


@dataclass(frozen=True)
class Pool:
    """What spans are swapped with: those of other texts, by kind and number of words."""

    texts: Sequence[str]

    @cached_property
    def _known(self) -> dict[tuple[str, int], list[str]]:
        known: dict[tuple[str, int], set[str]] = {}
        for text in self.texts:
            for span in spans_of(text):
                what = span.of(text)
                known.setdefault((span.kind, len(what.split())), set()).add(what)
        return {kind: sorted(several) for kind, several in known.items()}

    def others(self, what: str, kind: str, apart: Iterable[str], rng: np.random.Generator) -> list[str]:
        """Others of its kind, at most ``MOST`` by chance.

        Left out is what shares a word with it, or stands in one of the texts ``apart``.
        """
        there = self._known.get((kind, len(what.split())), [])
        mine, texts = set(what.lower().split()), [text.lower() for text in apart]
        kept = [one for one in there if not mine & set(one.lower().split())]
        kept = [one for one in kept if not any(one.lower() in text for text in texts)]
        return [kept[n] for n in rng.permutation(len(kept))[:MOST]]
