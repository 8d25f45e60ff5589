"""Ours: low-rank shifts of every token at several blocks, to memory taught by the model's own answers.

See ``directions.low_rank``. They change how the text is read, so no cached prefix serves.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mnemoscope.arena.contract import Applied, Intervention
from mnemoscope.arena.lists import Bench
from mnemoscope.arena.vectors import DIRECTION, seed_of, spread_layers
from mnemoscope.directions import LOW_RANK, Directions, Setting, control_draws
from mnemoscope.steering import SteeringVector, Toward

BLOCKS = 5
FACTORS = (0.5, 0.75, 1.0)  # on what was learned


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every factor of one learned shift; InputError with too few pairs."""
    directions, layers = Directions(bench.sources("block")), tuple(spread_layers(bench, BLOCKS))
    settings = [Setting(DIRECTION[toward], LOW_RANK, "block", layers, 1.0, factor, "all") for factor in FACTORS]
    return [_intervention(bench, directions, setting) for setting in settings]


def _intervention(bench: Bench, directions: Directions, setting: Setting) -> Intervention:
    """A setting, with shifts that write in Gaussian directions as controls."""
    seed = (*seed_of(bench.config.seed, LOW_RANK, setting.toward), 35)

    def applied(vector: SteeringVector) -> Applied:
        return lambda start: vector.apply(bench.asking.model)

    def drawn(number: int) -> Applied:
        return applied(dict(control_draws("gaussian", directions, setting, number + 1, seed))[number])

    vector, sources, squares = directions.vector(setting), directions.sources, 0.0
    for layer, edit in vector.low_rank.items():
        states_ND = torch.from_numpy(sources.states_P2LD[:, :, layer]).flatten(0, 1)
        moved_N = edit.added(states_ND).norm(dim=-1).double().numpy() / sources.norm_L[layer]
        squares += float((moved_N**2).mean())
    facts: dict[str, object] = {"layers": list(setting.layers), "factor": setting.strength}
    one = Intervention(LOW_RANK, setting.toward, facts, norm=float(np.sqrt(squares)), drawn=drawn)
    return replace(one, applied=applied(vector), everywhere=True)
