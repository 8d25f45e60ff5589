"""One coordinate at one layer decides between text and memory: it is set to a value.

Minder et al. (2024), "Controllable context sensitivity and the knob behind it", arXiv 2411.07404 (ICLR 2025). The
direction is learned by interchange: a prompt that gets the coordinate of a phrasing that was answered the other way
must be answered the other way.

Shapes: P pairs, N prompts, D neurons.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import torch
from torch import Tensor

from mnemoscope.behaviour import Batch
from mnemoscope.interventions import Intervention, LowRank, SteeringVector, Toward, edited
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.learning import Asked, Lesson, descend, log_p
from mnemoscope.interventions.shifts import once, spread_layers
from mnemoscope.interventions.sources import in_turn, with_prefixes

LAYERS = 4
PLACES = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)  # of the value: 0 the mean of both sides, 1 that of the wanted side
RATE = 0.02  # of each coordinate of a vector of norm 1


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and value; InputError with too few pairs."""
    sources, found = bench.sources("block"), list[Intervention]()
    for layer, place in product(spread_layers(bench, LAYERS), PLACES):
        knob_D = learned(bench, layer)
        along_P2 = (torch.from_numpy(sources.states_P2LD[:, :, layer]).float() * knob_D).sum(-1)
        wanted, middle = float(along_P2[:, 0 if toward == "generalized" else 1].mean()), float(along_P2.mean())
        value = middle + place * (wanted - middle)
        setting = {"layer": layer, "place": place, "value": value}
        edit = held(knob_D, torch.tensor([value]))
        found.append(SteeringVector(toward, {layer: edit}, method="knob", setting=setting))
    return found


def held(knob_D: Tensor, value: Tensor) -> LowRank:
    """What sets the coordinate along a unit vector to a value, (1,), or to one of each prompt, (N, 1, 1)."""
    return LowRank(-knob_D[None], value, knob_D[None])


@once
def learned(bench: Bench, layer: int) -> Tensor:
    """The direction of a layer, float32 (D,), of norm 1, which serves both ways.

    Adam on the log probability of the other answer under the other side's coordinate, from the mean difference on.

    The vector that is applied always has norm 1, so one rate fits every model.
    """
    states_P2D = torch.from_numpy(bench.sources("block").states_P2LD[:, :, layer]).float()
    raw_D = (states_P2D[:, 0] - states_P2D[:, 1]).mean(0)
    raw_D = (raw_D / raw_D.norm().clamp(min=1e-12)).requires_grad_()
    lessons = interchanges(bench, layer, states_P2D), ()
    descend([raw_D], RATE, lambda: raw_D / raw_D.norm(), lessons, bench.lists.steps, math.inf)
    return (raw_D / raw_D.norm()).detach()


def interchanges(bench: Bench, layer: int, states_P2D: Tensor) -> list[Lesson]:
    """A unit vector's loss: one side of pairs, with the other side's coordinate, wants the other side's answer."""

    def lesson(asked: Asked, donor_ND: Tensor, unit_D: Tensor) -> Tensor:
        edit = held(unit_D, (donor_ND * unit_D).sum(-1)[:, None, None])
        applied = partial(edited, bench.asking.model, {layer: edit}, "block", "once")
        return -log_p(bench.asking, [asked], applied, everywhere=False).mean()

    # Side 0 was answered generalized (option 1), and its other side memorized (option 0).
    return in_turn(
        [
            partial(lesson, Asked(b, torch.full((len(b.examples_N),), side)), states_P2D[b.examples_N, 1 - side])
            for b in _sides(bench, side)
        ]
        for side in (0, 1)
    )


@once
def _sides(bench: Bench, side: int) -> list[Batch]:
    """One side of all pairs, prepared with prefixes."""
    return with_prefixes(bench.lists.asking, [pair[side] for pair in bench.pairs])
