"""A shift that is optimized for the wanted answer under a budget of norm (``ascent``)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from mnemoscope.interventions.ascent import Taught, learned_together
from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.shifts import Setting, made, once, spread_layers
from mnemoscope.interventions.sources import ANSWERED, TAUGHT, TOGETHER, Labels, Unit
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import Site, blocks_of

if TYPE_CHECKING:
    import numpy as np

    from mnemoscope.bench.lists import Bench

ABOUT = "a shift that is optimized, one layer"
NULLS = TAUGHT
LAYERS = 3
STRENGTHS = (0.25, 0.6, 1.2)  # of the shift, in units of each neuron's spread


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and strength, each learned apart, or what the bench tries; InputError with too few pairs."""
    found, several = (
        list[Intervention](),
        list[tuple[Unit, Site, tuple[int, ...], tuple[float, ...], tuple[float, ...]]](),
    )
    if bench.tried.grids is None:
        alone = product(((layer,) for layer in spread_layers(bench, LAYERS)), STRENGTHS)
        several = [("spread", "block", layers, (strength,), (1.0,)) for layers, strength in alone]
    for site, grid in (bench.tried.grids or {}).items():
        for layers in grid.layer_sets(len(blocks_of(bench.asking.model))):
            # Always the same strengths of a place are learned in one go, as a shift rounds as its batch does.
            parts = [grid.strengths[n : n + TOGETHER] for n in range(0, len(grid.strengths), TOGETHER)]
            several += [(bench.tried.unit, site, layers, part, grid.tops) for part in parts]
    for unit, site, layers, strengths, tops in several:
        if (best := bench.place(toward)) is not None:  # the best of what was looked at first
            if (site, layers) != best[:2]:
                continue
            strengths = (best[2],)
        fits = tuple((strength, ANSWERED) for strength in strengths)
        shifts = _learned(bench, toward, unit, site, layers, fits)
        for top, (strength, shift_LD) in product(tops, zip(strengths, shifts, strict=True)):
            found.append(made(bench, "learned", toward, Setting(unit, site, layers, top, strength), shift_LD))
    return found


def again(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """The same setting learned from other answers, all in one go."""
    setting = Setting(one.unit, one.site, tuple(one.setting["layers"]), one.top, one.strength)
    fits = tuple((one.strength, labels) for labels in several)
    shifts = _learned(bench, one.toward, one.unit, one.site, setting.layers, fits)
    return [made(bench, "learned", one.toward, setting, shift_LD) for shift_LD in shifts]


@once
def _learned(
    bench: Bench, toward: Toward, unit: Unit, site: Site, layers: tuple[int, ...], fits: tuple[Taught, ...]
) -> list[np.ndarray]:
    return learned_together(bench.sources(site, unit), toward, layers, bench.tried.positions, fits)
