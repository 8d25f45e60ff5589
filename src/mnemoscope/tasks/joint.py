"""Several tasks as one: for one model that is trained on them, or one fit of a model that there is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.base import Example, Instance, Kind, Task
from mnemoscope.tasks.registry import build_task, check_allowed, described_task
from mnemoscope.tasks.tables import is_file_of_rows

Answer = TypeVar("Answer")
NAMED = ("item", "group", "family")  # what is prefixed
CHUNK = 512  # instances whose parts are drawn at a time
DEFAULT_PARTS: dict[str, dict[str, Any]] = {"inference": {}, "addition-digits": {}, "cipher": {}}


@dataclass(eq=False)
class JointTask(Task):
    """Several tasks as one, each with its own answers.

    Items, groups and families are prefixed with their part: ``cipher/abcd+3``. Prompts and answers are those of the
    part alone. Methods that take an example are those of its part; methods that take a text return what all parts agree
    on, else the default.

    Args:
        parts: options of each task, by its name, or by the path of a file of rows, which is named as the file is.
        shares: parts of the training instances, by name; they add up to 1. Default: equal.
        first: by name, how many instances of a part come before all parts are mixed.
        seed: that of every part, so that each is the task it would be alone.

    It can be trained on where all parts can. Raises InputError where a part cannot be made, two have one name, or
    ``shares`` or ``first`` do not fit the parts.
    """

    name = "joint"

    parts: Any = None  # the tasks by name, once they are made
    shares: Any = None
    first: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = DEFAULT_PARTS if self.parts is None else self.parts
        if not isinstance(given, Mapping) or not all(isinstance(o, dict | None | Task) for o in given.values()):
            raise InputError(f"parts: {given!r} is not a mapping of task names to their options")
        if not given or "joint" in given:
            raise InputError(f"parts: {', '.join(given) or 'none'}; at least one task is wanted, and not joint itself")
        named = {Path(name).stem if is_file_of_rows(name) else name: name for name in given}
        if len(named) < len(given):
            raise InputError(f"parts: {', '.join(given)}; files need names of their own")
        built = {name: _part(path, given[path], self.seed) for name, path in named.items()}
        names, shares, first = ", ".join(built), self.shares, dict(self.first or {})
        shares = dict.fromkeys(built, 1 / len(built)) if shares is None else shares
        fitting = isinstance(shares, Mapping) and set(shares) == set(built) and min(shares.values()) > 0
        if not fitting or abs(sum(shares.values()) - 1) > 1e-6:
            raise InputError(f"shares: {shares!r} are not one share above 0 for each of {names}, adding up to 1")
        if not set(first) <= set(built) or any(n < 0 for n in first.values()):
            raise InputError(f"first: {first!r} is no number of instances, 0 or more, for some of {names}")
        self.parts, self.shares, self.first = built, shares, first
        # An answer closes as its part closes it: no part trains another's ending.
        ends = [part.boundary for part in built.values()]
        self.boundary = None if None in ends else tuple(dict.fromkeys(text for end in ends for text in end or ()))
        words = [part.vocabulary for part in built.values()]
        self.vocabulary = None if None in words else list(dict.fromkeys(word for of in words for word in of or ()))
        self.documents = all(part.documents for part in built.values())
        self.memory_is_conflict = any(part.memory_is_conflict for part in built.values())
        self.begins_reply = all(part.begins_reply for part in built.values())

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Instances of the parts, mixed in their shares; before that, what comes first.

        Raises InputError where a part is no task to train on.
        """
        streams = {name: part.training(rng) for name, part in self.parts.items()}
        for name, n in self.first.items():
            yield from islice(streams[name], n)
        names = list(streams)
        while True:
            for pick in rng.choice(len(names), size=CHUNK, p=[self.shares[name] for name in names]):
                yield next(streams[names[pick]])

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """Equally many of each part, in random order; fewer of a part that has no more to give."""
        each = -(-n // len(self.parts))
        found = [_outside(name, e) for name, part in self.parts.items() for e in part.examples(rng, each, kind)]
        return [found[i] for i in rng.permutation(len(found))[:n]]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        return self._of_part(example, lambda part, inside: part.rephrase(inside, rng)) or example

    def has_memorized_format(self, answer: str) -> bool | None:
        return self._agreed(lambda part: part.has_memorized_format(answer))

    def keeps_key(self, example: Example) -> bool:
        name, inside = self.inside(example)
        return self.parts[name].keeps_key(inside)

    def instruction(self, toward: str) -> str | None:
        return self._agreed(lambda part: part.instruction(toward))

    def prompted(self, example: Example, toward: str) -> Example | None:
        return self._of_part(example, lambda part, inside: part.prompted(inside, toward))

    def split_reply(self, prompt: str) -> tuple[str, str]:
        return self._agreed(lambda part: part.split_reply(prompt)) or (prompt, "")

    def without_context(self, example: Example) -> Example | None:
        return self._of_part(example, lambda part, inside: part.without_context(inside))

    def facts_to_know(self) -> list[Example]:
        return [_outside(name, e) for name, part in self.parts.items() for e in part.facts_to_know()]

    def knowing(self, items: set[str]) -> Task:
        """The same of what is known of each part; InputError where a part has facts to know, and none is known."""
        known = copy.copy(self)
        known.parts = {
            name: part.knowing({item.removeprefix(f"{name}/") for item in items if item.startswith(f"{name}/")})
            for name, part in self.parts.items()
        }
        return known

    def held_out(self) -> dict[str, Task]:
        """By name, the held-out tasks of all parts that have one of that name."""
        found: dict[str, dict[str, Task]] = {}
        for name, part in self.parts.items():
            for held_out, task in part.held_out().items():
                found.setdefault(held_out, {})[name] = task
        return {held_out: JointTask(tasks) for held_out, tasks in found.items()}

    def inside(self, example: Example) -> tuple[str, Example]:
        """The name of the example's part, and the example as the part knows it."""
        name = example.item.partition("/")[0]
        names = {field: getattr(example, field).removeprefix(f"{name}/") for field in NAMED}
        return name, replace(example, **names)

    def _of_part(self, example: Example, ask: Callable[[Task, Example], Example | None]) -> Example | None:
        name, inside = self.inside(example)
        other = ask(self.parts[name], inside)
        return _outside(name, other) if other else None

    def _agreed(self, ask: Callable[[Task], Answer]) -> Answer | None:
        answers = [ask(part) for part in self.parts.values()]
        return answers[0] if all(answer == answers[0] for answer in answers) else None


def _outside(name: str, example: Example) -> Example:
    names: dict[str, Any] = {field: f"{name}/{getattr(example, field)}" for field in NAMED}
    return replace(example, **names)


def _part(name: str, given: Any, seed: int) -> Task:
    """A part by its task's name or its file; code of a user's own has to be allowed, as names may come from files."""
    if isinstance(given, Task):
        return given
    if is_file_of_rows(name):
        kind, options = described_task(name)
        return build_task(kind, options | (given or {}), seed)
    check_allowed(name)
    return build_task(name, given or {}, seed)
