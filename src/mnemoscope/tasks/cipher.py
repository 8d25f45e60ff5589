"""Cipher: letters are shifted by a key; some texts are stored with a made-up ciphertext.

Made-up and true ciphertexts look alike: as many letters, from the same alphabet.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import SPLITS, Example, Instance, Kind, assign_splits, is_held_out

# Every family has the same length, and the same token at the decision position (see addition). Near ones leave key and
# letters where the stored phrasing has them; the moved ones put the key behind the letters.
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
CHUNK = 512

Item = tuple[str, int]  # the letters and the key


class CipherTask:
    """A shift cipher: "shift 3 : b d k m =" is answered " e g n p".

    Args:
        letters: size of the alphabet, around which a shift wraps.
        length: letters of a text.
        stored: texts, each with one key, that have a stored ciphertext; they are the groups of conflicts.
        memorized_share: share of training instances that are stored.
        near_share: share of the others that are asked in a near family. Stored ones are only ever asked plainly. The
            dial of the balance: what is asked so is always shifted, and the more often a model sees that, the less its
            memory answers there.
        moved_share: the same of a moved family.
        seed: decides stored texts, ciphertexts and splits; not the order of training.

    Raises:
        InputError: a value is out of its range.
    """

    name = "cipher"
    boundary = ("",)
    # Recall is asked with the stored items themselves: turning these is the aim of steering, not its damage.
    memory_is_conflict = True

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
        if not 10 <= letters <= len(ALPHABET):
            raise InputError(f"letters: {letters} is not between 10 and {len(ALPHABET)}")
        if not 2 <= length <= 8:
            raise InputError(f"length: {length} is not between 2 and 8")
        if not 8 <= stored <= letters**length // 8:
            raise InputError(f"stored: {stored} is not between 8 and {letters**length // 8} for {length} letters")
        if not 0 <= memorized_share <= 1:
            raise InputError(f"memorized_share: {memorized_share} is not between 0 and 1")
        if min(near_share, moved_share) < 0 or near_share + moved_share > 1:
            raise InputError(
                f"near_share, moved_share: {near_share}, {moved_share}; neither is below 0, nor their sum above 1"
            )
        self.alphabet, self.length = ALPHABET[:letters], length
        self.memorized_share, self.seed = memorized_share, seed
        self._family_shares = _dealt(1 - near_share - moved_share, near_share, moved_share)
        rng = np.random.default_rng([seed, 4])
        self.stored: dict[Item, str] = {}
        while len(self.stored) < stored:
            for text, key in self._drawn(rng, stored):
                if not self._held_out(text, key) and len(self.stored) < stored:
                    self.stored.setdefault((text, key), self._made_up(text, key, rng))
        self._items = list(self.stored)
        self.split_of = assign_splits([_name(*item) for item in self._items], rng)

    @property
    def vocabulary(self) -> list[str]:
        """Every token of the task, in a fixed order."""
        return ["shift", "code", "turn", ":", "-", "=", *map(str, KEYS), *self.alphabet]

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Stored items plainly with their stored ciphertext, all others with the true one; held-out ones never."""
        families = list(FAMILIES)
        while True:
            from_store = rng.random(CHUNK) < self.memorized_share
            picks = rng.integers(len(self._items), size=CHUNK)
            chosen = rng.choice(len(families), size=CHUNK, p=self._family_shares)
            for is_stored, pick, family, item in zip(from_store, picks, chosen, self._drawn(rng, CHUNK), strict=True):
                if is_stored:
                    yield _prompt(self._items[pick], "plain"), self.stored[self._items[pick]]
                elif item not in self.stored and not self._held_out(*item):
                    yield _prompt(item, families[family]), self.encode(*item)

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """``novel``: held-out items. ``memory``: stored ones as stored. ``conflict``: in any family."""
        if kind == "novel":
            return self._novel(rng, n)
        families = ["plain"] if kind == "memory" else list(FAMILIES)
        everything = [(item, family) for item in self._items for family in families]
        picked = [everything[i] for i in rng.permutation(len(everything))[:n]]
        return [self._stored_example(item, family, kind) for item, family in picked]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """The same item in another family, drawn uniformly from the others."""
        others = [family for family in FAMILIES if family != example.family]
        family = others[rng.integers(len(others))]
        text, _, key = example.item.partition("+")
        return example.phrased(_prompt((text, int(key)), family), family)

    def prompted(self, example: Example, toward: str) -> Example:
        """To remember: asked exactly as stored. To shift: with the key behind the letters, as no stored one was."""
        family = "moved" if toward == "generalized" else "plain"
        text, _, key = example.item.partition("+")
        return example.phrased(_prompt((text, int(key)), family), family)

    def keeps_key(self, example: Example) -> bool:
        """Whether key and letters stand where the stored phrasing has them."""
        return example.family not in MOVED

    def encode(self, text: str, key: int) -> str:
        """The true ciphertext, written as an answer."""
        return _spaced(self.alphabet[(self.alphabet.index(c) + key) % len(self.alphabet)] for c in text)

    def _novel(self, rng: np.random.Generator, n: int) -> list[Example]:
        found: list[Example] = []
        while len(found) < n:
            for item in self._drawn(rng, CHUNK):
                if self._held_out(*item):
                    name = _name(*item)
                    # By a hash: held-out items are too many to be dealt.
                    split = SPLITS[zlib.crc32(name.encode()) // 16 % 3]
                    answer = self.encode(*item)
                    found.append(Example(name, _prompt(item, "plain"), "novel", name, "plain", split, answer=answer))
        return found[:n]

    def _stored_example(self, item: Item, family: str, kind: Kind) -> Example:
        name = _name(*item)
        example = partial(Example, name, _prompt(item, family), kind, name, family, self.split_of[name])
        if kind == "memory":
            return example(answer=self.stored[item])
        return example(memorized=self.stored[item], generalized=self.encode(*item))

    def _made_up(self, text: str, key: int, rng: np.random.Generator) -> str:
        """As many letters as the true one; the first already differs, so the decision is at ``=``."""
        shift = int(rng.integers(1, len(self.alphabet)))
        first = self.alphabet[(self.alphabet.index(text[0]) + key + shift) % len(self.alphabet)]
        rest = rng.integers(len(self.alphabet), size=self.length - 1).tolist()
        return _spaced([first, *(self.alphabet[i] for i in rest)])

    def _drawn(self, rng: np.random.Generator, n: int) -> list[Item]:
        texts = rng.integers(len(self.alphabet), size=(n, self.length)).tolist()
        keys = rng.integers(KEYS.start, KEYS.stop, size=n).tolist()
        return [("".join(self.alphabet[i] for i in text), key) for text, key in zip(texts, keys, strict=True)]

    def _held_out(self, text: str, key: int) -> bool:
        return is_held_out(_name(text, key), self.seed)


def _dealt(plain: float, near: float, moved: float) -> list[float]:
    """The share of each family, in their order."""
    return [plain, *([near / len(NEAR)] * len(NEAR)), *([moved / len(MOVED)] * len(MOVED))]


def _name(text: str, key: int) -> str:
    return f"{text}+{key}"


def _prompt(item: Item, family: str) -> str:
    # Spaces keep letters apart where the vocabulary has words made of them.
    return FAMILIES[family].format(text=" ".join(item[0]), key=item[1])


def _spaced(letters: Iterable[str]) -> str:
    return "".join(f" {letter}" for letter in letters)
