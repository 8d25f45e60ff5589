"""Context-aware decoding whose weight is how far the two distributions differ, anew at each token.

Wang et al. (2024), "AdaCAD: adaptively decoding to balance conflicts between contextual and parametric knowledge",
arXiv 2409.07394.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.lists import Bench
from mnemoscope.arena.methods.cad import in_two_passes
from mnemoscope.steering import Toward


def divergence(first_NMV: Tensor, other_NMV: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions by their logits, in nats, at most log 2; (N, M)."""
    first_NMV, other_NMV = first_NMV.log_softmax(-1), other_NMV.log_softmax(-1)
    middle_NMV = torch.logaddexp(first_NMV, other_NMV) - math.log(2)
    first_NM, other_NM = ((one.exp() * (one - middle_NMV)).sum(-1) for one in (first_NMV, other_NMV))
    return ((first_NM + other_NM) / 2).clamp(min=0.0)


def contrasted(prompt_NMV: Tensor, bare_NMV: Tensor, toward: Toward) -> Tensor:
    """``(1 + weight) * logits - weight * other logits`` with the divergence of the two as the weight of each token."""
    first_NMV, other_NMV = (prompt_NMV, bare_NMV) if toward == "generalized" else (bare_NMV, prompt_NMV)
    weight_NM1 = divergence(first_NMV, other_NMV)[..., None]
    return (1 + weight_NM1) * first_NMV - weight_NM1 * other_NMV


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Either contrast; InputError where the task has no bare questions."""
    return in_two_passes(bench, "adacad", toward, {}, partial(contrasted, toward=toward))
