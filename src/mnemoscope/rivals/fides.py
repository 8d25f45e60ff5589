"""Contrastive decoding whose weight at each token is fused from three signals of conflict.

Yu et al. (2026), "FIDES: faithful inference via deep evidence signals", arXiv 2606.05644. The weight is ``max(least,
scale * (0.5 opposition + 0.3 shift + 0.2 noise))``, of signals cut to 0 .. 1: the Jensen-Shannon divergence of outputs;
a tenth of the mean distance, over layers, of the two passes' states of norm 1; a fifth of the divergence of the middle
layer's prediction from the last one's, on the side that is followed. Theirs are 1.5 and 0.1; here tune chooses. Our
reading: states are outputs of blocks, and predictions are read from them through the model's last norm (logit lens).

Shapes: N prompts, M tokens, V vocabulary, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mnemoscope.behaviour import capturing
from mnemoscope.interventions.contract import Seen
from mnemoscope.interventions.methods import cad
from mnemoscope.models import backbone_of, core_of
from mnemoscope.rivals.adacad import divergence

SETTINGS = [{"scale": scale, "least": least} for scale, least in product((0.5, 1.0, 1.5, 2.0), (0.0, 0.1))]


@contextmanager
def watched(model: Any) -> Iterator[Seen]:
    """Inside the context passes keep the outputs of all blocks."""
    with capturing(model, "block", offsets=None) as states:
        yield partial(signals, model, states)


@torch.no_grad()
def signals(model: Any, states: Sequence[Tensor], columns: int) -> tuple[Tensor, Tensor]:
    """States of norm 1, (L, N, M, D), and the divergence of the middle layer's prediction from the last's, (N, M)."""
    states_LNMD = torch.stack([state_NTD[:, -columns:].to(model.device) for state_NTD in states])
    norms = [part for part in backbone_of(model).children() if "norm" in type(part).__name__.lower()]
    ends = states_LNMD[[max(0, len(states) // 2 - 1), -1]]
    for norm in norms[-1:]:  # the first of two stands behind the embedding
        ends = norm(ends)
    middle_NMV, last_NMV = core_of(model).get_output_embeddings()(ends).float().log_softmax(-1)
    return normalize(states_LNMD.float(), dim=-1), (middle_NMV.exp() * (middle_NMV - last_NMV)).sum(-1)


def joined(first_NMV: Tensor, other_NMV: Tensor, first: Any, other: Any, scale: float, least: float) -> Tensor:
    """The difference, weighted by the ``signals`` of the two passes."""
    shift_NM, noise_NM = (first[0] - other[0]).norm(dim=-1).mean(0) / 10, (first[1] / 5).clamp(0, 1)
    score_NM = 0.5 * divergence(first_NMV, other_NMV) + 0.3 * shift_NM + 0.2 * noise_NM
    return cad.joined(first_NMV, other_NMV, (scale * score_NM).clamp(min=least)[..., None])
