"""Examples, the base class of tasks, and the splits fit, tune and test."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import Seen

Kind = Literal["conflict", "memory", "novel"]
Split = Literal["fit", "tune", "test"]
Side = Literal["", "a", "b"]
KINDS: tuple[Kind, ...] = ("conflict", "memory", "novel")
SPLITS: tuple[Split, ...] = ("fit", "tune", "test")
# Sentences that ask a model that follows instructions for one of the behaviours.
INSTRUCTIONS = {
    "generalized": "Answer with what the text says, even if it contradicts what you know.",
    "memorized": "Answer with what you know, even if the text contradicts it.",
}
# Examples of all splits requested from a task in one call; with few, a split that has some may look empty.
LEAST_AT_ONCE, MOST_AT_ONCE = 64, 2**16

# One training instance: the prompt and what follows it. A bare string is an instance without a marked answer.
Instance = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt.

    ``conflict`` examples carry two revealing answers; ``memory`` (only recall can answer, or both agree) and ``novel``
    ones (nothing to recall) carry one ``answer``.

    Args:
        item: name of what is asked; all its phrasings share it.
        prompt: the text the model reads. Answers continue it without a character in between.
        group: unit of splits and resampling: what items share and a model could learn by heart.
        family: kind of phrasing.
        memorized: the revealing answer from memory, of a conflict; ``generalized`` the other one.

    Raises InputError where an answer is missing or superfluous, or the two revealing answers are equal.
    """

    item: str
    prompt: str
    kind: Kind
    group: str
    family: str = "default"
    split: Split = "test"
    memorized: str | None = None
    generalized: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        wrong, both = "", (self.memorized, self.generalized)
        if self.kind not in KINDS:
            wrong = f"kind: {self.kind!r} is not one of {', '.join(KINDS)}"
        elif self.split not in SPLITS:
            wrong = f"split: {self.split!r} is not one of {', '.join(SPLITS)}"
        elif self.kind != "conflict":
            wrong = "" if self.answer else f"answer: a {self.kind} example needs one"
        elif not all(both):
            wrong = "memorized, generalized: a conflict needs both"
        elif both[0] == both[1]:
            wrong = f"memorized, generalized: both are {both[0]!r}; a conflict needs two answers that differ"
        elif self.answer is not None:
            wrong = "answer: a conflict has two revealing answers, not one"
        if wrong:
            raise InputError(f"{wrong} (item {self.item!r})")

    @property
    def options(self) -> tuple[str, ...]:
        """The answers that reveal a behaviour: (memorized, generalized) for a conflict, else (answer,)."""
        return (self.memorized, self.generalized) if self.kind == "conflict" else (self.answer,)  # type: ignore[return-value]

    def to_row(self, side: Side = "") -> dict[str, str | None]:
        """All fields by column name; a side appends ``_a`` or ``_b`` to the columns of the phrasing."""
        return {column: getattr(self, field) for field, column in _COLUMNS[side].items()}

    @classmethod
    def from_row(cls, row: Mapping[Any, Any], side: Side = "") -> Example:
        """The inverse of ``to_row``; absent, None and NaN mean no value. Both sides of a pair are conflicts."""
        found = {field: row.get(column) for field, column in _COLUMNS[side].items()}
        if side:
            found["kind"] = "conflict"
        return cls(**{field: value for field, value in found.items() if isinstance(value, str)})  # type: ignore[arg-type]

    def phrased(self, prompt: str, family: str) -> Example:
        """The same item with another prompt."""
        return replace(self, prompt=prompt, family=family)


# Column of each field, by side; the two phrasings of a pair differ in prompt and family only.
_COLUMNS: dict[Side, dict[str, str]] = {
    side: {f.name: f"{f.name}_{side}" if side and f.name in ("prompt", "family") else f.name for f in fields(Example)}
    for side in ("", "a", "b")
}


def as_bare(bare: Example) -> Example:
    """A conflict's bare question, with the one answer that memory has."""
    return replace(bare, kind="memory", family="bare", answer=bare.memorized, memorized=None, generalized=None)


