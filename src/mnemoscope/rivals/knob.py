"""One coordinate at one layer decides between text and memory: it is set to a value.

Minder et al. (2024), "Controllable context sensitivity and the knob behind it", arXiv 2411.07404 (ICLR 2025). The
direction is learned by interchange: a prompt that gets the coordinate of a phrasing that was answered the other way
must be answered the other way.

Shapes: P pairs, N prompts, T tokens, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mnemoscope.behaviour import Batch
from mnemoscope.interventions import Intervention, LowRank, SteeringVector, Toward, edited
from mnemoscope.interventions.descent import log_p
from mnemoscope.interventions.hooks import Changed
from mnemoscope.interventions.shifts import once, spread_layers
from mnemoscope.interventions.sources import with_prefixes

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "one coordinate at one layer, set to a value (arXiv 2411.07404)"
LAYERS = 4
PLACES = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)  # of the value: 0 the mean of both sides, 1 that of the wanted side
RATE = 0.02  # of each coordinate of a vector of norm 1


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and value; InputError with too few pairs."""
    sources, found = bench.sources("block"), list[Intervention]()
    for layer, place in product(spread_layers(bench, LAYERS), PLACES):
        knob_D = learned(bench, layer)
        along_P2 = coordinate(torch.from_numpy(sources.states_P2LD[:, :, layer]).float(), knob_D)
        wanted, middle = float(along_P2[:, 0 if toward == "generalized" else 1].mean()), float(along_P2.mean())
        value = middle + place * (wanted - middle)
        setting = {"layer": layer, "place": place, "value": value}
        found.append(SteeringVector(toward, {layer: held(knob_D, value)}, method="knob", setting=setting))
    return found


def held(knob_D: Tensor, value: float) -> LowRank:
    """What sets the coordinate along a unit vector to a value."""
    return LowRank(-knob_D[None], torch.tensor([value]), knob_D[None])


def exchanged(knob_D: Tensor, value_N: Tensor) -> Changed:
    """Set the coordinate along a unit vector to a value of each row, at the decision position only: a patch."""

    def exchange(states_NTD: Tensor) -> Tensor:
        unit_D = knob_D.to(states_NTD)
        away_N1 = value_N[:, None].to(states_NTD) - coordinate(states_NTD[:, :1], unit_D)
        return torch.cat([states_NTD[:, :1] + away_N1[..., None] * unit_D, states_NTD[:, 1:]], dim=1)

    return exchange


def coordinate(states_ND: Tensor, unit_D: Tensor) -> Tensor:
    """The coordinate of states along a unit vector, (N,); not by a product of matrices, whose rounding varies."""
    return (states_ND * unit_D).sum(-1)


@once
def learned(bench: Bench, layer: int) -> Tensor:
    """The direction of a layer, float32 (D,), of norm 1, which serves both ways.

    Adam on the log probability of the other answer under the other side's coordinate, from the mean difference on.

    The gradient is that by the coordinates of the state in units of its norm, so that one rate fits every model.
    """
    states_P2D = torch.from_numpy(bench.sources("block").states_P2LD[:, :, layer]).float()
    raw_D = (states_P2D[:, 0] - states_P2D[:, 1]).mean(0)
    raw_D = (raw_D / raw_D.norm().clamp(min=1e-12)).requires_grad_()
    adam = torch.optim.Adam([raw_D], lr=RATE)
    steps = bench.lists.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    for batch, donor_ND, option_N in islice(cycle(_interchanges(bench, states_P2D)), steps):
        unit_D = raw_D / raw_D.norm()
        exchange = {layer: exchanged(unit_D, coordinate(donor_ND, unit_D))}
        applied = partial(edited, bench.asking.model, exchange, "block", "decision")
        loss = -log_p(bench.asking, applied, batch, option_N).mean()
        (raw_D.grad,) = torch.autograd.grad(loss, [raw_D])
        adam.step()
        schedule.step()
    return (raw_D / raw_D.norm()).detach()


def _interchanges(bench: Bench, states_P2D: Tensor) -> list[tuple[Batch, Tensor, Tensor]]:
    """Batches of one side of pairs, the states of the other side, and the option that the other side was answered."""

    def of_side(side: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        for batch in _sides(bench, side):
            yield batch, states_P2D[batch.examples_N, 1 - side], torch.full((len(batch.examples_N),), side)

    both = zip(of_side(0), of_side(1), strict=True)
    # Side 0 was answered generalized (option 1), and its other side memorized (option 0).
    return [one for pair in both for one in pair]


@once
def _sides(bench: Bench, side: int) -> list[Batch]:
    """One side of all pairs, prepared with prefixes."""
    return with_prefixes(bench.lists.asking, [pair[side] for pair in bench.pairs])
