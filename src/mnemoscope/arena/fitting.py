"""One loop for whatever is learned by gradients, on the lists that learned vectors are fitted on.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.arena.contract import Applied
from mnemoscope.behaviour import Asking, Batch, only_log_probability, with_options, without_prefix
from mnemoscope.directions import ANSWERED, FitLists, wanted_batches
from mnemoscope.steering import Edit, Toward

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


def randomized(edit: Edit, seed: Sequence[int]) -> Edit:
    """The same edit along one random direction: each state moves as far as before, somewhere else."""
    generator = torch.Generator().manual_seed(int(np.random.default_rng(list(seed)).integers(2**31)))
    known: dict[int, Tensor] = {}

    def moved(states_NTD: Tensor) -> Tensor:
        width = states_NTD.shape[-1]
        if width not in known:
            drawn_D = torch.randn(width, generator=generator)
            known[width] = drawn_D / drawn_D.norm()
        far_NT1 = (edit(states_NTD) - states_NTD).norm(dim=-1, keepdim=True)
        return states_NTD + far_NT1 * known[width].to(states_NTD)

    return moved
