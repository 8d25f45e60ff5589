"""An adapter trained to prefer the wanted over the other answer.

Rafailov et al. (2023), "Direct preference optimization", arXiv 2305.18290. What should stay is held by its log
probability, as for the other methods that learn.

Shapes: N examples.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mnemoscope.behaviour import Asking, Batch, log_probabilities, without_prefix
from mnemoscope.interventions import Intervention, Toward
from mnemoscope.interventions.adapter import of_each_strength, trained
from mnemoscope.interventions.descent import Loss, surprise, unchanged

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "an adapter trained on wanted over other answers"
RATE = 1e-3
BETA = 0.1


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every strength of one adapter; InputError without peft."""
    kept = partial(surprise, applied=unchanged, everywhere=True)
    return of_each_strength(trained(bench, "dpo", toward, RATE, preference, kept))


def preference(asking: Asking) -> Loss:
    """``-2 / beta * log sigmoid(beta * d)``, d: how much more the adapted model prefers the wanted answer than before.

    The factor is for what should stay: a nat of preference weighs as much at first as a nat of an answer that is held.
    """

    def loss(batch: Batch, option_N: Tensor) -> Tensor:
        with torch.no_grad(), asking.model.disable_adapter():
            before_N = _margin(asking, batch, option_N)
        return -2 / BETA * logsigmoid(BETA * (_margin(asking, without_prefix(batch), option_N) - before_N)).mean()

    return loss


def _margin(asking: Asking, batch: Batch, option_N: Tensor) -> Tensor:
    """Log probability of one option minus that of the other, in nats, from one pass over the prompt; (N,)."""
    logp_N2 = log_probabilities(asking, batch)
    return (2 * option_N.to(logp_N2.device) - 1) * (logp_N2[:, 1] - logp_N2[:, 0])
