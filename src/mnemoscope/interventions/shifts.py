"""Methods that are one direction for all settings of a site: their steering vectors, and their nulls.

Such a module has ``direction(sources, labels)``, float64 (L, D) towards ``generalized``, and ``BY_RHO`` where neurons
are chosen by |rho|, as in the paper, instead of by their shift in units of strength. Neurons are chosen and the shift
is scaled afterwards, so that all methods are compared at equal norm. The negative steers the other way.

Shapes: N states, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import product
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mnemoscope.config import GridConfig
from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.registry import method_module
from mnemoscope.interventions.sources import ANSWERED, Labels, Sources, Unit
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import Site, blocks_of
from mnemoscope.statistics import top_by_magnitude

Made = TypeVar("Made")
# Tried in spreads unless the bench says otherwise (``bench.tried``).
GRIDS: dict[Site, GridConfig] = {"block": GridConfig(layers=("spread-8",), tops=(0.5,), strengths=(0.1, 0.2, 0.4, 0.8))}


def once(make: Callable[..., Made]) -> Callable[..., Made]:
    """A function of a bench, and of plain values, that is computed once for each: it serves several settings."""
    known: WeakKeyDictionary[Bench, dict[tuple[object, ...], Made]] = WeakKeyDictionary()

    @wraps(make)
    def kept(bench: Bench, *given: object) -> Made:
        found = known.setdefault(bench, {})
        if given not in found:
            found[given] = make(bench, *given)
        return found[given]

    return kept


class Setting(NamedTuple):
    """Where a shift acts, on which share of the neurons, and how strongly in which unit."""

    unit: Unit
    site: Site
    layers: tuple[int, ...]
    top: float
    strength: float

    @classmethod
    def of(cls, one: SteeringVector) -> Setting:
        """That of a vector that was ``made``."""
        return cls(one.unit, one.site, tuple(one.setting["layers"]), one.top, one.strength)


def candidates(bench: Bench, method: str, toward: Toward) -> list[Intervention]:
    """Every combination of each grid of a method's direction; InputError with too few pairs."""
    tried, count = bench.tried, len(blocks_of(bench.asking.model))
    unit, grids = (tried.unit, tried.grids) if tried.grids else ("spread", GRIDS)
    return [
        vector(bench, method, toward, Setting(unit, site, *place))
        for site, grid in grids.items()
        for place in product(grid.layer_sets(count), grid.tops, grid.strengths)
    ]


def again(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """The same setting of the direction under other labels."""
    return [vector(bench, one.method, one.toward, Setting.of(one), labels) for labels in several]


def vector(bench: Bench, method: str, toward: Toward, setting: Setting, labels: Labels = ANSWERED) -> SteeringVector:
    """A method's direction on the top share of the neurons of all layers at once, at a strength."""
    module = method_module(method)
    shift_LD = toward.sign * _direction(bench, module.direction, setting.site, setting.unit, labels)
    rank_LD = rho(bench, setting.site, labels) if getattr(module, "BY_RHO", False) else None
    return made(bench, method, toward, setting, shift_LD, rank_LD)


def made(
    bench: Bench, method: str, toward: Toward, setting: Setting, shift_LD: np.ndarray, rank_LD: np.ndarray | None = None
) -> SteeringVector:
    """The vector of a shift: on the neurons that rank highest over all layers at once, scaled to the strength.

    ``rank_LD``: default: the shift in units of strength.
    """
    unit, site, layers, top, strength = setting
    sources = bench.sources(site, unit)
    relative_LD = sources.relative(shift_LD)
    kept_LD = top_neurons(relative_LD if rank_LD is None else rank_LD, layers, top) & (sources.unit_LD > 0)
    norm = np.linalg.norm(relative_LD[kept_LD])
    facts = {"layers": list(layers), "top": top, "strength": strength}
    blank = SteeringVector(toward, {}, site, bench.tried.positions, top, strength, unit, method=method, setting=facts)
    return blank.with_dense(np.where(kept_LD, shift_LD, 0.0) * (strength / norm if norm > 0 else 0.0))


def top_neurons(rank_LD: np.ndarray, layers: Sequence[int], top: float) -> np.ndarray:
    """The share ``top`` of the neurons of some layers that rank highest; bool (L, D)."""
    kept_LD = np.zeros(rank_LD.shape, bool)
    kept_LD[list(layers)] = top_by_magnitude(rank_LD[list(layers)], top)
    return kept_LD


@once
def _direction(
    bench: Bench, direction: Callable[[Sources, Labels], np.ndarray], site: Site, unit: Unit, labels: Labels
) -> np.ndarray:
    return direction(bench.sources(site, unit), labels)


@once
def rho(bench: Bench, site: Site, labels: Labels = ANSWERED) -> np.ndarray:
    """Correlation of each neuron with the label, float64 (L, D); NaN for a constant one."""
    return bench.sources(site).moments(labels).rho_LD


def spread_layers(bench: Bench, n: int) -> list[int]:
    """At most ``n`` layers, evenly spread, without the first and the last where there is a choice."""
    count = len(blocks_of(bench.asking.model))
    return sorted({min(round(i * count / (n + 1)), count - 1) for i in range(1, n + 1)})


def norm_of(vector: SteeringVector, sources: Sources) -> float:
    """How far a vector moves the fit pairs' states: root mean square in units of their norm, all layers together."""
    squares = 0.0
    for layer, edits in vector.edits.items():
        states_ND = torch.from_numpy(sources.states_P2LD[:, :, layer]).flatten(0, 1)
        moved_ND = torch.stack([one.added(states_ND).expand_as(states_ND) for one in edits]).sum(0)
        moved_N = moved_ND.norm(dim=-1).double().numpy() / sources.norm_L[layer]
        squares += float((moved_N**2).mean())
    return math.sqrt(squares)