class Task:
    """Base class of tasks: ``examples`` and ``rephrase`` are required, everything else has a default.

    Attributes:
        name: name of the task in records and reports.
        boundary: texts of one token each, one of which closes every answer ("" stands for the end-of-text token). None:
            an answer ends where its last word ends, whatever follows.
        vocabulary: every token, in a fixed order, to train a model from scratch; None where that is not possible.
            Adapters use the tokenizer of their model.
        memory_is_conflict: whether ``memory`` examples are the plain phrasings of conflicts.
        documents: whether conflicts quote a text: reports then speak of context and memory.
        begins_reply: whether ``split_reply`` returns beginnings of replies.
        instructions: sentences that ask for a behaviour, the system message of chat models; none by default.
        dials: options that may change while training instances are drawn, shares: 1 where larger ones teach memory, -1
            where they teach the rule.
        parts: tasks by name, of a task that consists of several; each must show both behaviours before training stops.
    """

    name: str = "own"
    boundary: tuple[str, ...] | None = ("",)
    vocabulary: Sequence[str] | None = None
    memory_is_conflict: bool = False
    documents: bool = False
    begins_reply: bool = False
    instructions: Mapping[str, str] = MappingProxyType({})
    dials: Mapping[str, int] = MappingProxyType({})
    parts: Mapping[str, Task] = MappingProxyType({})

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Endless stream of training instances; by default InputError: there is nothing to train on."""
        raise InputError(
            f"model: task {self.name!r} has nothing to train on; give the folder of a trained model, without lora"
        )

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """``n`` examples of one kind, each with the split of its group; [] where the task has none."""
        raise NotImplementedError

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """Another phrasing of the same item, as similar as possible, drawn at random."""
        raise NotImplementedError

    def has_memorized_format(self, answer: str) -> bool | None:
        """Whether an answer looks like a stored one; None where both behaviours answer in the same format."""
        return None

    def keeps_key(self, example: Example) -> bool:
        """Whether this phrasing leaves the stored key in its trained place, as steering towards memory needs."""
        return True

    def instruction(self, toward: str) -> str | None:
        """The sentence that asks for a behaviour; None without one."""
        return self.instructions.get(toward)

    def prompted(self, example: Example, toward: str) -> Example | None:
        """The same item in a prompt that asks for a behaviour, the baseline of steering; None without one."""
        instruction = self.instruction(toward)
        return replace(example, prompt=f"{instruction}\n{example.prompt}") if instruction else None

    def split_reply(self, prompt: str) -> tuple[str, str]:
        """A prompt as (user message, beginning of the reply), for chat models; by default all is the message."""
        return prompt, ""

    def without_context(self, example: Example) -> Example | None:
        """The same question without the context, for context-aware decoding; None where unknown."""
        return None

    def facts_to_know(self) -> list[Example]:
        """Bare questions that measure what a trained model knows by heart; [] where that does not matter."""
        return []

    def knowing(self, items: set[str]) -> Task:
        """The same task restricted to known items, named as in ``facts_to_know``."""
        return self

    def held_out(self) -> dict[str, Task]:
        """Tasks by name, on whose test pairs the vectors fitted on this one are judged separately."""
        return {}


def check_range(low: float, high: float, **options: float) -> None:
    """Raises InputError where one of the options lies outside of ``low`` .. ``high``."""
    for name, value in options.items():
        if not low <= value <= high:
            raise InputError(f"{name}: {value} is not between {low} and {high}")


def assign_splits(
    groups: Sequence[str], rng: np.random.Generator, shares: Sequence[float] = (0.5, 0.25, 0.25)
) -> dict[str, Split]:
    """The split of each group: a random partition into fit, tune and test in the given shares."""
    order = rng.permutation(len(groups))
    bounds = np.floor(np.cumsum(shares) * len(groups) + 1e-9)
    return {groups[g]: SPLITS[int(np.searchsorted(bounds, rank, side="right"))] for rank, g in enumerate(order)}


def is_held_out(key: str, seed: int, one_in: int = 16) -> bool:
    """Whether the item with this key is held out of training; a hash of seed and key decides."""
    return zlib.crc32(f"{seed}|{key}".encode()) % one_in == 0


def draw(task: Task, rng: np.random.Generator, n: int, kind: Kind, split: Split) -> list[Example]:
    """List of ``draws``."""
    return list(draws(task, rng, n, kind, split))


def draws(task: Task, rng: np.random.Generator, n: int, kind: Kind, split: Split) -> Iterator[Example]:
    """Stream ``n`` distinct examples of one kind from one split, in memory that hardly grows with ``n``.

    Fewer where the task has no more (a file), none where it has no such kind. ``rng`` is consumed lazily.
    """
    seen, fruitless = Seen(), 0
    while len(seen) < n and fruitless < 3:
        before = len(seen)
        for example in task.examples(rng, min(max(4 * n, LEAST_AT_ONCE), MOST_AT_ONCE), kind):
            if example.split == split and len(seen) < n and seen.add(example.item, example.prompt):
                yield example
        fruitless = fruitless + 1 if len(seen) == before else 0


def answer_of(instance: Instance) -> tuple[str, str]:
    """Prompt and answer of a training instance; the answer is empty where none is marked."""
    return (instance, "") if isinstance(instance, str) else instance


def examples_digest(task: Task, seed: int = 0) -> str:
    """SHA-256 of the first examples of a task, by which it is known again."""
    kinds: tuple[Kind, ...] = ("conflict", "memory")
    drawn = [example for kind in kinds for example in task.examples(np.random.default_rng(seed), 200, kind)]
    return hashlib.sha256("".join(f"{e.item}|{e.prompt}|{e.options}" for e in drawn).encode()).hexdigest()
