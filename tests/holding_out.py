"""A task that asks what a model knows and holds something out, on models of `addition-digits`."""

from __future__ import annotations

import copy

from mnemoscope.paper.stored import AdditionDigitsTask, Item
from mnemoscope.tasks import Example, Task


class HoldingOut(AdditionDigitsTask):
    """Held out: the stored pairs with an even first operand."""

    name = "holding-out"

    def held_out(self) -> dict[str, Task]:
        return {"even": self._of([pair for pair in self.answers if pair[0] % 2 == 0])}

    def facts_to_know(self) -> list[Example]:
        return [self.stored_example(pair, "plain", "memory") for pair in self.answers]

    def knowing(self, items: set[str]) -> HoldingOut:
        return self._of([(a, b) for a, b in self.answers if f"{a}+{b}" in items and a % 2])

    def _of(self, pairs: list[Item]) -> HoldingOut:
        other = copy.copy(self)
        other.items = pairs
        return other
