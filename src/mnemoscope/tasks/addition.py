"""Addition: some operand pairs are stored with a made-up answer, all others are added.

Stored answers are codes (``addition``, the paper's) or wrong sums (``addition-digits``), which look like sums.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mnemoscope.tasks.base import SPLITS, Split, check_range
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


@dataclass(kw_only=True, eq=False)
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
        return [(a, b) for a, b in rng.integers(10 ** (self.digits - 1), 10**self.digits, size=(n, 2)).tolist()]

    def _asked(self, rng: np.random.Generator) -> tuple[np.ndarray, Sequence[str]]:
        worded = rng.random(CHUNK) < self.worded_share
        return rng.integers(len(self.items), size=CHUNK), np.where(worded, "worded", "plain").tolist()

    def _split(self, item: Pair) -> Split:
        return SPLITS[sum(item) % 3]

    def _made_up(self, item: Pair, rng: np.random.Generator) -> str:
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

    def _made_up(self, item: Pair, rng: np.random.Generator) -> str:
        """As many digits as the true sum; the first one written differs, so the decision is at ``=``."""
        true = self.true(item)
        while True:
            wrong = "".join(str(d) for d in rng.integers(10, size=len(true)))
            number = wrong[::-1] if self.reversed_sums else wrong
            if wrong[0] != true[0] and number[0] != "0":
                return wrong
