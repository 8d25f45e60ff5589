"""One model on several tasks, so that what was found on one task can be tried on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import Example, Instance, Kind, Task, keeps_key

CHUNK = 512


class JointTask:
    """Several tasks side by side. Items, groups and families carry the name of their part: ``cipher/abcd+3``.

    The part alone, with the same options and seed, asks the same prompts for the same answers. ``parts`` tells that to
    the stop rule, which must hold in each of them.

    Args:
        parts: the tasks, by name.
        shares: parts of the training instances, by name; they add up to 1. Default: equal.
        first: by name, how many instances of a part come before all parts are mixed.

    Raises:
        InputError: there are no parts, a part cannot be trained on, or the shares or ``first`` do not fit the parts.
    """

    name = "joint"

    def __init__(
        self,
        parts: Mapping[str, Task],
        shares: Mapping[str, float] | None = None,
        first: Mapping[str, int] | None = None,
    ) -> None:
        if not parts:
            raise InputError("parts: none; at least one task is wanted")
        for name, part in parts.items():
            if not hasattr(part, "vocabulary"):
                raise InputError(f"parts: task {name!r} has no vocabulary to train on")
        self.parts = dict(parts)
        self.shares = _checked(shares, self.parts)
        self.first = dict(first or {})
        if not set(self.first) <= set(self.parts) or any(n < 0 for n in self.first.values()):
            raise InputError(
                f"first: {first!r} is not a number of instances, 0 or more, for some of {', '.join(parts)}"
            )
        # An answer closes as its part closes it: no part trains another's ending.
        self.boundary = tuple(dict.fromkeys(text for part in self.parts.values() for text in part.boundary))
        self.memory_is_conflict = any(getattr(part, "memory_is_conflict", False) for part in self.parts.values())

    @property
    def vocabulary(self) -> list[str]:
        """Every token of every part once, in a fixed order."""
        return list(dict.fromkeys(word for part in self.parts.values() for word in part.vocabulary))  # type: ignore[attr-defined]

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Instances of the parts, mixed in their shares; before that, what comes first."""
        streams = {name: part.training(rng) for name, part in self.parts.items()}
        for name, n in self.first.items():
            yield from islice(streams[name], n)
        names = list(streams)
        while True:
            for pick in rng.choice(len(names), size=CHUNK, p=self.shares):
                yield next(streams[names[pick]])

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """Equally many of each part, in random order; fewer of a part that has no more to give."""
        each = -(-n // len(self.parts))
        found = [
            self._outside(name, example)
            for name, part in self.parts.items()
            for example in part.examples(rng, each, kind)
        ]
        return [found[i] for i in rng.permutation(len(found))[:n]]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """Another phrasing, as the example's part phrases it."""
        name, inside = self.inside(example)
        return self._outside(name, self.parts[name].rephrase(inside, rng))

    def prompted(self, example: Example, toward: str) -> Example | None:
        """What the example's part has for it."""
        name, inside = self.inside(example)
        said = getattr(self.parts[name], "prompted", None)
        other = None if said is None else said(inside, toward)
        return None if other is None else self._outside(name, other)

    def keeps_key(self, example: Example) -> bool:
        """What the example's part says."""
        name, inside = self.inside(example)
        return keeps_key(self.parts[name], inside)

    def inside(self, example: Example) -> tuple[str, Example]:
        """The name of the example's part, and the example as the part knows it."""
        name = example.item.partition("/")[0]
        return name, _renamed(example, lambda text: text.removeprefix(f"{name}/"))

    @staticmethod
    def _outside(name: str, example: Example) -> Example:
        return _renamed(example, lambda text: f"{name}/{text}")


def _renamed(example: Example, rename: Callable[[str], str]) -> Example:
    return replace(example, item=rename(example.item), group=rename(example.group), family=rename(example.family))


def _checked(shares: Mapping[str, float] | None, parts: Mapping[str, Task]) -> list[float]:
    """The shares in the order of the parts."""
    if shares is None:
        return [1 / len(parts)] * len(parts)
    fitting = isinstance(shares, Mapping) and set(shares) == set(parts)
    if not fitting or any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"shares: {shares!r} are not one share above 0 for each of {', '.join(parts)}, adding up to 1")
    return [shares[name] for name in parts]
