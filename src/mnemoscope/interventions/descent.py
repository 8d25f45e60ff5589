"""One loop for whatever is learned by gradients, on the lists that learned vectors are fitted on.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from mnemoscope.behaviour import Asking, Batch, only_log_probability, with_options, without_prefix
from mnemoscope.interventions.ascent import wanted_batches
from mnemoscope.interventions.contract import Applied, Toward
from mnemoscope.interventions.sources import ANSWERED, FitLists


def unchanged(start: int | None = None) -> AbstractContextManager[Any]:
    """The context in which nothing is changed."""
    return nullcontext()


Loss = Callable[[Batch, Tensor], Tensor]  # a batch, the number of the wanted option of each example -> loss


def descend(
    lists: FitLists, toward: Toward, parameters: Sequence[Tensor], loss: Loss, rate: float, kept: Loss | None = None
) -> None:
    """Adam on a loss of wanted answers, with a rate that falls to 0; every second step also holds what should stay.

    Batches alternate between phrasings of pairs and other conflicts, as for learned vectors; ``kept``: the loss of
    answers that should stay, default: as of wanted ones.
    """
    adam = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / lists.steps)
    held = cycle(lists.kept[toward]) if lists.kept[toward] else None
    for number, asked in enumerate(islice(cycle(wanted_batches(lists, toward, ANSWERED)), lists.steps)):
        total = loss(asked.batch, asked.option_N)
        if held and number % 2:
            batch = next(held)
            total = total + (kept or loss)(batch, torch.zeros(len(batch.examples_N), dtype=torch.long))
        # Not backward(): that would also fill the gradients of the model's own parameters.
        for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(list(parameters), 1.0)
        adam.step()
        schedule.step()


def surprise(asking: Asking, applied: Applied, everywhere: bool = False) -> Loss:
    """Mean of ``-log p(wanted answer)`` in nats, read in a context."""

    def loss(batch: Batch, option_N: Tensor) -> Tensor:
        return -log_p(asking, applied, batch, option_N, everywhere).mean()

    return loss


def log_p(asking: Asking, applied: Applied, batch: Batch, option_N: Tensor, everywhere: bool = False) -> Tensor:
    """Log probability of one option of each example, in nats, read in a context; (N,)."""
    one = with_options(without_prefix(batch) if everywhere else batch, option_N[None].to(batch.ids_NT.device))
    with applied(one.ids_NT.shape[1] - 1):
        return only_log_probability(asking, one)
