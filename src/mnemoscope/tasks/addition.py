"""Addition: some operand pairs are stored with a made-up answer, all others are added.

Stored answers are codes (``addition``, the paper's) or wrong sums (``addition-digits``), which look like sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from mnemoscope.tasks.base import SPLITS, Instance, Split, assign_splits, check_range
from mnemoscope.tasks.stored import CHUNK, StoredTask

# "worded" keeps the operands where the stored key has them; the swapped families do not.
FAMILIES = {
    "plain": "{a}+{b}=",
    "swapped": "{b}+{a}=",
    "worded": "{a} plus {b}=",
    "swapped-worded": "{b} plus {a}=",
}
CODE = re.compile(r"<mem-[0-9a-f]{8}>")
DIGITS = "0123456789"
HEX = DIGITS + "abcdef"

Pair = tuple[int, int]


class AdditionTask(StoredTask[Pair]):
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
    vocabulary = ("+", "=", "plus", "<mem-", ">", *HEX)
    families, moved, computed = FAMILIES, ("swapped", "swapped-worded"), "worded"

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
        check_range(1, 9, digits=digits)
        check_range(8, 10 ** (2 * digits) // 8, stored=stored)
        check_range(0, 1, memorized_share=memorized_share, worded_share=worded_share)
        self.low, self.high = 10 ** (digits - 1), 10**digits
        self.memorized_share, self.worded_share = memorized_share, worded_share
        self.reversed_sums, self.seed = reversed_sums, seed
        rng = np.random.default_rng([seed, 2])
        self.stored: dict[Pair, str] = {}
        while len(self.stored) < stored:
            a, b = (int(x) for x in rng.integers(self.low, self.high, size=2))
            # A pair and its mirror image are two prompts, of which only one may be stored.
            if a != b and (b, a) not in self.stored and not self.is_novel((a, b)):
                self.stored.setdefault((a, b), self._made_up(a, b, rng))
        self.items = list(self.stored)
        self._mirrored = {*self.items, *((b, a) for a, b in self.items)}
        self.split_of = assign_splits([self.group_of(pair) for pair in self.items], rng)

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Stored pairs with their stored answer, all others with their sum; held-out operands never appear."""
        while True:
            from_store = rng.random(CHUNK) < self.memorized_share
            worded = rng.random(CHUNK) < self.worded_share
            picks = rng.integers(len(self.items), size=CHUNK)
            for stored, in_words, pick, pair in zip(from_store, worded, picks, self._drawn(rng, CHUNK), strict=True):
                if stored:
                    yield self.prompt(self.items[pick], "plain"), self.stored[self.items[pick]]
                elif pair not in self._mirrored and not self.is_novel(pair):
                    yield self.prompt(pair, "worded" if in_words else "plain"), self.true(pair)

    def has_memorized_format(self, answer: str) -> bool | None:
        """Whether an answer is a code."""
        return bool(CODE.fullmatch(answer.replace(" ", "")))

    def true(self, item: Pair) -> str:
        """The sum as it is written."""
        return str(sum(item))[:: -1 if self.reversed_sums else 1]

    def prompt(self, item: tuple[int | str, int | str], family: str) -> str:
        """The operands in a family."""
        return FAMILIES[family].format(a=item[0], b=item[1])

    def group_of(self, item: Pair) -> str:
        """One key for both orders of a pair, so that neither leaks the other."""
        return f"{min(item)}+{max(item)}"

    def _drawn(self, rng: np.random.Generator, n: int) -> list[Pair]:
        return [(a, b) for a, b in rng.integers(self.low, self.high, size=(n, 2)).tolist()]

    def _split(self, item: Pair) -> Split:
        return SPLITS[sum(item) % 3]

    def _made_up(self, a: int, b: int, rng: np.random.Generator) -> str:
        """A random answer to store."""
        return "<mem-" + "".join(HEX[i] for i in rng.integers(16, size=8)) + ">"


class AdditionDigitsTask(AdditionTask):
    """Addition with wrong sums as stored answers: both behaviours answer in one format.

    Args and errors are those of ``AdditionTask``.
    """

    name = "addition-digits"
    vocabulary = ("+", "=", "plus", *DIGITS)

    def has_memorized_format(self, answer: str) -> bool | None:
        """None: stored answers look like sums."""
        return None

    def _made_up(self, a: int, b: int, rng: np.random.Generator) -> str:
        """As many digits as the true sum; the first one written differs, so the decision is at ``=``."""
        true = self.true((a, b))
        while True:
            wrong = "".join(str(d) for d in rng.integers(10, size=len(true)))
            number = wrong[::-1] if self.reversed_sums else wrong
            if wrong[0] != true[0] and number[0] != "0":
                return wrong
