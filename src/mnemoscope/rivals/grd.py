"""Text or memory, where they want different tokens: decided by the exponent at which the order of the two turns.

Jiang et al. (2026), arXiv 2606.10298. Of the family ``p(prior)^(1 - t) p(context)^t`` the authors decide once, at the
first token at which the two conflict; here it is decided at each such token, so that a pass needs no past.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

SETTINGS = [{"gate": gate} for gate in (0.25, 0.5, 0.75, 0.9, 0.97)]


def turn(first_NMV: Tensor, other_NMV: Tensor) -> Tensor:
    """The exponent t from which on the first one's top token is ahead of the other's; 0 where they agree, (N, M, 1).

    ``d' / (d + d')``, with d and d' by how many nats each prefers its own.
    """
    mine_NM1, theirs_NM1 = (logits_NMV.argmax(-1, keepdim=True) for logits_NMV in (first_NMV, other_NMV))
    ahead_NM1, behind_NM1 = (
        logits_NMV.gather(-1, mine_NM1) - logits_NMV.gather(-1, theirs_NM1) for logits_NMV in (first_NMV, other_NMV)
    )
    return torch.where(mine_NM1 == theirs_NM1, 0.0, -behind_NM1 / (ahead_NM1 - behind_NM1).clamp(min=1e-12))


def joined(first_NMV: Tensor, other_NMV: Tensor, gate: float) -> Tensor:
    """The first side where the order turns at ``gate`` or before, else the other; half of each where they agree."""
    first_NMV, other_NMV = first_NMV.log_softmax(-1), other_NMV.log_softmax(-1)
    agree_NM1 = first_NMV.argmax(-1, keepdim=True) == other_NMV.argmax(-1, keepdim=True)
    trusted_NMV = torch.where(turn(first_NMV, other_NMV) <= gate, first_NMV, other_NMV)
    return torch.where(agree_NM1, (first_NMV + other_NMV) / 2, trusted_NMV)
