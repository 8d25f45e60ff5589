"""What directions are made from: fit pairs with their states at one site, and the lists that a vector is fitted on.

Shapes: P pairs, N examples, L layers, D neurons. Side 0 of a pair answered generalized, side 1 memorized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np

from mnemoscope.behaviour import Asking, Batch, cache_prefixes, prepare, score
from mnemoscope.models import Site
from mnemoscope.steering import Toward
from mnemoscope.tasks import Example

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class FitLists:
    """Examples of the fit split, prepared with their prefixes; shared by the sources of all sites.

    Attributes:
        asking: how they are put to the model.
        pairs, conflicts: per behaviour turned to, phrasings of pairs, and other conflicts, that answer the other way.
        kept: per behaviour turned to, memory and novel examples whose answers should stay as they are.
        kept_weight: of these in the objective of learned vectors; 0 leaves them out.
        steps: of the ascent of learned vectors.
    """

    asking: Asking
    pairs: Mapping[Toward, Sequence[Batch]]
    conflicts: Mapping[Toward, Sequence[Batch]]
    kept: Mapping[Toward, Sequence[Batch]]
    kept_weight: float = 1.0
    steps: int = 20


@dataclass(frozen=True, eq=False)
class Sources:
    """What the methods work from; all of it from the fit split.

    Attributes:
        site: where in a layer.
        states_P2LD: float32, states of the pairs at the decision position.
        lists: what gradients are taken over, and what learned vectors are optimized on.
        shuffle: None, or the seed of a shuffle of the labels: in every pair both labels swap together or stay.
        found: directions that were computed before, by what they depend on.
        shuffles: shuffled sources that were made before, by their seed.
        unlabelled: what was computed before and no label has a part in; one for all shuffles.
    """

    site: Site
    states_P2LD: np.ndarray
    lists: FitLists
    shuffle: int | None = None
    found: dict[Any, np.ndarray] = field(default_factory=dict)
    shuffles: dict[int, Sources] = field(default_factory=dict)
    unlabelled: dict[str, Any] = field(default_factory=dict)

    def shuffled(self, seed: int) -> Sources:
        """The same pairs with their labels shuffled: what a method makes of nothing. One seed gives one object."""
        if seed not in self.shuffles:
            self.shuffles[seed] = replace(self, shuffle=seed, found={}, shuffles={})
        return self.shuffles[seed]

    def signs(self, n: int, *stream: int) -> np.ndarray:
        """float64 (n,): 1 where a label stays, -1 where the shuffle swaps it; all 1 without a shuffle.

        Half of the labels swap, to one: what is left of a direction is then not a matter of how many stayed by chance.
        """
        if self.shuffle is None:
            return np.ones(n)
        return np.random.default_rng([self.shuffle, *stream]).permutation(np.where(np.arange(n) % 2 == 0, 1.0, -1.0))

    @property
    def differences_PLD(self) -> np.ndarray:
        """float64, state of the side labelled generalized minus that of the other; not kept, as shuffles are many."""
        differences_PLD = self.states_P2LD[:, 0].astype(np.float64) - self.states_P2LD[:, 1]
        return differences_PLD * self.signs(len(differences_PLD))[:, None, None]

    @cached_property
    def nmd_LD(self) -> np.ndarray:
        """float64, neuron-wise mean difference."""
        return self.differences_PLD.mean(0)

    @cached_property
    def sd_LD(self) -> np.ndarray:
        """float64, standard deviation of each neuron over all states; tiny instead of 0 for a constant one."""
        return np.maximum(self.states_P2LD.astype(np.float64).std(axis=(0, 1)), 1e-12)

    @cached_property
    def rho_LD(self) -> np.ndarray:
        """float64, Pearson correlation with the label; with balanced labels cov(h, y) = NMD / 2."""
        return self.nmd_LD / 2 / self.sd_LD

    @cached_property
    def norm_L(self) -> np.ndarray:
        """float64, root mean square norm of each layer's states: the unit of strength."""
        return np.sqrt((self.states_P2LD.astype(np.float64) ** 2).sum(-1).mean((0, 1)))

    @property
    def shape_LD(self) -> tuple[int, int]:
        """Layers and neurons of the site."""
        return self.states_P2LD.shape[2], self.states_P2LD.shape[3]


def in_turn(lists: Iterable[Sequence[Entry]]) -> list[Entry]:
    """The first entry of every list, then the second of every list, and so on: whoever takes few has all kinds."""
    return [entry for row in zip_longest(*lists) for entry in row if entry is not None]


def with_prefixes(asking: Asking, examples: Sequence[Example]) -> list[Batch]:
    """Prepared examples whose prompts were read once, up to the decision position."""
    batches = prepare(asking, examples)
    cache_prefixes(asking, batches)
    return batches


def read_sources(site: Site, pairs: Sequence[tuple[Example, Example]], lists: FitLists) -> Sources:
    """Read the states of fit pairs, (answered generalized, answered memorized) each, at a site."""
    asking = lists.asking
    states_NLD = score(asking, prepare(asking, [e for pair in pairs for e in pair]), margins=False, capture=site)
    assert states_NLD.states_NLD is not None
    return Sources(site, states_NLD.states_NLD.reshape(len(pairs), 2, *states_NLD.states_NLD.shape[1:]), lists)
