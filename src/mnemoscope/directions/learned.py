"""A shift that is optimized: the log probability of the wanted answer, under a budget of norm.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Batch, log_probabilities
from mnemoscope.directions.sources import Sources
from mnemoscope.steering import Toward, shifted


@dataclass(frozen=True, slots=True)
class Budget:
    """What is learned, and with how much.

    Attributes:
        toward: the behaviour turned to.
        layers: the layers that may be shifted.
        strength: total relative norm that may be spent: the root of the summed squares of each layer's shift over the
            norm of its states.
        steps: of Adam; each reads one batch of examples to be turned and one of those to be kept.
        kept_weight: weight of the examples to be kept, against the examples to be turned; 0 leaves them out.
    """

    toward: Toward
    layers: tuple[int, ...]
    strength: float
    steps: int = 30
    kept_weight: float = 1.0


def learn(sources: Sources, budget: Budget) -> np.ndarray:
    """The learned shift, float64 (L, D); zero in other layers.

    Phrasings of pairs and other conflicts take turns. Adam's steps begin as long as the budget and fall to 0; after
    each the shift is scaled back into the budget.
    """
    if budget in sources.found:
        return sources.found[budget]
    layers, neurons = sources.shape_LD
    units = {layer: torch.zeros(neurons, requires_grad=True) for layer in budget.layers}
    norm_L = torch.from_numpy(sources.norm_L).float()
    rate = budget.strength / math.sqrt(neurons * len(units))
    adam = torch.optim.Adam(units.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / budget.steps)
    lists = sources.lists
    turned = cycle(list(chain(*_alternating(lists.pairs[budget.toward], lists.conflicts[budget.toward]))))
    kept = cycle(lists.kept[budget.toward]) if lists.kept[budget.toward] and budget.kept_weight else None
    for number, batch in enumerate(islice(turned, budget.steps)):
        shifts = {layer: unit_D * norm_L[layer] for layer, unit_D in units.items()}
        loss = -_wanted_logp(sources, budget.toward, batch, shifts).mean()
        if kept and number % 2:  # every second step is enough to hold what should stay
            loss = loss - budget.kept_weight * _log_p(sources, next(kept), shifts)[:, 0].mean()
        # Not backward(): that would also fill the gradients of the model's own parameters.
        for unit_D, gradient_D in zip(units.values(), torch.autograd.grad(loss, list(units.values())), strict=True):
            unit_D.grad = gradient_D
        adam.step()
        schedule.step()
        _project(list(units.values()), budget.strength)
    found_LD = np.zeros((layers, neurons))
    for layer, unit_D in units.items():
        found_LD[layer] = unit_D.detach().double().numpy() * sources.norm_L[layer]
    sources.found[budget] = found_LD
    return found_LD


def _alternating(first: Sequence[Batch], second: Sequence[Batch]) -> list[Sequence[Batch]]:
    """Batches of both lists in turn; the longer one's rest follows."""
    return [[*first[i : i + 1], *second[i : i + 1]] for i in range(max(len(first), len(second)))]


def _wanted_logp(sources: Sources, toward: Toward, batch: Batch, shifts: Mapping[int, Tensor]) -> Tensor:
    """Log probability of the answer turned to, or where the labels are shuffled of either; (N,)."""
    logp_N2 = _log_p(sources, batch, shifts)
    # Batches are told apart by the examples in them, so that a shuffle treats each the same at every step.
    stays_N = torch.from_numpy(sources.signs(len(logp_N2), int(batch.examples_N.sum()), len(logp_N2)) > 0)
    wanted_N = stays_N.to(logp_N2.device) == (toward == "generalized")
    return torch.where(wanted_N, logp_N2[:, 1], logp_N2[:, 0])


def _log_p(sources: Sources, batch: Batch, shifts: Mapping[int, Tensor]) -> Tensor:
    asking = sources.lists.asking
    with shifted(asking.model, shifts, sources.site, "decision"):
        return log_probabilities(asking, batch)


@torch.no_grad()
def _project(units: list[Tensor], strength: float) -> None:
    total = math.sqrt(sum(float((unit_D**2).sum()) for unit_D in units))
    if total > strength:
        for unit_D in units:
            unit_D *= strength / total
