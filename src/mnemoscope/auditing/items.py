"""Items of a benchmark with fresh variants, whose right answers are known."""

from __future__ import annotations

from dataclasses import dataclass

from mnemoscope.runs.errors import InputError


@dataclass(frozen=True, slots=True)
class Variant:
    """A question and its right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Item:
    """An item as it was published, and its variants, none of which has the same answer or prompt.

    Raises InputError where one has: what is answered with it would say nothing.
    """

    item: str
    prompt: str
    answer: str
    variants: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        for number, variant in enumerate(self.variants, 1):
            if variant.answer.strip() == self.answer.strip():
                same = f"has the original's answer {self.answer.strip()!r}, so it cannot show which of the two it was"
                raise InputError(f"items: variant {number} of {self.item!r} {same}")
            if variant.prompt == self.prompt:
                raise InputError(f"items: variant {number} of {self.item!r} asks what the original asks")
