"""A shift that is optimized: the log probability of the wanted answer, under a budget of norm.

Shapes: N examples, L layers, D neurons, K shifts that are learned together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.hooks import Positions, edited
from mnemoscope.interventions.learning import Asked, gradients, log_p, wanted_batches
from mnemoscope.interventions.shifts import Setting, made, once, spread_layers
from mnemoscope.interventions.sources import ANSWERED, TAUGHT, TOGETHER, Labels, Sources, Unit
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import Site, blocks_of, in_precision, quick_precision

NULLS = TAUGHT
LAYERS = 3
STRENGTHS = (0.25, 0.6, 1.2)  # of the shift, in units of each neuron's spread
MOMENTUM = 0.5
MOST_WEIGHTS = 2**24  # of a model that is read in bfloat16, as all are cast anew in each pass
Taught = tuple[float, Labels]  # a strength, and the labels that are learned from
Place = tuple[Unit, Site, tuple[int, ...]]


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and strength, each learned apart, or what the bench tries; InputError with too few pairs."""
    found, tried = list[Intervention](), bench.tried
    several: list[tuple[Place, tuple[float, ...], tuple[float, ...]]] = []
    if tried.grids is None:
        alone = product(spread_layers(bench, LAYERS), STRENGTHS)
        several = [(("spread", "block", (layer,)), (strength,), (1.0,)) for layer, strength in alone]
    for site, grid in (tried.grids or {}).items():
        # Always the same strengths of a place are learned in one go, as a shift rounds as its batch does.
        parts = [grid.strengths[n : n + TOGETHER] for n in range(0, len(grid.strengths), TOGETHER)]
        places = product(grid.layer_sets(len(blocks_of(bench.asking.model))), parts)
        several += [((tried.unit, site, layers), part, grid.tops) for layers, part in places]
    best = bench.places.get(toward)  # the best of what was looked at first
    for place, strengths, tops in several:
        if best is not None and place[1:] != best[:2]:
            continue
        strengths = strengths if best is None else (best[2],)
        shifts = _learned(bench, toward, place, tuple((strength, ANSWERED) for strength in strengths))
        for top, (strength, shift_LD) in product(tops, zip(strengths, shifts, strict=True)):
            found.append(made(bench, "learned", toward, Setting(*place, top, strength), shift_LD))
    return found


def again(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """The same setting learned from other answers, all in one go."""
    setting = Setting.of(one)
    shifts = _learned(bench, one.toward, setting[:3], tuple((one.strength, labels) for labels in several))
    return [made(bench, "learned", one.toward, setting, shift_LD) for shift_LD in shifts]


@once
def _learned(bench: Bench, toward: Toward, place: Place, fits: tuple[Taught, ...]) -> list[np.ndarray]:
    unit, site, layers = place
    return learned_together(bench.sources(site, unit), toward, layers, bench.tried.positions, fits)


def learned_together(
    sources: Sources, toward: Toward, layers: Sequence[int], positions: Positions, fits: Sequence[Taught]
) -> list[np.ndarray]:
    """Shifts optimized on the fit split for the log probability of the wanted answer, each within its strength.

    One for each of ``fits``; float64 (L, D), zero in other layers.

    Steepest ascent with momentum: each gradient is scaled to norm 1, so that neurons without influence take nothing of
    the budget, as they would with Adam. Steps fall from the whole budget to 0; after each the shift is scaled back into
    it. Passes of small models are in bfloat16 where that is quicker; the shift is applied and judged in float32.
    """
    model, shift_KLD = sources.lists.asking.model, np.zeros((len(fits), *sources.shape_LD))
    small = sum(weight.numel() for weight in model.parameters()) <= MOST_WEIGHTS
    with in_precision(model, quick_precision(model) if small else "float32"):
        for layer, unit_KD in _ascended(sources, toward, layers, positions, fits).items():
            shift_KLD[:, layer] = unit_KD.detach().double().numpy() * sources.unit_LD[layer]
    return list(shift_KLD)


def _ascended(
    sources: Sources, toward: Toward, layers: Sequence[int], positions: Positions, fits: Sequence[Taught]
) -> Mapping[int, Tensor]:
    """By layer, the shifts where the ascent ends, float32 (K, D), in units of strength."""
    lists, unit_LD = sources.lists, torch.from_numpy(sources.unit_LD).float()
    units = {layer: torch.zeros(len(fits), sources.shape_LD[1], requires_grad=True) for layer in layers}
    parts = list(units.values())

    def shifts() -> dict[int, Tensor]:
        return {layer: unit_KD * unit_LD[layer] for layer, unit_KD in units.items()}

    def loss(asked: Sequence[Asked], weight: float, shifts: dict[int, Tensor]) -> Tensor:
        n = len(asked[0].batch.examples_N)  # answers k are read under shift k
        rows = {layer: shift_KD.repeat_interleave(n, 0) for layer, shift_KD in shifts.items()}
        applied = partial(edited, lists.asking.model, rows, sources.site, positions)
        return -weight * (log_p(lists.asking, asked, applied, positions == "all").sum() / n)

    wanted = zip(*(wanted_batches(lists, toward, labels) for _, labels in fits), strict=True)
    held = lists.kept[toward] if lists.kept_weight else ()
    kept = [partial(loss, [Asked.first(batch)] * len(fits), lists.kept_weight) for batch in held]
    strength_K1 = torch.tensor([[strength] for strength, _ in fits], dtype=torch.float32)
    ascent = torch.optim.SGD(parts, lr=1 - MOMENTUM, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(ascent, lambda step: 1 - step / lists.steps)
    for _ in gradients(parts, shifts, ([partial(loss, asked, 1.0) for asked in wanted], kept), lists.steps):
        found = [unit_KD.grad for unit_KD in parts if unit_KD.grad is not None]
        norm_K1 = _norm(found)
        for unit_KD, gradient_KD in zip(parts, found, strict=True):
            unit_KD.grad = strength_K1 * torch.where(norm_K1 > 0, gradient_KD / norm_K1, gradient_KD)
        ascent.step()
        schedule.step()
        with torch.no_grad():
            scale_K1 = (strength_K1 / _norm(parts)).clamp(max=1.0)
            for unit_KD in parts:
                unit_KD *= scale_K1
    return units


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """The norm of each row over all parts together, (K, 1)."""
    return torch.stack([part_KD.norm(dim=1, keepdim=True) for part_KD in parts]).norm(dim=0)
