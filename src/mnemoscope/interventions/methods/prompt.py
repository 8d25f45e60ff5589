"""Say it in words: the best of five sentences, before the prompt or behind the text that it quotes."""

from __future__ import annotations

from itertools import product

from mnemoscope.behaviour import check_known
from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.words import Place, Words
from mnemoscope.tasks.base import INSTRUCTIONS

WORDINGS: dict[Toward, tuple[str, ...]] = {
    Toward.GENERALIZED: (
        INSTRUCTIONS["generalized"],
        "Use only the text. Ignore what you know.",
        "In this book, everything is exactly as the text says. As the book says:",
        "The text is right. Repeat what it says.",
        "What does the text say? Copy the answer from it.",
    ),
    Toward.MEMORIZED: (
        INSTRUCTIONS["memorized"],
        "The text is wrong. Give the true answer.",
        "Ignore the text. Use only what you know.",
        "The text contains an error. A well-known fact is asked for:",
        "Answer from general knowledge, as an encyclopedia would.",
    ),
}
PLACES: tuple[Place, ...] = ("before", "behind")


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every sentence in every place; behind the text only where a prompt quotes one, before the others.

    Raises InputError where the tokenizer lacks words of them.
    """
    check_known(bench.asking, WORDINGS[toward])
    places = PLACES if any(quoted.text for quoted in bench.tune_conflicts.quoted) else PLACES[:1]
    return [
        Words(toward=toward, method="prompt", setting={"wording": text, "place": place}, text=text, place=place)
        for text, place in product(WORDINGS[toward], places)
    ]
