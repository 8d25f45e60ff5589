"""Methods that find one direction for all settings of a site: their steering vectors, and their nulls.

Neurons are chosen and the shift is scaled afterwards, so that all methods are compared at equal norm.

Shapes: N states, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mnemoscope.config import GridConfig
from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.sources import ANSWERED, Labels, Sources, Unit
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import Site, blocks_of
from mnemoscope.statistics import top_by_magnitude

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

Made = TypeVar("Made")
Direction = Callable[[Sources, Labels], np.ndarray]  # towards `generalized`, float64 (L, D)
SIGN: dict[Toward, int] = {"generalized": 1, "memorized": -1}


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


@dataclass(frozen=True)
class OneDirection:
    """A method whose direction steers one way, and its negative the other.

    Attributes:
        direction: a pure function of fit pairs and their labels.
        by_rho: whether neurons are chosen by |rho|, as in the paper; else by their shift in units of strength.
        grids, unit: what is tried unless the bench says otherwise (``bench.tried``).
    """

    name: str
    direction: Direction
    by_rho: bool = False
    grids: Mapping[Site, GridConfig] = field(
        default_factory=lambda: {
            "block": GridConfig(layers=("spread-8",), tops=(0.5,), strengths=(0.1, 0.2, 0.4, 0.8))
        },
        compare=False,
    )
    unit: Unit = "spread"

    def candidates(self, bench: Bench, toward: Toward) -> list[Intervention]:
        """Every combination of each grid; InputError with too few pairs."""
        unit, grids = (bench.tried.unit, bench.tried.grids) if bench.tried.grids else (self.unit, self.grids)
        return [self.vector(bench, toward, unit, *setting) for setting in settings(bench, grids)]

    def again(self, bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
        """The same setting of the direction under other labels."""
        layers = tuple(one.setting["layers"])
        setting = (one.toward, one.unit, one.site, layers, one.top, one.strength)
        return [self.vector(bench, *setting, labels) for labels in several]

    def vector(
        self,
        bench: Bench,
        toward: Toward,
        unit: Unit,
        site: Site,
        layers: tuple[int, ...],
        top: float,
        strength: float,
        labels: Labels = ANSWERED,
    ) -> SteeringVector:
        """The direction on the top share of the neurons of all layers at once, at a strength."""
        shift_LD = SIGN[toward] * _direction(bench, self.direction, site, unit, labels)
        rank_LD = rho(bench, site, labels) if self.by_rho else None
        return made(bench, self.name, toward, Setting(unit, site, layers, top, strength), shift_LD, rank_LD)


class Setting(NamedTuple):
    """Where a shift acts, on which share of the neurons, and how strongly in which unit."""

    unit: Unit
    site: Site
    layers: tuple[int, ...]
    top: float
    strength: float


def made(
    bench: Bench, method: str, toward: Toward, setting: Setting, shift_LD: np.ndarray, rank_LD: np.ndarray | None = None
) -> SteeringVector:
    """The vector of a shift: on the neurons that rank highest over all layers at once, scaled to the strength.

    ``rank_LD``: default: the shift in units of strength.
    """
    unit, site, layers, top, strength = setting
    sources = bench.sources(site, unit)
    relative_LD = sources.relative(shift_LD)
    kept_LD = top_neurons(relative_LD if rank_LD is None else rank_LD, layers, top) & (sources.scale_LD > 0)
    norm = np.linalg.norm(relative_LD[kept_LD])
    facts: dict[str, Any] = {"layers": list(layers), "top": top, "strength": strength}
    placed: dict[str, Any] = {"site": site, "positions": bench.tried.positions, "top": top, "strength": strength}
    blank = SteeringVector(toward, {}, **placed, unit=unit, method=method, setting=facts)
    return blank.with_dense(np.where(kept_LD, shift_LD, 0.0) * (strength / norm if norm > 0 else 0.0))


def top_neurons(rank_LD: np.ndarray, layers: Sequence[int], top: float) -> np.ndarray:
    """The share ``top`` of the neurons of some layers that rank highest; bool (L, D)."""
    kept_LD = np.zeros(rank_LD.shape, bool)
    kept_LD[list(layers)] = top_by_magnitude(rank_LD[list(layers)], top)
    return kept_LD


@once
def _direction(bench: Bench, direction: Direction, site: Site, unit: Unit, labels: Labels) -> np.ndarray:
    return direction(bench.sources(site, unit), labels)


@once
def rho(bench: Bench, site: Site, labels: Labels = ANSWERED) -> np.ndarray:
    """Correlation of each neuron with the label, float64 (L, D); NaN for a constant one."""
    return bench.sources(site).moments(labels).rho_LD


def settings(bench: Bench, grids: Mapping[Site, GridConfig]) -> Iterator[tuple[Site, tuple[int, ...], float, float]]:
    """Every combination of each grid: site, layers, share of the neurons and strength."""
    count = len(blocks_of(bench.asking.model))
    for site, grid in grids.items():
        yield from product((site,), grid.layer_sets(count), grid.tops, grid.strengths)


def spread_layers(bench: Bench, n: int) -> list[int]:
    """At most ``n`` layers, evenly spread, without the first and the last where there is a choice."""
    count = len(blocks_of(bench.asking.model))
    return sorted({min(round(i * count / (n + 1)), count - 1) for i in range(1, n + 1)})


def norm_of(vector: SteeringVector, sources: Sources) -> float:
    """How far a vector moves the fit pairs' states: the root mean square, in units of their norm, over all layers."""
    squares = 0.0
    for layer, edits in vector.edits.items():
        states_ND = torch.from_numpy(sources.states_P2LD[:, :, layer]).flatten(0, 1)
        moved_ND = torch.stack([one.added(states_ND).expand_as(states_ND) for one in edits]).sum(0)
        moved_N = moved_ND.norm(dim=-1).double().numpy() / sources.norm_L[layer]
        squares += float((moved_N**2).mean())
    return math.sqrt(squares)


def with_factor(one: SteeringVector, factor: float) -> SteeringVector:
    """The same with the factor on the mean difference that it is, for readers."""
    return replace(one, setting={**one.setting, "factor": factor})
