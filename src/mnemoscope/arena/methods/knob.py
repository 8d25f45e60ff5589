"""One coordinate at one layer decides between text and memory: it is set to a value.

Minder et al. (2024), "Controllable context sensitivity and the knob behind it", arXiv 2411.07404 (ICLR 2025). The
direction is learned by interchange: a prompt that gets the coordinate of a phrasing that was answered the other way
must be answered the other way.

Shapes: P pairs, N prompts, T tokens, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice, product

import torch
from torch import Tensor

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.fitting import log_p
from mnemoscope.arena.lists import Bench
from mnemoscope.arena.vectors import at_block, by_edit, spread_layers
from mnemoscope.behaviour import Batch
from mnemoscope.directions import with_prefixes
from mnemoscope.steering import Edit, Toward

LAYERS = 4
PLACES = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)  # of the value: 0 the mean of both sides, 1 that of the wanted side
RATE = 0.02  # of each coordinate of a vector of norm 1


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and value; InputError with too few pairs."""
    sources, found = bench.sources("block"), []
    for layer, place in product(spread_layers(bench, LAYERS), PLACES):
        knob_D = learned(bench, layer)
        along_P2 = coordinate(torch.from_numpy(sources.states_P2LD[:, :, layer]).float(), knob_D)
        wanted, middle = float(along_P2[:, 0 if toward == "generalized" else 1].mean()), float(along_P2.mean())
        value = middle + place * (wanted - middle)
        setting: dict[str, object] = {"layer": layer, "place": place, "value": value}
        found.append(by_edit(bench, "knob", toward, setting, layer, held(knob_D, value)))
    return found


def held(knob_D: Tensor, value: float | Tensor) -> Edit:
    """Set the coordinate along a unit vector to a value, or to one of each row (N,)."""

    def hold(states_NTD: Tensor) -> Tensor:
        unit_D = knob_D.to(states_NTD)
        aim = value[:, None].to(states_NTD) if isinstance(value, Tensor) else value
        return states_NTD + (aim - coordinate(states_NTD, unit_D))[..., None] * unit_D

    return hold


def coordinate(states_ND: Tensor, unit_D: Tensor) -> Tensor:
    """The coordinate of states along a unit vector, (N,); not by a product of matrices, whose rounding varies."""
    return (states_ND * unit_D).sum(-1)


def learned(bench: Bench, layer: int) -> Tensor:
    """The direction of a layer, float32 (D,), of norm 1; it serves both ways, and is learned once."""
    known: Tensor | None = bench.cache.get(("knob", layer))
    if known is None:
        known = bench.cache["knob", layer] = _learned(bench, layer)
    return known


def _learned(bench: Bench, layer: int) -> Tensor:
    """Adam on the log probability of the other answer under the other side's coordinate, from the mean difference on.

    The gradient is that by the coordinates of the state in units of its norm, so that one rate fits every model.
    """
    states_P2D = torch.from_numpy(bench.sources("block").states_P2LD[:, :, layer]).float()
    raw_D = (states_P2D[:, 0] - states_P2D[:, 1]).mean(0)
    raw_D = (raw_D / raw_D.norm().clamp(min=1e-12)).requires_grad_()
    adam = torch.optim.Adam([raw_D], lr=RATE)
    steps = bench.config.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    for batch, donor_ND, option_N in islice(cycle(_interchanges(bench, states_P2D)), steps):
        unit_D = raw_D / raw_D.norm()
        edit = _once(held(unit_D, coordinate(donor_ND, unit_D)))
        applied = at_block(bench.asking.model, layer, edit)
        loss = -log_p(bench.asking, applied, batch, option_N).mean()
        (raw_D.grad,) = torch.autograd.grad(loss, [raw_D])
        adam.step()
        schedule.step()
    return (raw_D / raw_D.norm()).detach()


def _once(edit: Edit) -> Edit:
    """The edit at the decision position only, as a patch of one state."""
    return lambda states_NTD: torch.cat([edit(states_NTD[:, :1]), states_NTD[:, 1:]], dim=1)


def _interchanges(bench: Bench, states_P2D: Tensor) -> list[tuple[Batch, Tensor, Tensor]]:
    """Batches of one side of pairs, the states of the other side, and the option that the other side was answered."""

    def of_side(side: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        key = ("interchanges", side)
        if key not in bench.cache:
            bench.cache[key] = with_prefixes(bench.lists.asking, [pair[side] for pair in bench.pairs])
        for batch in bench.cache[key]:
            yield batch, states_P2D[batch.examples_N, 1 - side], torch.full((len(batch.examples_N),), side)

    both = zip(of_side(0), of_side(1), strict=True)
    # Side 0 was answered generalized (option 1), and its other side memorized (option 0).
    return [one for pair in both for one in pair]
