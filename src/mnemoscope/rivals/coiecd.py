"""Contrast only where a token's information lies outside a band around the entropy of the bare distribution.

Yuan et al. (2024), "Discerning and resolving knowledge conflicts through adaptive decoding with contextual
information-entropy constraint", arXiv 2402.11893.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mnemoscope.interventions import Intervention, Toward
from mnemoscope.interventions.decoding import Decoding, with_contrasts

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "contrast where a token is unlikely to be by the bare question (arXiv 2402.11893)"
BANDS = (0.1, 0.25, 0.5)  # lambda: the band goes from 1 / lambda of the least to lambda of the most information
WEIGHTS = (0.5, 1.0, 2.0)  # alpha


@dataclass(frozen=True, kw_only=True, repr=False)
class Constrained(Decoding):
    """``base + weight * (log p - log q)``; base is log q inside the band, log p outside of it.

    p is the distribution given the prompt, q that given the bare question; towards memory they change roles. With
    ``i = -log p - H(q)``, normalized over the vocabulary as ``exp(i) / sum(exp(i))``, the band goes from ``1 / band``
    of its least to ``band`` of its largest value. A single token below the band, one that dominates p, counts as
    inside, as in the published implementation; then nothing is in conflict.
    """

    band: float
    weight: float

    KIND: ClassVar[str] = "coiecd"

    def joined(self, first_NMV: Tensor, other_NMV: Tensor) -> Tensor:
        """The constrained contrast."""
        first_NMV, other_NMV = first_NMV.log_softmax(-1), other_NMV.log_softmax(-1)
        entropy_NM1 = torch.special.entr(other_NMV.exp()).sum(-1, keepdim=True)
        shift_NMV = (-first_NMV - entropy_NM1).log_softmax(-1)
        below_NMV = shift_NMV < shift_NMV.amin(-1, keepdim=True) - math.log(self.band)
        above_NMV = shift_NMV > shift_NMV.amax(-1, keepdim=True) + math.log(self.band)
        alone_NM1 = below_NMV.sum(-1, keepdim=True) == 1
        outside_NMV = (below_NMV & ~alone_NM1) | above_NMV
        return torch.where(outside_NMV, first_NMV, other_NMV) + self.weight * (first_NMV - other_NMV)


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every band, weight and contrast; InputError where the task has no bare questions."""
    settings = ({"band": band, "weight": weight} for band, weight in product(BANDS, WEIGHTS))
    return with_contrasts(bench, Constrained, toward, settings)
