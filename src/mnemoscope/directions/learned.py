"""A shift that is optimized: the log probability of the wanted answer, under a budget of norm.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Batch, log_probabilities
from mnemoscope.directions.sources import Sources
from mnemoscope.steering import OPPOSITE, Toward, shifted

OPTION: dict[Toward, int] = {"memorized": 0, "generalized": 1}  # its column in log probabilities


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

    Adam's steps begin as long as the budget and fall to 0; after each the shift is scaled back into the budget.
    """
    if budget in sources.found:
        return sources.found[budget]
    layers, neurons = sources.shape_LD
    units = {layer: torch.zeros(neurons, requires_grad=True) for layer in budget.layers}
    norm_L = torch.from_numpy(sources.norm_L).float()
    rate = budget.strength / math.sqrt(neurons * len(units))
    adam = torch.optim.Adam(units.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / budget.steps)
    turned = cycle(_turned(sources, budget.toward))
    held = sources.lists.kept[budget.toward]
    kept = cycle(held) if held and budget.kept_weight else None
    for number, (batch, wanted, stream) in enumerate(islice(turned, budget.steps)):
        shifts = {layer: unit_D * norm_L[layer] for layer, unit_D in units.items()}
        logp_N = _log_p(sources, batch, shifts)[:, OPTION[wanted]]
        labelled_N = _labelled(sources, len(logp_N), wanted == budget.toward, stream)
        loss = -logp_N[labelled_N].sum() / max(1, int(labelled_N.sum()))
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


def _turned(sources: Sources, toward: Toward) -> list[tuple[Batch, Toward, int]]:
    """Batches to learn from, the answer that is wanted of each, and the random stream of its labels.

    Phrasings of pairs and other conflicts take turns. A pair whose labels are swapped is turned the other way: the
    phrasing that really generalizes towards the answer that is really memorized. So a shuffle adds the lists of the
    other direction.
    """
    ways = (toward,) if sources.shuffle is None else (toward, OPPOSITE[toward])
    lists = [(way, found[way]) for found in (sources.lists.pairs, sources.lists.conflicts) for way in ways]
    longest = max(len(batches) for _, batches in lists)
    return [(batches[place], way, place) for place in range(longest) for way, batches in lists if place < len(batches)]


def _labelled(sources: Sources, n: int, stays: bool, stream: int) -> Tensor:
    """Which examples of a batch have the label that it is learned with: all without a shuffle, else half; bool (N,)."""
    signs_N = torch.from_numpy(sources.signs(n, stream))
    return signs_N > 0 if stays else signs_N < 0


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
