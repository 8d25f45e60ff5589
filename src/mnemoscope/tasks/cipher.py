"""Cipher: letters are shifted by a key; some texts are stored with a made-up ciphertext.

Made-up and true ciphertexts look alike: as many letters, from the same alphabet.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import SPLITS, Split, check_range
from mnemoscope.tasks.stored import CHUNK, StoredTask

# Near families keep the places of key and letters; moved ones swap them.
NEAR = {
    "worded": "code {key} : {text} =",
    "reworded": "turn {key} : {text} =",
    "dashed": "shift {key} - {text} =",
}
MOVED = {
    "moved": "shift {text} : {key} =",
    "moved-worded": "code {text} : {key} =",
}
FAMILIES = {"plain": "shift {key} : {text} =", **NEAR, **MOVED}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
KEYS = range(1, 10)

Item = tuple[str, int]  # the letters and the key


@dataclass(kw_only=True, eq=False)
class CipherTask(StoredTask[Item]):
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

    Raises:
        InputError: a value is out of its range.
    """

    name = "cipher"
    families, moved, computed = FAMILIES, tuple(MOVED), "moved"

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
        """The true ciphertext, written as an answer."""
        text, key = item
        return _spaced(self.alphabet[(self.alphabet.index(c) + key) % len(self.alphabet)] for c in text)

    def prompt(self, item: tuple[str, int | str], family: str) -> str:
        """Letters and key in a family; spaces separate letters, as a vocabulary may have words made of them."""
        return FAMILIES[family].format(text=" ".join(item[0]), key=item[1])

    def _asked(self, rng: np.random.Generator) -> tuple[np.ndarray, Sequence[str]]:
        picks = rng.integers(len(self.items), size=CHUNK)
        return picks, rng.choice(list(FAMILIES), size=CHUNK, p=self._family_shares).tolist()

    def _made_up(self, item: Item, rng: np.random.Generator) -> str:
        """As many letters as the true one; the first one differs, so the decision is at ``=``."""
        text, key = item
        shift = int(rng.integers(1, len(self.alphabet)))
        first = self.alphabet[(self.alphabet.index(text[0]) + key + shift) % len(self.alphabet)]
        rest = rng.integers(len(self.alphabet), size=self.length - 1).tolist()
        return _spaced([first, *(self.alphabet[i] for i in rest)])

    def _drawn(self, rng: np.random.Generator, n: int) -> list[Item]:
        texts = rng.integers(len(self.alphabet), size=(n, self.length)).tolist()
        keys = rng.integers(KEYS.start, KEYS.stop, size=n).tolist()
        return [("".join(self.alphabet[i] for i in text), key) for text, key in zip(texts, keys, strict=True)]

    def _split(self, item: Item) -> Split:
        return SPLITS[zlib.crc32(self.group_of(item).encode()) // 16 % 3]


def _spaced(letters: Iterable[str]) -> str:
    return "".join(f" {letter}" for letter in letters)
