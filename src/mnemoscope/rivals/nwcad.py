"""Two streams: the bare one where the text says nothing, else the text's, with a contrast only where that is unsure.

Tao and Agrawal (2026), arXiv 2604.16686.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from mnemoscope.interventions.methods import cad
from mnemoscope.rivals.adacad import divergence

SILENT, SURE = (0.01, 0.05, 0.2), (0.5, 0.8, 1.0)  # nats of divergence, and probability of the top token
SETTINGS = [{"silent": silent, "sure": sure} for silent, sure in product(SILENT, SURE)]


def joined(first_NMV: Tensor, other_NMV: Tensor, silent: float, sure: float) -> Tensor:
    """Log probabilities of the other side where they differ by less than ``silent``, else of the first.

    Where the first one's top token has less than ``sure``, the two are contrasted with weight 1.
    """
    first_NMV, other_NMV = first_NMV.log_softmax(-1), other_NMV.log_softmax(-1)
    says_NM1 = divergence(first_NMV, other_NMV)[..., None] >= silent
    is_sure_NM1 = first_NMV.amax(-1, keepdim=True).exp() >= sure
    spoken_NMV = torch.where(is_sure_NM1, first_NMV, cad.joined(first_NMV, other_NMV, 1.0).log_softmax(-1))
    return torch.where(says_NM1, spoken_NMV, other_NMV)
