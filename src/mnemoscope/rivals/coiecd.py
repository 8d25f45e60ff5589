"""Contrast only where a token's information lies outside a band around the entropy of the bare distribution.

Yuan et al. (2024), "Discerning and resolving knowledge conflicts through adaptive decoding with contextual
information-entropy constraint", arXiv 2402.11893.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

BANDS = (0.1, 0.25, 0.5)  # lambda: the band goes from 1 / lambda of the least to lambda of the most information
WEIGHTS = (0.5, 1.0, 2.0)  # alpha
SETTINGS = [{"band": band, "weight": weight} for band, weight in product(BANDS, WEIGHTS)]


def joined(first_NMV: Tensor, other_NMV: Tensor, band: float, weight: float) -> Tensor:
    """``base + weight * (log p - log q)``; base is log q inside the band, log p outside of it.

    p is the distribution given the prompt, q that given the bare question; towards memory they change roles. With
    ``i = -log p - H(q)``, normalized over the vocabulary as ``exp(i) / sum(exp(i))``, the band goes from ``1 / band``
    of its least to ``band`` of its largest value. A single token below the band, one that dominates p, counts as
    inside, as in the published implementation; then nothing is in conflict.
    """
    first_NMV, other_NMV = first_NMV.log_softmax(-1), other_NMV.log_softmax(-1)
    entropy_NM1 = torch.special.entr(other_NMV.exp()).sum(-1, keepdim=True)
    shift_NMV = (-first_NMV - entropy_NM1).log_softmax(-1)
    below_NMV = shift_NMV < shift_NMV.amin(-1, keepdim=True) - math.log(band)
    above_NMV = shift_NMV > shift_NMV.amax(-1, keepdim=True) + math.log(band)
    alone_NM1 = below_NMV.sum(-1, keepdim=True) == 1
    outside_NMV = (below_NMV & ~alone_NM1) | above_NMV
    return torch.where(outside_NMV, first_NMV, other_NMV) + weight * (first_NMV - other_NMV)
