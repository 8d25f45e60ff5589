"""Addition: some operand pairs are stored with a made-up answer, all others are added.

Stored answers are codes (``addition``, the paper's) or wrong sums (``addition-digits``), which look like sums: there
the format of the answer cannot tell the behaviours apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import SPLITS, Example, Instance, Kind, assign_splits, is_held_out

# Every family has the same length, and the same token at the decision position, so that no state there differs for the
# wording of that token alone. "worded" keeps the operands where the stored key has them; the swapped ones do not.
FAMILIES = {
    "plain": "{a}+{b}=",
    "swapped": "{b}+{a}=",
    "worded": "{a} plus {b}=",
    "swapped-worded": "{b} plus {a}=",
}
KEEPS_KEY = ("plain", "worded")
CODE = re.compile(r"<mem-[0-9a-f]{8}>")
DIGITS = "0123456789"
HEX = DIGITS + "abcdef"
CHUNK = 512


class AdditionTask:
    """Addition of two numbers with as many digits each; stored answers are codes such as ``<mem-7234f681>``.

    Args:
        digits: digits of an operand.
        stored: operand pairs with a stored answer; they are the groups of conflicts.
        memorized_share: share of training instances that are stored pairs.
        worded_share: share of the additions that are asked in words. Stored pairs are only ever asked as ``a+b=``.
        reversed_sums: whether sums are written last digit first, which a small model learns several times sooner.
        seed: decides stored pairs, answers and splits; not the order of training.

    Raises:
        InputError: a value is out of its range.
    """

    name = "addition"
    boundary = ("",)
    # Recall is asked with the stored pairs themselves: turning these is the aim of steering, not its damage.
    memory_is_conflict = True

    def __init__(
        self,
        *,
        digits: int = 3,
        stored: int = 480,
        memorized_share: float = 0.3,
        worded_share: float = 0.3,
        reversed_sums: bool = True,
        seed: int = 0,
    ) -> None:
        if not 1 <= digits <= 9:
            raise InputError(f"digits: {digits} is not between 1 and 9")
        if not 8 <= stored <= 10 ** (2 * digits) // 8:
            raise InputError(f"stored: {stored} is not between 8 and {10 ** (2 * digits) // 8} for {digits} digits")
        if not (0 <= memorized_share <= 1 and 0 <= worded_share <= 1):
            raise InputError(f"memorized_share, worded_share: {memorized_share}, {worded_share}; both lie in 0 .. 1")
        self.low, self.high = 10 ** (digits - 1), 10**digits
        self.memorized_share, self.worded_share = memorized_share, worded_share
        self.reversed_sums, self.seed = reversed_sums, seed
        rng = np.random.default_rng([seed, 2])
        self.stored: dict[tuple[int, int], str] = {}
        while len(self.stored) < stored:
            a, b = (int(x) for x in rng.integers(self.low, self.high, size=2))
            # A pair and its mirror image must be two prompts, and only one of them may be stored.
            if a != b and (b, a) not in self.stored and not is_held_out(self._key(a, b), seed):
                self.stored.setdefault((a, b), self._made_up(a, b, rng))
        self._pairs = list(self.stored)
        self._mirrored = {*self._pairs, *((b, a) for a, b in self._pairs)}
        self.split_of = assign_splits([self._key(a, b) for a, b in self._pairs], rng)

    @property
    def vocabulary(self) -> list[str]:
        """Every token of the task, in a fixed order."""
        return ["+", "=", "plus", "<mem-", ">", *HEX]

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Stored pairs with their stored answer, all others with their sum; held-out operands never appear."""
        while True:
            from_store = rng.random(CHUNK) < self.memorized_share
            worded = rng.random(CHUNK) < self.worded_share
            picks = rng.integers(len(self._pairs), size=CHUNK)
            operands = rng.integers(self.low, self.high, size=(CHUNK, 2)).tolist()
            for stored, in_words, pick, (a, b) in zip(from_store, worded, picks, operands, strict=True):
                if stored:
                    pair = self._pairs[pick]
                    yield FAMILIES["plain"].format(a=pair[0], b=pair[1]), self.stored[pair]
                elif (a, b) not in self._mirrored and not is_held_out(self._key(a, b), self.seed):
                    yield FAMILIES["worded" if in_words else "plain"].format(a=a, b=b), self._written(a + b)

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """``novel``: held-out operands. ``memory``: stored pairs as stored. ``conflict``: in any family."""
        if kind == "novel":
            return self._novel(rng, n)
        families = ["plain"] if kind == "memory" else list(FAMILIES)
        everything = [(pair, family) for pair in self._pairs for family in families]
        picked = [everything[i] for i in rng.permutation(len(everything))[:n]]
        return [self._stored_example(pair, family, kind) for pair, family in picked]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """The same operands in another family, drawn uniformly from the others."""
        others = [family for family in FAMILIES if family != example.family]
        family = others[rng.integers(len(others))]
        a, b = example.item.split("+")
        return example.phrased(FAMILIES[family].format(a=a, b=b), family)

    def prompted(self, example: Example, toward: str) -> Example:
        """To remember: asked exactly as stored. To add: in words, which no stored pair was ever asked in."""
        family = "worded" if toward == "generalized" else "plain"
        a, b = example.item.split("+")
        return example.phrased(FAMILIES[family].format(a=a, b=b), family)

    def has_memorized_format(self, answer: str) -> bool | None:
        """Whether an answer looks like a stored one; None where stored answers look like sums."""
        return bool(CODE.fullmatch(answer.replace(" ", "")))

    def keeps_key(self, example: Example) -> bool:
        """Whether the operands stand in the stored order."""
        return example.family in KEEPS_KEY

    def _novel(self, rng: np.random.Generator, n: int) -> list[Example]:
        found: list[Example] = []
        while len(found) < n:
            for a, b in rng.integers(self.low, self.high, size=(CHUNK, 2)).tolist():
                if is_held_out(self._key(a, b), self.seed) and (a, b) not in self._mirrored:
                    prompt, group = FAMILIES["plain"].format(a=a, b=b), self._key(a, b)
                    split = SPLITS[(a + b) % 3]
                    answer = self._written(a + b)
                    found.append(Example(f"{a}+{b}", prompt, "novel", group, "plain", split, answer=answer))
        return found[:n]

    def _stored_example(self, pair: tuple[int, int], family: str, kind: Kind) -> Example:
        a, b = pair
        prompt, group = FAMILIES[family].format(a=a, b=b), self._key(a, b)
        example = partial(Example, f"{a}+{b}", prompt, kind, group, family, self.split_of[group])
        if kind == "memory":
            return example(answer=self.stored[pair])
        return example(memorized=self.stored[pair], generalized=self._written(a + b))

    def _written(self, number: int) -> str:
        return str(number)[::-1] if self.reversed_sums else str(number)

    def _made_up(self, a: int, b: int, rng: np.random.Generator) -> str:
        """The stored answer of a pair."""
        return "<mem-" + "".join(HEX[i] for i in rng.integers(16, size=8)) + ">"

    @staticmethod
    def _key(a: int, b: int) -> str:
        """Both orders of a pair share one key, so that neither leaks the other."""
        return f"{min(a, b)}+{max(a, b)}"


class AdditionDigitsTask(AdditionTask):
    """Addition with wrong sums as stored answers: both behaviours answer in one format.

    Args and errors are those of ``AdditionTask``.
    """

    name = "addition-digits"

    @property
    def vocabulary(self) -> list[str]:
        """Every token of the task, in a fixed order."""
        return ["+", "=", "plus", *DIGITS]

    def has_memorized_format(self, answer: str) -> bool | None:
        """None: stored answers look like sums."""
        return None

    def _made_up(self, a: int, b: int, rng: np.random.Generator) -> str:
        """As many digits as the true sum; the first one written already differs, so the decision is at ``=``."""
        true = self._written(a + b)
        while True:
            wrong = "".join(str(d) for d in rng.integers(10, size=len(true)))
            number = wrong[::-1] if self.reversed_sums else wrong
            if wrong[0] != true[0] and number[0] != "0":
                return wrong
