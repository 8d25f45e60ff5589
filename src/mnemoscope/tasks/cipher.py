"""Cipher: letters are shifted by a key; some texts are stored with a made-up ciphertext.

Made-up and true ciphertexts look alike: as many letters, from the same alphabet.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import SPLITS, Instance, Split, assign_splits, check_range
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

    def __init__(
        self,
        *,
        letters: int = 16,
        length: int = 4,
        stored: int = 480,
        memorized_share: float = 0.35,
        near_share: float = 0.04,
        moved_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_range(10, len(ALPHABET), letters=letters)
        check_range(2, 8, length=length)
        check_range(8, letters**length // 8, stored=stored)
        check_range(0, 1, memorized_share=memorized_share)
        if min(near_share, moved_share) < 0 or near_share + moved_share > 1:
            shares = f"{near_share}, {moved_share}"
            raise InputError(f"near_share, moved_share: {shares}; neither is below 0, nor their sum above 1")
        self.alphabet, self.length = ALPHABET[:letters], length
        self.memorized_share, self.seed = memorized_share, seed
        near, moved = [near_share / len(NEAR)] * len(NEAR), [moved_share / len(MOVED)] * len(MOVED)
        self._family_shares = [1 - near_share - moved_share, *near, *moved]
        rng = np.random.default_rng([seed, 4])
        self.stored: dict[Item, str] = {}
        while len(self.stored) < stored:
            for text, key in self._drawn(rng, stored):
                if not self.is_novel((text, key)) and len(self.stored) < stored:
                    self.stored.setdefault((text, key), self._made_up(text, key, rng))
        self.items = list(self.stored)
        self.split_of = assign_splits([self.group_of(item) for item in self.items], rng)
        self.vocabulary = ["shift", "code", "turn", ":", "-", "=", *map(str, KEYS), *self.alphabet]

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Stored items plainly with their stored ciphertext, all others with the true one; held-out ones never."""
        families = list(FAMILIES)
        while True:
            from_store = rng.random(CHUNK) < self.memorized_share
            picks = rng.integers(len(self.items), size=CHUNK)
            chosen = rng.choice(len(families), size=CHUNK, p=self._family_shares)
            for is_stored, pick, family, item in zip(from_store, picks, chosen, self._drawn(rng, CHUNK), strict=True):
                if is_stored:
                    yield self.prompt(self.items[pick], "plain"), self.stored[self.items[pick]]
                elif item not in self.stored and not self.is_novel(item):
                    yield self.prompt(item, families[family]), self.true(item)

    def true(self, item: Item) -> str:
        """The true ciphertext, written as an answer."""
        text, key = item
        return _spaced(self.alphabet[(self.alphabet.index(c) + key) % len(self.alphabet)] for c in text)

    def prompt(self, item: tuple[str, int | str], family: str) -> str:
        """Letters and key in a family; spaces separate letters, as a vocabulary may have words made of them."""
        return FAMILIES[family].format(text=" ".join(item[0]), key=item[1])

    def _made_up(self, text: str, key: int, rng: np.random.Generator) -> str:
        """As many letters as the true one; the first one differs, so the decision is at ``=``."""
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
