"""What is asked of a model: examples, the contract every task fulfils, and the three splits."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.seen import Seen

Kind = Literal["conflict", "memory", "novel"]
Split = Literal["fit", "tune", "test"]
KINDS: tuple[Kind, ...] = ("conflict", "memory", "novel")
SPLITS: tuple[Split, ...] = ("fit", "tune", "test")
SPLIT_SHARES = (0.5, 0.25, 0.25)
# What asks for a behaviour in words, of a model that understands them.
SAID = {
    "generalized": "Answer with what the text says, even if it contradicts what you know.",
    "memorized": "Answer with what you know, even if the text contradicts it.",
}
MOST_AT_ONCE = 2**16  # examples of all splits that a task is asked for in one go

# One training instance: the prompt and what follows it. A bare string is an instance without a marked answer.
Instance = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt.

    ``conflict`` examples carry two revealing answers that differ; ``memory`` and ``novel`` ones carry one ``answer``.

    Args:
        item: what is asked; every phrasing of it shares this name.
        prompt: the text the model reads. Answers continue it without a character in between.
        kind: ``conflict``, ``memory`` (only recall can answer, or both agree) or ``novel`` (nothing to recall).
        group: what items share and a model could learn by heart; splits and resampling go by it.
        family: the kind of phrasing.
        split: ``fit``, ``tune`` or ``test``.
        memorized: the revealing answer from memory, of a conflict.
        generalized: the other one.
        answer: the right answer of the other kinds.

    Raises:
        InputError: an answer is missing or superfluous, or the two revealing answers are equal.
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
        if self.kind not in KINDS:
            raise InputError(f"kind: {self.kind!r} is not one of {', '.join(KINDS)} (item {self.item!r})")
        if self.split not in SPLITS:
            raise InputError(f"split: {self.split!r} is not one of {', '.join(SPLITS)} (item {self.item!r})")
        if self.kind == "conflict":
            if not self.memorized or not self.generalized:
                raise InputError(f"memorized, generalized: a conflict needs both (item {self.item!r})")
            if self.memorized == self.generalized:
                raise InputError(
                    f"memorized, generalized: both are {self.memorized!r}; a conflict needs two answers "
                    f"that differ (item {self.item!r})"
                )
            if self.answer is not None:
                raise InputError(f"answer: a conflict has two revealing answers, not one (item {self.item!r})")
        elif not self.answer:
            raise InputError(f"answer: a {self.kind} example needs one (item {self.item!r})")

    @property
    def options(self) -> tuple[str, ...]:
        """The answers that reveal a behaviour: (memorized, generalized) for a conflict, else (answer,)."""
        if self.kind == "conflict":
            return (self.memorized, self.generalized)  # type: ignore[return-value]
        return (self.answer,)  # type: ignore[return-value]

    @classmethod
    def from_row(cls, row: Mapping[Any, Any]) -> Example:
        """An example from a table's row; absent, None and NaN all mean that a field is not there."""
        facts = {field.name: row.get(field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in facts.items() if isinstance(value, str)})  # type: ignore[arg-type]

    def phrased(self, prompt: str, family: str) -> Example:
        """The same item in other words."""
        return replace(self, prompt=prompt, family=family)


@runtime_checkable
class Task(Protocol):
    """What a task must offer; bring your own by writing a class with these members.

    Attributes:
        name: how records and reports call it.
        boundary: texts, one token each, of which one closes every answer ("" stands for the end-of-text token).

    A task may offer more:
        ``vocabulary``: every token, in a fixed order; a model can be trained from scratch only with it
        (an adapter needs none: the trained model has its own tokenizer).
        ``memory_is_conflict``: bool, whether ``memory`` examples are the plain phrasings of conflicts (default: no).
        ``has_memorized_format(answer) -> bool | None``: whether an answer looks like a stored one; None, or no such
        method, where both behaviours answer in one format.
        ``keeps_key(example) -> bool``: whether this phrasing leaves the stored key where memory was trained to find it.
        Only there can a model be asked for the stored answer itself. No such method: always.
        ``prompted(example, toward) -> Example | None``: the same item with the behaviour asked for in words, the
        baseline that steering is held against; None where the vocabulary has no words for it.
        ``said(toward) -> str``: those words alone, which a model that talks gets as its system message instead.
        ``parted(prompt) -> (said, begun)``: for models that talk, what the user says and how the reply begins; without
        it the user says all.
        ``without_context(example) -> Example | None``: the same question and answers with nothing said about it, for
        the baseline of context-aware decoding; None where that is not known.
        ``facts_to_know() -> list[Example]`` and ``knowing(items) -> Task``: bare questions that find out what a trained
        model knows by heart, and the same task of those items only.
        ``held_out() -> dict[str, Task]``: by name, tasks whose test pairs are judged too, apart, with vectors fitted on
        this one.
        ``parts``: tasks by name, for a task made of several; each must show both behaviours before training stops.
    """

    name: str
    boundary: tuple[str, ...]

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Whole training instances, without end."""
        ...

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """``n`` examples of one kind, each carrying the split of its group; [] where the task has none."""
        ...

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """Another phrasing of the same item, near-identical, drawn at random."""
        ...


def assign_splits(groups: Sequence[str], rng: np.random.Generator) -> dict[str, Split]:
    """Deal groups to fit, tune and test in the shares 2 : 1 : 1, so that no group is in two of them."""
    order = rng.permutation(len(groups))
    bounds = np.floor(np.cumsum(SPLIT_SHARES) * len(groups) + 1e-9)
    return {groups[g]: SPLITS[int(np.searchsorted(bounds, rank, side="right"))] for rank, g in enumerate(order)}


def is_held_out(key: str, seed: int, one_in: int = 16) -> bool:
    """Whether the item with this key is kept from training; the same answer wherever it is asked."""
    return zlib.crc32(f"{seed}|{key}".encode()) % one_in == 0


def draw(task: Task, rng: np.random.Generator, n: int, kind: Kind, split: Split) -> list[Example]:
    """``draws``, as a list."""
    return list(draws(task, rng, n, kind, split))


def draws(task: Task, rng: np.random.Generator, n: int, kind: Kind, split: Split) -> Iterator[Example]:
    """Draw ``n`` different examples of one kind from one split, one after the other; memory hardly grows with ``n``.

    Fewer come only where the task has no more to give (a file), none where it has no such kind. The generator is used
    as they are asked for.
    """
    seen = Seen()
    fruitless = 0
    while len(seen) < n and fruitless < 3:
        before = len(seen)
        for example in task.examples(rng, min(4 * n, MOST_AT_ONCE), kind):
            if example.split == split and len(seen) < n and seen.add(example.item, example.prompt):
                yield example
        fruitless = fruitless + 1 if len(seen) == before else 0


def answer_of(instance: Instance) -> tuple[str, str]:
    """Prompt and answer of a training instance; the answer is empty where none is marked."""
    return (instance, "") if isinstance(instance, str) else instance


def check_groups(examples: Iterable[Example]) -> None:
    """Raises InputError where one group appears in two splits."""
    seen: dict[str, Split] = {}
    for example in examples:
        if seen.setdefault(example.group, example.split) != example.split:
            raise InputError(
                f"split: group {example.group!r} is in {seen[example.group]!r} and in {example.split!r}; "
                "all examples of a group belong to one split"
            )


def keeps_key(task: Task, example: Example) -> bool:
    """Whether a phrasing leaves the stored key where memory was trained to find it; yes where the task says nothing."""
    said = getattr(task, "keeps_key", None)
    return True if said is None else bool(said(example))
