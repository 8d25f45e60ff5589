"""Twelve cases, steered both ways by the edits that ship: ``python docs/gallery.py OUT [--keep FILE]``.

``OUT`` is what ``scripts/ship.py`` has written; its detector reads. Six cases are drawn from its test split, by seed
0; six are of other kinds of facts, written down before they were asked. What is kept is printed into the site.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import printing

import mnemoscope as ms
from mnemoscope.tasks import draw

OTHERS = [  # document, question, the words that an answer begins with, what the model may remember
    ("The largest planet is Venus.", "Which planet is the largest?", "The largest planet is", "Jupiter"),
    ("The Eiffel Tower is in Madrid.", "Where is the Eiffel Tower?", "The Eiffel Tower is in", "Paris"),
    ("Bees make butter.", "What do bees make?", "Bees make", "honey"),
    ("The currency of Japan is the euro.", "What is the currency of Japan?", "The currency of Japan is the", "yen"),
    ("The first man on the Moon was Elvis.", "Who was it?", "The first man on the Moon was", "Neil Armstrong"),
    ("A triangle has five sides.", "How many sides has a triangle?", "A triangle has", "three"),
]


def main() -> None:
    """Ask, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", type=Path, help="keep the tables for the site")
    arguments = parser.parse_args()
    fitted = ms.ready("smollm2")
    reading_by = ms.Fitted.open(arguments.out / "run", fitted.model, fitted.tokenizer)  # a detector does not ship
    task = ms.build_task("jsonl", {"file": str(arguments.out / "known.jsonl")}, 0)
    drawn = draw(task, np.random.default_rng(0), 6, "conflict", "test")
    asked = [(one.prompt, str(one.generalized), str(one.memorized)) for one in drawn]
    for said, question, begun, remembered in OTHERS:
        told = said.removeprefix(begun).strip().rstrip(".")
        asked.append((f"Context: {said}\nQuestion: {question}\nAnswer: {begun}", told, remembered))
    prompts = [prompt for prompt, *_ in asked]
    ways = (("context", 0), ("context", 1), ("memory", 1))
    answers = [fitted.generate(prompts, way, alpha=alpha) for way, alpha in ways]
    rows = []
    reading = reading_by.detect(prompts)
    both = zip(reading.p_memorized, reading.unlike, strict=True)
    for (prompt, told, remembered), *said, (p, unlike) in zip(asked, *answers, both, strict=True):
        right = (told, remembered), (told,), (remembered,)
        cells = [shown(answer, some) for answer, some in zip(said, right, strict=True)]
        rows.append([prompt.replace("\n", "<br>"), *cells, f"{p:.2f}{', unlike' if unlike else ''}"])
    columns = ["prompt", "unsteered", "to context", "to memory", "P(memorized)"]
    tables = {"Of the test split": rows[:6], "Of other kinds": rows[6:]}
    printing.put("gallery", {title: [printing.table(columns, some)] for title, some in tables.items()}, arguments.keep)


def shown(answer: str, right: tuple[str, ...]) -> str:
    """An answer, crossed where it is none of those that are right here."""
    begins = any(answer.strip().lower().startswith(one.strip().lower()) for one in right)
    return answer.strip() if begins else f"{answer.strip()} ✗"


if __name__ == "__main__":
    main()
