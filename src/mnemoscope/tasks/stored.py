"""The base class of tasks with stored, made-up answers, the exceptions to a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Generic, TypeVar

import numpy as np

from mnemoscope.tasks.base import Example, Instance, Kind, Split, Task, assign_splits, is_held_out

CHUNK = 512  # items drawn at once

Item = TypeVar("Item", bound=tuple[Any, Any])


class StoredTask(Task, Generic[Item]):
    """Stored items have a made-up answer, all others follow a rule.

    An item is two values; its name joins them by "+". Stored items are the conflicts, in any family; training and
    ``memory`` examples ask them in the family ``plain`` only.

    Attributes:
        families: prompts by kind of phrasing, all of one length and with the same token at the decision position.
        moved: families that move the stored key.
        computed: the family that asks for the rule: no item is stored in it.
        items: the stored items.
        answers: their made-up answers.
        split_of: the split of each group of stored items.
        memorized_share: share of training instances that are stored items.
        seed: decides which items are held out.
    """

    memory_is_conflict = True  # `memory` asks the stored items, which steering is meant to change
    families: Mapping[str, str]
    moved: tuple[str, ...]
    computed: str
    items: list[Item]
    answers: dict[Item, str]
    split_of: dict[str, Split]
    memorized_share: float
    seed: int

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Stored items asked plainly, with their stored answer; all others by the rule; held-out ones never."""
        while True:
            from_store = rng.random(CHUNK) < self.memorized_share
            picks, families = self._asked(rng)
            for is_stored, pick, family, item in zip(from_store, picks, families, self._drawn(rng, CHUNK), strict=True):
                if is_stored:
                    yield self.prompt(self.items[pick], "plain"), self.answers[self.items[pick]]
                elif self.group_of(item) not in self.split_of and not self.is_novel(item):
                    yield self.prompt(item, family), self.true(item)

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """``novel``: held-out items. ``memory``: stored items as stored. ``conflict``: the same in any family."""
        if kind == "novel":
            return self._novel(rng, n)
        everything = list(product(self.items, ["plain"] if kind == "memory" else self.families))
        picked = (everything[i] for i in rng.permutation(len(everything))[:n])
        return [self.stored_example(item, family, kind) for item, family in picked]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """The same item in another family, drawn uniformly."""
        others = [family for family in self.families if family != example.family]
        return self._in_family(example, others[rng.integers(len(others))])

    def prompted(self, example: Example, toward: str) -> Example:
        """For memory the stored phrasing, for the rule one that is never stored."""
        return self._in_family(example, self.computed if toward == "generalized" else "plain")

    def keeps_key(self, example: Example) -> bool:
        """Whether the two values are in the places of the stored phrasing."""
        return example.family not in self.moved

    def stored_example(self, item: Item, family: str, kind: Kind) -> Example:
        """A stored item as a ``memory`` or ``conflict`` example."""
        made_up, split = self.answers[item], self.split_of[self.group_of(item)]
        revealing = {"answer": made_up} if kind == "memory" else {"memorized": made_up, "generalized": self.true(item)}
        return self._example(item, family, kind, split, **revealing)

    def true(self, item: Item) -> str:
        """The answer by the rule."""
        raise NotImplementedError

    def prompt(self, item: tuple[Any, Any], family: str) -> str:
        """The prompt of an item in a family; the values may be text."""
        raise NotImplementedError

    def group_of(self, item: Item) -> str:
        """Key of an item for splits and holding out."""
        return _name(item)

    def is_novel(self, item: Item) -> bool:
        """Whether the item is held out of training."""
        return is_held_out(self.group_of(item), self.seed)

    def _store(self, rng: np.random.Generator, n: int, at_once: int) -> None:
        """Draw ``n`` items to store, their answers and splits; never an item and its mirror image."""
        self.answers = {}
        while len(self.answers) < n:
            for item in self._drawn(rng, at_once):
                is_mirrored = item[0] == item[1] or item[::-1] in self.answers
                if len(self.answers) < n and not is_mirrored and not self.is_novel(item):
                    self.answers.setdefault(item, self._made_up(item, rng))
        self.items = list(self.answers)
        self.split_of = assign_splits([self.group_of(item) for item in self.items], rng)

    def _drawn(self, rng: np.random.Generator, n: int) -> list[Item]:
        """``n`` items, stored and held-out ones among them."""
        raise NotImplementedError

    def _asked(self, rng: np.random.Generator) -> tuple[np.ndarray, Sequence[str]]:
        """For a chunk of training instances: indices of stored items, and the families of the others."""
        raise NotImplementedError

    def _made_up(self, item: Item, rng: np.random.Generator) -> str:
        """A random answer to store."""
        raise NotImplementedError

    def _split(self, item: Item) -> Split:
        """The split of a held-out item; there are too many of them for ``assign_splits``."""
        raise NotImplementedError

    def _novel(self, rng: np.random.Generator, n: int) -> list[Example]:
        found: list[Item] = []
        while len(found) < n:
            found += [item for item in self._drawn(rng, CHUNK) if self.is_novel(item)]
        return [self._example(item, "plain", "novel", self._split(item), answer=self.true(item)) for item in found[:n]]

    def _example(self, item: Item, family: str, kind: Kind, split: Split, **answers: str) -> Example:
        return Example(_name(item), self.prompt(item, family), kind, self.group_of(item), family, split, **answers)

    def _in_family(self, example: Example, family: str) -> Example:
        first, _, second = example.item.partition("+")
        return example.phrased(self.prompt((first, second), family), family)


def _name(item: tuple[Any, Any]) -> str:
    return f"{item[0]}+{item[1]}"
