"""Lists of changed test prompts, on which a method should hold as well: what nothing was fitted on or worded like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from mnemoscope.arena.lists import Bench, Prompts
from mnemoscope.behaviour import encode
from mnemoscope.errors import InputError
from mnemoscope.tasks import Example, Task, draw

SHOTS = 3  # solved questions before the one that is asked
FOREIGN = "Réponds à la question suivante en un seul mot."
# Around the quoted text of a longer prompt: it speaks of nothing that is asked.
BEFORE = (
    "The reading room opens at nine and closes at six. Visitors leave their bags at the desk and may borrow a pencil. "
    "In winter the heating is turned on an hour earlier. "
)
BEHIND = (
    "The garden behind the building is open to everybody. There are benches under the trees, and a small fountain that "
    "is switched off at night. Dogs must be kept on a lead. "
)


def varied_lists(bench: Bench) -> dict[str, Prompts]:
    """By name, the lists of changed prompts that this task allows: the same number of test conflicts each."""
    n = bench.config.varied
    if not n:
        return {}
    first = bench.test["conflict"].of(np.arange(min(n, len(bench.test["conflict"]))))
    lists = {f"held-out {name}": list(_drawn(bench, task, n)) for name, task in bench.task.held_out().items()}
    rng = np.random.default_rng([bench.config.seed, 32])
    lists["paraphrase"] = [(bench.task.rephrase(example, rng), None) for example in first.examples]
    solved = _solved(bench)
    changes: dict[str, Callable[[int], str]] = {
        "longer text": lambda i: first.quoted[i].with_text(_padded(first.quoted[i].text)),
        "few-shot": lambda i: "\n\n".join([*solved, first.examples[i].prompt]),
        "instruction in French": lambda i: f"{FOREIGN}\n{first.examples[i].prompt}",
        "both answers": lambda i: first.quoted[i].with_text(_both(first.quoted[i].text, first.examples[i])),
    }
    has_text = bool(len(first)) and all(quoted.text for quoted in first.quoted)
    for name, change in changes.items():
        if has_text or name in ("few-shot", "instruction in French"):
            found = zip(first.examples, first.bares, range(len(first)), strict=True)
            lists[name] = [(replace(e, prompt=change(i)), bare) for e, bare, i in found if change(i) != e.prompt]
    with_bares = {name: [(e, bare or _bare(bench.task, e)) for e, bare in found] for name, found in lists.items()}
    return {name: made for name, found in with_bares.items() if (made := _readable(bench, found))}


def _readable(bench: Bench, found: Sequence[tuple[Example, Example | None]]) -> Prompts | None:
    """The list, or None where it is empty or a prompt does not fit into the model's context."""
    try:
        encode(bench.asking, [example for example, _ in found])
    except InputError:
        return None
    return Prompts(bench.asking, *zip(*found, strict=True)) if found else None


def _drawn(bench: Bench, task: Task, n: int) -> Iterator[tuple[Example, None]]:
    for example in draw(task, np.random.default_rng([bench.config.seed, 33]), n, "conflict", "test"):
        yield example, None


def _bare(task: Task, example: Example) -> Example | None:
    """The bare question of an example, its own or that of the task with the other items."""
    return task.without_context(example)


def _solved(bench: Bench) -> list[str]:
    """Bare questions of the tune split with their answers, of different groups."""
    by_group = {e.group: e for e in bench.tune["bare"].examples}
    return [f"{e.prompt}{e.answer}" for e in list(by_group.values())[:SHOTS]]


def _padded(text: str) -> str:
    """A text with others before and behind it, a paragraph each."""
    return f"{BEFORE.strip()}\n{text.rstrip()}\n{BEHIND.strip()}"


def _both(text: str, example: Example) -> str:
    """A text that gives the generalized answer, then the memorized one in the same words."""
    said, known = (str(answer).strip() for answer in (example.generalized, example.memorized))
    return f"{text.rstrip()} {text.strip().replace(said, known)}" if said in text else text
