"""Context-aware decoding whose weight is how far the two distributions differ, anew at each token.

Wang et al. (2024), "AdaCAD: adaptively decoding to balance conflicts between contextual and parametric knowledge",
arXiv 2409.07394.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mnemoscope.interventions.methods import cad

SETTINGS = [dict[str, float]()]


def divergence(first_NMV: Tensor, other_NMV: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions by their logits, in nats, at most log 2; (N, M)."""
    first_NMV, other_NMV = first_NMV.log_softmax(-1), other_NMV.log_softmax(-1)
    middle_NMV = torch.logaddexp(first_NMV, other_NMV) - math.log(2)
    first_NM, other_NM = ((one.exp() * (one - middle_NMV)).sum(-1) for one in (first_NMV, other_NMV))
    return ((first_NM + other_NM) / 2).clamp(min=0.0)


def joined(first_NMV: Tensor, other_NMV: Tensor) -> Tensor:
    """The weighted difference."""
    return cad.joined(first_NMV, other_NMV, divergence(first_NMV, other_NMV)[..., None])
