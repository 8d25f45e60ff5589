"""An adapter trained to prefer the wanted over the other answer.

Rafailov et al. (2023), "Direct preference optimization", arXiv 2305.18290. What should stay is held as for
the other methods that learn.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mnemoscope.behaviour import Asking, Batch, log_probabilities, without_prefix
from mnemoscope.interventions import Intervention, Toward, adapter
from mnemoscope.interventions.adapter import Adapter, adapters
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.learning import Asked, log_p
from mnemoscope.interventions.sources import PERMUTED, Labels

NULLS = (PERMUTED,)
BETA = 0.1


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every rate and strength; InputError without peft."""
    return adapters(bench, "dpo", toward, preference)


def again(bench: Bench, one: Adapter, several: Sequence[Labels]) -> list[Adapter]:
    """The same trained on other answers."""
    return adapter.again(bench, one, several, preference)


def preference(asking: Asking, asked: Asked) -> Tensor:
    """``-2 / beta * log sigmoid(beta * d)``, d: how much more the adapted model prefers the wanted answer than before.

    The factor is for what should stay: a nat of preference weighs as much at first as a nat of an answer that is held.
    """

    def margin(batch: Batch) -> Tensor:
        logp_N2 = log_probabilities(asking, batch)
        option_N1 = asked.option_N[:, None].to(logp_N2.device)
        wanted_N = log_p(asking, [asked]) if asked.instead else logp_N2.gather(1, option_N1)[:, 0]
        return wanted_N - logp_N2.gather(1, 1 - option_N1)[:, 0]

    with torch.no_grad(), asking.model.disable_adapter():
        before_N = margin(asked.batch)
    return -2 / BETA * logsigmoid(BETA * (margin(without_prefix(asked.batch)) - before_N)).mean()
