"""Pairs: two phrasings of one item, one answered from memory, the other by the rule.

Shapes: N candidates, P pairs, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mnemoscope.behaviour.asking import Asking, prepare
from mnemoscope.behaviour.labels import Scores, score
from mnemoscope.models import Site
from mnemoscope.tasks import Example, Task


@dataclass(slots=True)
class PairBatch:
    """What a batch of candidates gave.

    Attributes:
        candidates: (example, rephrasing) as drawn.
        scores_a, scores_b: of the examples and of the rephrasings; no states.
        is_pair_N: bool, one answered memorized, the other generalized.
        states_generalized_PLD, states_memorized_PLD: float32 states of the P pairs at the decision position.
    """

    candidates: list[tuple[Example, Example]]
    scores_a: Scores
    scores_b: Scores
    is_pair_N: np.ndarray
    states_generalized_PLD: np.ndarray
    states_memorized_PLD: np.ndarray

    def pairs(self) -> list[tuple[Example, Example]]:
        """(phrasing answered generalized, phrasing answered memorized) of each pair."""
        ordered = []
        for n in np.flatnonzero(self.is_pair_N):
            a, b = self.candidates[n]
            ordered.append((a, b) if self.scores_a.behaviour_N[n] == "generalized" else (b, a))
        return ordered


def draw_candidates(
    task: Task, examples: Sequence[Example], rng: np.random.Generator, rephrasings: int = 1
) -> list[tuple[Example, Example]]:
    """Each conflict example beside rephrasings of it, every two phrasings at most once.

    Args:
        rephrasings: drawn for each example; those drawn before, or equal to the example, count for nothing.
    """
    drawn: dict[frozenset[str], tuple[Example, Example]] = {}
    for example in examples:
        if example.kind == "conflict":
            for _ in range(rephrasings):
                other = task.rephrase(example, rng)
                if other.prompt != example.prompt:
                    drawn.setdefault(frozenset((example.prompt, other.prompt)), (example, other))
    return list(drawn.values())


def mine_pairs(
    asking: Asking, candidates: Sequence[tuple[Example, Example]], site: Site = "block", chunk: int = 512
) -> Iterator[PairBatch]:
    """Label candidates and keep those whose behaviour flips, with their states; memory does not grow with their number.

    Args:
        candidates: drawn beforehand (``draw_candidates``), so that the yield has an honest denominator.
        site: where states are read.
        chunk: candidates per yielded batch.
    """
    for start in range(0, len(candidates), chunk):
        part = list(candidates[start : start + chunk])
        scores = score(asking, prepare(asking, [e for pair in part for e in pair]), capture=site)
        states_NLD, n = scores.states_NLD, len(part)
        assert states_NLD is not None
        a, b = _half(scores, 0), _half(scores, 1)
        forward_N = (a.behaviour_N == "generalized") & (b.behaviour_N == "memorized")
        backward_N = (a.behaviour_N == "memorized") & (b.behaviour_N == "generalized")
        flips = np.flatnonzero(forward_N | backward_N)
        states_NSLD = states_NLD.reshape(n, 2, *states_NLD.shape[1:])
        generalized_side = np.where(forward_N, 0, 1)[flips]
        yield PairBatch(
            candidates=part,
            scores_a=a,
            scores_b=b,
            is_pair_N=forward_N | backward_N,
            states_generalized_PLD=states_NSLD[flips, generalized_side],
            states_memorized_PLD=states_NSLD[flips, 1 - generalized_side],
        )


def _half(scores: Scores, side: int) -> Scores:
    """Every second example's scores, without states."""
    return Scores(
        scores.behaviour_N[side::2], scores.margin_N[side::2], scores.tie_N[side::2], scores.confabulated_N[side::2]
    )
