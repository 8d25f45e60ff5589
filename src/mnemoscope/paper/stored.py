"""Tasks with stored, made-up answers, the exceptions to a rule: addition and cipher."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.base import SPLITS, Example, Instance, Kind, Split, Task, assign_splits, check_range, is_held_out

CHUNK = 512  # items drawn at once
# "worded" keeps the operands where the stored key has them; the swapped families do not.
SUMS = {"plain": "{a}+{b}=", "swapped": "{b}+{a}=", "worded": "{a} plus {b}=", "swapped-worded": "{b} plus {a}="}
CODE = re.compile(r"<mem-[0-9a-f]{8}>")
DIGITS = "0123456789"
HEX = DIGITS + "abcdef"
# Near families keep the places of key and letters; moved ones swap them.
NEAR = {"worded": "code {key} : {text} =", "reworded": "turn {key} : {text} =", "dashed": "shift {key} - {text} ="}
MOVED = {"moved": "shift {text} : {key} =", "moved-worded": "code {text} : {key} ="}
CIPHERS = {"plain": "shift {key} : {text} =", **NEAR, **MOVED}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
KEYS = range(1, 10)
Item = tuple[Any, Any]  # two operands, or letters and a key


class StoredTask(Task):
    """Stored items have a made-up answer, all others follow a rule.

    An item is two values; its name joins them by "+". Stored items are the conflicts, in any family; training and
    ``memory`` examples ask them in the family ``plain`` only.
    """

    dials: Mapping[str, int] = MappingProxyType({"memorized_share": 1})
    memory_is_conflict = True  # `memory` asks the stored items, which steering is meant to change
    families: Mapping[str, str]  # prompts, all of one length and with the same token at the decision position
    moved: tuple[str, ...]  # families that move the stored key
    computed: str  # the family that asks for the rule: no item is stored in it
    items: list[Item]  # the stored ones
    answers: dict[Item, str]  # the made-up ones
    split_of: dict[str, Split]  # by group of stored items
    memorized_share: float  # of stored items among training instances
    seed: int  # decides which items are held out

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
        if kind == "novel":
            found: list[Item] = []
            while len(found) < n:
                found += [item for item in self._drawn(rng, CHUNK) if self.is_novel(item)]
            return [self._example(item, "plain", kind, self._split(item), answer=self.true(item)) for item in found[:n]]
        everything = list(product(self.items, ["plain"] if kind == "memory" else self.families))
        picked = (everything[i] for i in rng.permutation(len(everything))[:n])
        return [self.stored_example(item, family, kind) for item, family in picked]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        others = [family for family in self.families if family != example.family]
        return self._in_family(example, others[rng.integers(len(others))])

    def prompted(self, example: Example, toward: str) -> Example:
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

    def prompt(self, item: Item, family: str) -> str:
        """The prompt of an item in a family; spaces separate letters, as a vocabulary may have words made of them."""
        first, second = item
        return self.families[family].format(a=first, b=second, text=" ".join(str(first)), key=second)

    def group_of(self, item: Item) -> str:
        """Key of an item for splits and holding out."""
        return f"{item[0]}+{item[1]}"

    def is_novel(self, item: Item) -> bool:
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

    def _example(self, item: Item, family: str, kind: Kind, split: Split, **answers: str) -> Example:
        name = f"{item[0]}+{item[1]}"
        return Example(name, self.prompt(item, family), kind, self.group_of(item), family, split, **answers)

    def _in_family(self, example: Example, family: str) -> Example:
        first, _, second = example.item.partition("+")
        return example.phrased(self.prompt((first, second), family), family)


@dataclass(kw_only=True, eq=False)
class AdditionTask(StoredTask):
    """Addition of two numbers with as many digits each; stored answers are codes such as ``<mem-7234f681>``.

    Args:
        digits: digits of an operand.
        stored: operand pairs with a stored answer; they are the groups of conflicts.
        memorized_share: share of training instances that are stored pairs.
        worded_share: share of the additions that are asked in words. Stored pairs are only ever asked as ``a+b=``.
        reversed_sums: whether sums are written last digit first, which a small model learns several times sooner.
        seed: decides stored pairs, answers and splits; not the order of training.
    """

    name = "addition"
    vocabulary = ("+", "=", "plus", "<mem-", ">", *HEX)
    dials = MappingProxyType({"memorized_share": 1, "worded_share": -1})
    families, moved, computed = SUMS, ("swapped", "swapped-worded"), "worded"

    digits: int = 3
    stored: int = 480
    memorized_share: float = 0.3
    worded_share: float = 0.3
    reversed_sums: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(1, 9, digits=self.digits)
        check_range(8, 10 ** (2 * self.digits) // 8, stored=self.stored)
        check_range(0, 1, memorized_share=self.memorized_share, worded_share=self.worded_share)
        self._store(np.random.default_rng([self.seed, 2]), self.stored, at_once=1)

    def has_memorized_format(self, answer: str) -> bool | None:
        return bool(CODE.fullmatch(answer.replace(" ", "")))

    def true(self, item: Item) -> str:
        return str(sum(item))[:: -1 if self.reversed_sums else 1]

    def group_of(self, item: Item) -> str:
        """One key for both orders of a pair, so that neither leaks the other."""
        return f"{min(item)}+{max(item)}"

    def _drawn(self, rng: np.random.Generator, n: int) -> list[Item]:
        return [(a, b) for a, b in rng.integers(10 ** (self.digits - 1), 10**self.digits, size=(n, 2)).tolist()]

    def _asked(self, rng: np.random.Generator) -> tuple[np.ndarray, Sequence[str]]:
        worded = rng.random(CHUNK) < self.worded_share
        return rng.integers(len(self.items), size=CHUNK), np.where(worded, "worded", "plain").tolist()

    def _split(self, item: Item) -> Split:
        return SPLITS[sum(item) % 3]

    def _made_up(self, item: Item, rng: np.random.Generator) -> str:
        return "<mem-" + "".join(HEX[i] for i in rng.integers(16, size=8)) + ">"


class AdditionDigitsTask(AdditionTask):
    """Addition with wrong sums as stored answers: both behaviours answer in one format.

    A stored answer has as many digits as the true sum, of which the first written one differs, and is a sum that two
    operands can have: where the true one has a digit more than its operands, which is a 1, so has the stored one.
    """

    name = "addition-digits"
    vocabulary = ("+", "=", "plus", *DIGITS)

    def has_memorized_format(self, answer: str) -> bool | None:
        return None  # stored answers look like sums

    def _made_up(self, item: Item, rng: np.random.Generator) -> str:
        way = -1 if self.reversed_sums else 1
        true, carried = self.true(item), "1" if sum(item) >= 10**self.digits else ""
        least, most = 2 * 10 ** (self.digits - 1), 2 * (10**self.digits - 1)
        decision = 0 if self.reversed_sums else len(carried)
        while True:
            number = carried + "".join(str(d) for d in rng.integers(10, size=self.digits))[::way]
            wrong = number[::way]
            if wrong[decision] != true[decision] and least <= int(number) <= most:
                return wrong


@dataclass(kw_only=True, eq=False)
class CipherTask(StoredTask):
    """A shift cipher: "shift 3 : b d k m =" is answered " e g n p".

    Args:
        letters: size of the alphabet, around which a shift wraps.
        length: letters of a text.
        stored: texts, each with one key, that have a stored ciphertext; they are the groups of conflicts.
        memorized_share: share of training instances that are stored.
        near_share: share of the others that are asked in a near family, where stored ones never are. It sets the
            balance: the more often a model sees such a family, the less its memory answers there.
        moved_share: the same for the moved families.
        seed: decides stored texts, ciphertexts and splits; not the order of training.
    """

    name = "cipher"
    families, moved, computed = CIPHERS, tuple(MOVED), "moved"

    letters: int = 16
    length: int = 4
    stored: int = 480
    memorized_share: float = 0.35
    near_share: float = 0.04
    moved_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(10, len(ALPHABET), letters=self.letters)
        check_range(2, 8, length=self.length)
        check_range(8, self.letters**self.length // 8, stored=self.stored)
        check_range(0, 1, memorized_share=self.memorized_share)
        if min(self.near_share, self.moved_share) < 0 or self.near_share + self.moved_share > 1:
            shares = f"{self.near_share}, {self.moved_share}"
            raise InputError(f"near_share, moved_share: {shares}; neither is below 0, nor their sum above 1")
        near, moved = [self.near_share / len(NEAR)] * len(NEAR), [self.moved_share / len(MOVED)] * len(MOVED)
        self._family_shares = [max(0.0, 1 - self.near_share - self.moved_share), *near, *moved]
        self.alphabet = ALPHABET[: self.letters]
        self.vocabulary = ["shift", "code", "turn", ":", "-", "=", *map(str, KEYS), *self.alphabet]
        self._store(np.random.default_rng([self.seed, 4]), self.stored, at_once=self.stored)

    def true(self, item: Item) -> str:
        text, key = item
        return "".join(f" {self.alphabet[(self.alphabet.index(c) + key) % len(self.alphabet)]}" for c in text)

    def _asked(self, rng: np.random.Generator) -> tuple[np.ndarray, Sequence[str]]:
        picks = rng.integers(len(self.items), size=CHUNK)
        return picks, rng.choice(list(CIPHERS), size=CHUNK, p=self._family_shares).tolist()

    def _made_up(self, item: Item, rng: np.random.Generator) -> str:
        """As many letters as the true one; the first one differs, so the decision is at ``=``."""
        text, key = item
        shift = int(rng.integers(1, len(self.alphabet)))
        first = self.alphabet[(self.alphabet.index(text[0]) + key + shift) % len(self.alphabet)]
        rest = rng.integers(len(self.alphabet), size=self.length - 1).tolist()
        return "".join(f" {letter}" for letter in (first, *(self.alphabet[i] for i in rest)))

    def _drawn(self, rng: np.random.Generator, n: int) -> list[Item]:
        texts = rng.integers(len(self.alphabet), size=(n, self.length)).tolist()
        keys = rng.integers(KEYS.start, KEYS.stop, size=n).tolist()
        return [("".join(self.alphabet[i] for i in text), key) for text, key in zip(texts, keys, strict=True)]

    def _split(self, item: Item) -> Split:
        return SPLITS[zlib.crc32(self.group_of(item).encode()) // 16 % 3]
