"""The choice of a method's setting on the tune split, the same for all methods.

A setting's worth is the share of conflicts that get the wanted answer, less the share of other answers that it loses: a
point of either counts the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mnemoscope.bench.answers import scores
from mnemoscope.bench.lists import KEPT, Prompts
from mnemoscope.interventions import Intervention


@dataclass(frozen=True)
class Tuned:
    """An intervention with its shares on the tune split: wanted answers, kept answers lost, and their difference."""

    one: Intervention
    wanted: float
    lost: float

    @property
    def worth(self) -> float:
        """Wanted less lost."""
        return self.wanted - self.lost


def best_of(candidates: Sequence[Intervention], tune: Mapping[str, Prompts]) -> tuple[Tuned, list[Tuned]]:
    """The candidate of the highest worth, the first of equals, and all that were compared in full.

    Candidates are taken by their share of wanted answers: one whose share is not above the best worth so far has lost.
    """
    shares = [float(np.mean(scores(one, tune["conflict"]).behaviour_N == one.toward)) for one in candidates]
    found = list[Tuned]()
    for place in np.argsort(-np.array(shares), kind="stable"):
        if found and max(one.worth for one in found) >= shares[place]:
            break
        one = candidates[place]
        drops = [
            1.0 - float(np.mean(scores(one, tune[name]).behaviour_N == "correct")) for name in KEPT if len(tune[name])
        ]
        found.append(Tuned(one, shares[place], float(np.mean(drops)) if drops else 0.0))
    return max(found, key=lambda tuned: tuned.worth), found
