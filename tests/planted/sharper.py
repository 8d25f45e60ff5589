"""A decoding rule: what the other side makes less likely is left out."""

from __future__ import annotations

import torch
from torch import Tensor

SETTINGS = [{"penalty": 0.5}, {"penalty": 2.0}]


def joined(first_NMV: Tensor, other_NMV: Tensor, penalty: float) -> Tensor:
    """Logits minus a penalty where the other distribution gives a token more."""
    first, other = first_NMV.log_softmax(-1), other_NMV.log_softmax(-1)
    return first - penalty * torch.relu(other - first)
