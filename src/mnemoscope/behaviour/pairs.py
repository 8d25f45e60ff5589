"""Pairs: two phrasings of one item, one answered from memory, the other by the rule.

Shapes: N candidates, P pairs, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mnemoscope.behaviour.asking import Asking
from mnemoscope.behaviour.batches import prepare
from mnemoscope.behaviour.labels import Scores, score
from mnemoscope.behaviour.states import KeptStates
from mnemoscope.models import Site
from mnemoscope.runs.files import Seen
from mnemoscope.tasks import Example, Task


@dataclass(slots=True)
class PairBatch:
    """Labelled candidates, and the pairs among them.

    Attributes:
        candidates: (example, rephrasing) as drawn.
        scores_a, scores_b: of the examples and of the rephrasings; no states.
        is_pair_N: bool, one answered memorized, the other generalized.
        asked, scores: the different phrasings among them, and their scores with states at the decision position.
        generalized_P, memorized_P: the sides of the P pairs, as indices into ``asked``.
    """

    candidates: list[tuple[Example, Example]]
    scores_a: Scores
    scores_b: Scores
    is_pair_N: np.ndarray
    asked: list[Example]
    scores: Scores
    generalized_P: np.ndarray
    memorized_P: np.ndarray

    @property
    def states_generalized_PLD(self) -> np.ndarray:
        """float32 states of the sides that were answered generalized."""
        return self._states_NLD[self.generalized_P]

    @property
    def states_memorized_PLD(self) -> np.ndarray:
        """float32 states of the sides that were answered memorized."""
        return self._states_NLD[self.memorized_P]

    @property
    def _states_NLD(self) -> np.ndarray:
        assert self.scores.states_NLD is not None
        return self.scores.states_NLD

    def keep(self, kept: KeptStates, site: Site, of_all: bool) -> None:
        """Keep the states for later stages: of all phrasings, or of those in pairs."""
        assert self.scores.uncertainty_N2 is not None
        chosen = np.arange(len(self.asked)) if of_all else np.unique([self.generalized_P, self.memorized_P])
        examples = [self.asked[n] for n in chosen]
        kept.add(site, examples, self._states_NLD[chosen], self.scores.uncertainty_N2[chosen])

    def pairs(self) -> list[tuple[Example, Example]]:
        """(phrasing answered generalized, phrasing answered memorized) of each pair."""
        return [(self.asked[g], self.asked[m]) for g, m in zip(self.generalized_P, self.memorized_P, strict=True)]


def draw_candidates(
    task: Task, examples: Iterable[Example], rng: np.random.Generator, rephrasings: int = 1
) -> Iterator[tuple[Example, Example]]:
    """(example, rephrasing) of each conflict, every two phrasings at most once; memory hardly grows with their number.

    Args:
        rng: used lazily, so not the generator that draws ``examples`` if these are drawn lazily too.
        rephrasings: drawn for each example; repeated ones, or equal to the example, are dropped.
    """
    seen = Seen()
    for example in examples:
        if example.kind == "conflict":
            for _ in range(rephrasings):
                other = task.rephrase(example, rng)
                if other.prompt != example.prompt and seen.add(*sorted((example.prompt, other.prompt))):
                    yield example, other


def mine_pairs(
    asking: Asking, candidates: Iterable[tuple[Example, Example]], site: Site = "block", chunk: int | None = None
) -> Iterator[PairBatch]:
    """Label candidates and find those whose behaviour flips, with states; memory does not grow with their number.

    Args:
        candidates: drawn independently of labels (``draw_candidates``), so that the yield has an honest denominator.
        site: where states are read.
        chunk: candidates per yielded batch; default: as many as fill 16 passes, 512 at most.
    """
    chunk = chunk or min(512, 16 * asking.batch_size)
    left = iter(candidates)
    while drawn := list(islice(left, chunk)):
        # An example stands beside each of its rephrasings, but is asked once.
        asked = {(example.prompt, example.options): example for pair in drawn for example in pair}
        place = {question: n for n, question in enumerate(asked)}
        scores = score(asking, prepare(asking, list(asked.values())), capture=site)
        side_N2 = np.array([[place[example.prompt, example.options] for example in pair] for pair in drawn])
        a, b = scores.of(side_N2[:, 0]), scores.of(side_N2[:, 1])
        generalized_N2, memorized_N2 = (scores.behaviour_N[side_N2] == name for name in ("generalized", "memorized"))
        is_pair_N = generalized_N2.any(axis=1) & memorized_N2.any(axis=1)
        sides_P = (side_N2[named_N2 & is_pair_N[:, None]] for named_N2 in (generalized_N2, memorized_N2))
        yield PairBatch(drawn, a, b, is_pair_N, list(asked.values()), scores, *sides_P)
