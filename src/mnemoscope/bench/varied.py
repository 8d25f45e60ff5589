"""Lists of changed test prompts, on which a method should hold as well; paraphrases are drawn as those of the fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from mnemoscope.behaviour import encode, written
from mnemoscope.bench.lists import DrawnBench
from mnemoscope.bench.prompts import ELSEWHERE, Prompts
from mnemoscope.models import context_length
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example, Task, draw

SHOTS = 3  # solved questions before the one that is asked
FOREIGN = "Réponds à la question suivante en un seul mot.\n"  # an instruction in another language


Found = list[tuple[Example, Example | None]]  # examples with their bare questions


def varied_lists(bench: DrawnBench) -> dict[str, Prompts]:
    """By name, the lists of changed prompts that this task allows: ``varied`` test conflicts each, at most."""
    n = bench.config.varied
    if not n:
        return {}
    first, task = bench.test["conflict"].of(np.arange(min(n, len(bench.test["conflict"])))), bench.of_known
    lists: dict[str, Found] = {
        f"held-out {name}": [(example, task.without_context(example)) for example in _drawn(bench, other, n)]
        for name, other in task.held_out().items()
    }
    rng = np.random.default_rng([bench.config.seed, 32])
    rephrased = [task.rephrase(example, rng) for example in first.examples]
    lists["paraphrase"] = [(example, task.without_context(example)) for example in rephrased]
    for name, beginning in (
        ("few-shot", "".join(f"{one}\n\n" for one in _solved(bench))),
        ("instruction in French", FOREIGN),
    ):
        lists[name] = [(_begun(e, beginning), bare and _begun(bare, beginning)) for e, bare in _pairs(first)]
    texts: dict[str, Callable[[str, Example], str | None]] = {"longer text": _padded, "both answers": _both}
    if bench.config.long:
        texts |= _long(bench)
    for name, change in texts.items():
        lists[name] = [
            (replace(example, prompt=quoted.with_text(text)), bare)
            for (example, bare), quoted in zip(_pairs(first), first.quoted, strict=True)
            if quoted.text and (text := change(quoted.text, example))
        ]
    return {name: made for name, found in lists.items() if (made := _readable(bench, found))}


def _pairs(prompts: Prompts) -> Found:
    return list(zip(prompts.examples, prompts.bares, strict=True))


def _begun(example: Example, beginning: str) -> Example:
    """The example with something before its prompt."""
    return replace(example, prompt=beginning + example.prompt)


def _readable(bench: DrawnBench, found: Found) -> Prompts | None:
    """The list, or None where it is empty or a prompt cannot be asked: most often it is longer than the context."""
    try:
        encode(bench.asking, [example for pair in found for example in pair if example])
    except InputError:
        return None
    return Prompts(bench.asking, [example for example, _ in found], [bare for _, bare in found]) if found else None


def _drawn(bench: DrawnBench, task: Task, n: int) -> list[Example]:
    return draw(task, np.random.default_rng([bench.config.seed, 33]), n, "conflict", "test")


def _solved(bench: DrawnBench) -> list[str]:
    """Bare questions of the tune split with their answers, of different groups."""
    by_group = {e.group: e for e in bench.tune["bare"].examples}
    return [f"{e.prompt}{e.answer}" for e in list(by_group.values())[:SHOTS]]


def _padded(text: str, example: Example) -> str:
    """A text with others before and behind it, a paragraph each."""
    return f"{ELSEWHERE[0]}\n{text.rstrip()}\n{ELSEWHERE[1]}"


def _long(bench: DrawnBench) -> dict[str, Callable[[str, Example], str]]:
    """A text first, in the middle, or last in a long one that the model wrote itself, without any prompt."""
    asking, tokens = bench.asking, bench.config.long
    if tokens >= (limit := context_length(asking.model)):
        raise InputError(f"long: {tokens} tokens; this model reads {limit}")
    ids_T = written(asking, 1, tokens, bench.config.seed + 35)[0, 1:].tolist()

    def amid(place: int, text: str, example: Example) -> str:
        parts = (ids_T[:place], ids_T[place:])
        before, behind = (asking.tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts)
        return "\n".join(filter(None, (before, text.rstrip(), behind)))

    places = {"first": 0, "in the middle": tokens // 2, "last": tokens}
    return {f"{where} of {tokens} tokens": partial(amid, place) for where, place in places.items()}


def _both(text: str, example: Example) -> str | None:
    """The text, then again with the memorized answer in it; None where it lacks the generalized one."""
    said, known = (str(answer).strip() for answer in (example.generalized, example.memorized))
    found = list(re.finditer(rf"(?<!\w){re.escape(said)}(?!\w)", text.strip()))
    if not found:
        return None
    place = found[-1]  # what is said last; before it a proverb may have the same word
    return f"{text.rstrip()} {text.strip()[: place.start()]}{known}{text.strip()[place.end() :]}"
