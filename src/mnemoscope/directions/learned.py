"""A shift that is optimized: the log probability of the wanted answer, under a budget of norm.

Shapes: N examples, L layers, D neurons, K shifts that are learned together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Batch, only_log_probability, stacked, with_option, without_prefix
from mnemoscope.directions.sources import Sources, in_turn
from mnemoscope.models import in_precision, quick_precision
from mnemoscope.steering import OPPOSITE, Positions, Toward, shifted

MOMENTUM = 0.5
# Of a model that is read in bfloat16: weights that do not learn are cast anew in each pass and kept until its gradient.
MOST_WEIGHTS = 2**24


@dataclass(frozen=True, slots=True)
class Budget:
    """What is learned, and with how much.

    Attributes:
        toward: the behaviour turned to.
        layers: the layers that may be shifted.
        strength: total relative norm that may be spent: the root of the summed squares of each layer's shift over the
            norm of its states.
        steps: of the ascent; each reads one batch of examples to be turned and one of those to be kept.
        kept_weight: weight of the examples to be kept, against the examples to be turned; 0 leaves them out.
        positions: where it will be applied.
    """

    toward: Toward
    layers: tuple[int, ...]
    strength: float
    steps: int = 20
    kept_weight: float = 1.0
    positions: Positions = "decision"


def learn(sources: Sources, budget: Budget) -> np.ndarray:
    """The learned shift, float64 (L, D); zero in other layers.

    Steepest ascent with momentum: each gradient is scaled to norm 1, so that neurons without influence take nothing of
    the budget (steps scaled neuron by neuron, as Adam's, would give it to them). Steps fall from the whole budget to 0;
    after each the shift is scaled back into it.
    """
    if budget not in sources.found:
        learn_together([sources], budget)
    return sources.found[budget]


def learn_together(several: Sequence[Sources], budget: Budget) -> None:
    """``learn`` for sources that differ in their shuffle only, in the same passes; each keeps what was found.

    A pass over the rows of several costs much less than as many passes. Passes of small models are in bfloat16 where
    that is quicker: what is found is all but parallel to what float32 finds, and is applied and judged in float32.
    """
    model = several[0].lists.asking.model
    small = sum(weight.numel() for weight in model.parameters()) <= MOST_WEIGHTS
    with in_precision(model, quick_precision(model) if small else "float32"):
        found_KLD = _ascended(several, budget)
    for sources, found_LD in zip(several, found_KLD, strict=True):
        sources.found[budget] = found_LD


def _ascended(several: Sequence[Sources], budget: Budget) -> np.ndarray:
    """The shifts where the ascent ends, float64 (K, L, D)."""
    layers, neurons = several[0].shape_LD
    units = {layer: torch.zeros(len(several), neurons, requires_grad=True) for layer in budget.layers}
    norm_L = torch.from_numpy(several[0].norm_L).float()
    ascent = torch.optim.SGD(units.values(), lr=budget.strength * (1 - MOMENTUM), momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(ascent, lambda step: 1 - step / budget.steps)
    held = several[0].lists.kept[budget.toward]
    kept = cycle(held) if held and budget.kept_weight else None
    wanted = cycle(zip(*(wanted_batches(sources, budget.toward) for sources in several), strict=True))
    for number, batches in enumerate(islice(wanted, budget.steps)):
        shifts = {layer: unit_KD * norm_L[layer] for layer, unit_KD in units.items()}
        loss = -_log_p(several[0], batches, shifts, budget.positions)
        if kept and number % 2:  # every second step is enough to hold what should stay
            same = [next(kept)] * len(several)
            loss = loss - budget.kept_weight * _log_p(several[0], same, shifts, budget.positions)
        # Not backward(): that would also fill the gradients of the model's own parameters.
        gradients = torch.autograd.grad(loss, list(units.values()))
        norm_K1 = _norm(gradients)
        for unit_KD, gradient_KD in zip(units.values(), gradients, strict=True):
            unit_KD.grad = torch.where(norm_K1 > 0, gradient_KD / norm_K1, gradient_KD)
        ascent.step()
        schedule.step()
        _project(list(units.values()), budget.strength)
    found_KLD = np.zeros((len(several), layers, neurons))
    for layer, unit_KD in units.items():
        found_KLD[:, layer] = unit_KD.detach().double().numpy() * several[0].norm_L[layer]
    return found_KLD


def wanted_batches(sources: Sources, toward: Toward) -> Iterator[Batch]:
    """Batches to learn from, with the answer that is wanted of each example as its only one.

    Phrasings of pairs and other conflicts take turns. Under a shuffle both sides of the pairs are asked for either
    answer, half for each and both equally often, so that nothing links what is wanted to what the model says: asked of
    one side alone, either answer in half of the cases would still teach to leave that side.
    """
    ways = (toward,) if sources.shuffle is None else (toward, OPPOSITE[toward])
    lists = [found[way] for found in (sources.lists.pairs, sources.lists.conflicts) for way in ways]
    option = 1 if toward == "generalized" else 0
    placed = [[(stream, number, batch) for number, batch in enumerate(batches)] for stream, batches in enumerate(lists)]
    longest = max(map(len, placed))
    if sources.shuffle is not None:
        placed = [list(islice(cycle(batches), longest)) for batches in placed]
    for stream, number, batch in in_turn(placed):
        stays_N = torch.from_numpy(sources.signs(len(batch.examples_N), stream, number) > 0)
        yield with_option(batch, torch.where(stays_N, option, 1 - option).to(batch.ids_NT.device))


def _log_p(sources: Sources, batches: Sequence[Batch], shifts: Mapping[int, Tensor], positions: Positions) -> Tensor:
    """Mean log probability of the only answers, in nats, summed over the shifts; batch k is read under shift k."""
    asking, n = sources.lists.asking, len(batches[0].examples_N)
    batch = stacked([without_prefix(batch) for batch in batches] if positions == "all" else batches)
    of_prompts = {layer: shift_KD.repeat_interleave(n, 0) for layer, shift_KD in shifts.items()}
    start = None if positions == "all" else batch.ids_NT.shape[1] - 1
    with shifted(asking.model, of_prompts, sources.site, positions, start):
        return only_log_probability(asking, batch).sum() / n


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """The norm of each row over all parts together, (K, 1)."""
    return torch.stack([part_KD.norm(dim=1, keepdim=True) for part_KD in parts]).norm(dim=0)


@torch.no_grad()
def _project(units: Sequence[Tensor], strength: float) -> None:
    scale_K1 = (strength / _norm(units)).clamp(max=1.0)
    for unit_KD in units:
        unit_KD *= scale_K1
