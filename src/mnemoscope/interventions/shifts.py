"""Steering vectors of methods, as an arena tries them: settings, norms, and a control of equal norm.

Shapes: N states, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.directions import Directions
from mnemoscope.interventions.sources import TOWARD, Setting, Sources
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import Site, blocks_of

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

Made = TypeVar("Made")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # on a mean difference
DIRECTION = {toward: direction for direction, toward in TOWARD.items()}


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


def of_settings(
    bench: Bench, method: str, settings: Sequence[Setting], directions: Directions | None = None
) -> list[Intervention]:
    """The vector of each setting, under the method's name in the arena.

    ``directions``: default: with strengths in units of each neuron's spread.
    """
    made = directions or Directions(bench.sources(settings[0].site, "spread"))
    found = list[Intervention]()
    for one in settings:
        facts: dict[str, object] = {"layers": list(one.layers), "top": one.top, "strength": one.strength}
        if one.method == "nmd":
            facts["factor"] = round(made.alpha(one), 6)
        found.append(replace(made.vector(one), method=method, setting=facts))
    return found


def by_factors(
    bench: Bench, method: str, toward: Toward, layers: Sequence[tuple[int, ...]], tops: Sequence[float]
) -> list[Intervention]:
    """The mean difference times each of ``FACTORS``, on some shares of the neurons of layers."""
    made = Directions(bench.sources("block"))
    found = []
    for whole in settings("nmd", toward, layers, tops, (1.0,)):
        alpha = made.alpha(whole)  # of strength 1
        found += [replace(whole, strength=factor / alpha) for factor in FACTORS if alpha > 0]
    return of_settings(bench, method, found, made)


def settings(
    method: str,
    toward: Toward,
    layers: Sequence[tuple[int, ...]],
    tops: Sequence[float],
    strengths: Sequence[float],
    site: Site = "block",
) -> list[Setting]:
    """Every combination."""
    grid = ((chosen, top, strength) for chosen in layers for top in tops for strength in strengths)
    return [Setting(DIRECTION[toward], method, site, *one) for one in grid]


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
    return float(np.sqrt(squares))
