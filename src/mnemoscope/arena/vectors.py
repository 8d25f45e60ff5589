"""Interventions that change states from the decision position on: by a vector of ``directions``, or by an edit.

Shapes: N states, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mnemoscope.arena.contract import Applied, Intervention
from mnemoscope.arena.fitting import randomized
from mnemoscope.arena.lists import Bench
from mnemoscope.directions import TOWARD, Directions, Setting, gaussian
from mnemoscope.models import Site, blocks_of
from mnemoscope.steering import Edit, SteeringVector, Toward, edited

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # on a mean difference
DIRECTION = {toward: direction for direction, toward in TOWARD.items()}


def seed_of(seed: int, method: str, toward: Toward) -> tuple[int, ...]:
    """The beginning of the seed of a method's controls: each method has its own draws in each direction."""
    return seed, *f"{method}|{toward}".encode()


def by_vector(
    model: PreTrainedModel, method: str, vector: SteeringVector, norm: float, setting: dict[str, object], seed: int
) -> Intervention:
    """The intervention that applies a vector, with Gaussian shifts of the same norm in every layer as controls.

    ``seed``: of the arena.
    """

    def applied(vector: SteeringVector) -> Applied:
        return lambda start: vector.apply(model, start=start)

    def drawn(number: int) -> Applied:
        width = max((len(shift) for shift in vector.shifts.values()), default=1)
        shift_LD = vector.dense(len(blocks_of(model)), width).astype(np.float64)
        rng = np.random.default_rng([*seed_of(seed, method, vector.toward), 35, number])
        return applied(vector.with_dense(gaussian(shift_LD, rng)))

    return Intervention(method, vector.toward, setting, applied=applied(vector), norm=norm, drawn=drawn)


def by_edit(
    bench: Bench, method: str, toward: Toward, setting: dict[str, object], layer: int, edit: Edit
) -> Intervention:
    """The intervention that edits a block's output, with controls that move each state as far, somewhere else.

    Its norm is the root mean square over the fit pairs' states, in units of the layer's norm.
    """
    sources = bench.sources("block")
    states_ND = torch.from_numpy(sources.states_P2LD[:, :, layer]).float().flatten(0, 1)
    moved_N = (edit(states_ND[:, None]) - states_ND[:, None]).norm(dim=-1).double() / sources.norm_L[layer]

    def drawn(number: int) -> Applied:
        seed = (*seed_of(bench.config.seed, method, toward), 36, layer, number)
        return at_block(bench.asking.model, layer, randomized(edit, seed))

    applied, norm = at_block(bench.asking.model, layer, edit), float(moved_N.square().mean().sqrt())
    return Intervention(method, toward, setting, applied=applied, norm=norm, drawn=drawn)


def at_block(model: PreTrainedModel, layer: int, edit: Edit) -> Applied:
    """The context in which a block's output is edited from the decision position on."""
    return lambda start: edited(model, {layer: edit}, "block", start=start)


def of_settings(
    bench: Bench, method: str, settings: Sequence[Setting], directions: Directions | None = None
) -> list[Intervention]:
    """An intervention of each setting, under the method's name in the arena.

    ``directions``: default: with strengths in units of each neuron's spread.
    """
    made = directions or Directions(bench.sources(settings[0].site, "spread"))
    found = list[Intervention]()
    for setting in settings:
        facts: dict[str, object] = {"layers": list(setting.layers), "top": setting.top, "strength": setting.strength}
        if setting.method == "nmd":
            facts["factor"] = round(made.alpha(setting), 6)
        vector = made.vector(setting)
        norm_L = np.linalg.norm(vector.dense(*made.sources.shape_LD), axis=1) / made.sources.norm_L
        norm, seed = float(np.linalg.norm(norm_L)), bench.config.seed
        found.append(by_vector(bench.asking.model, method, vector, norm, facts, seed))
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
