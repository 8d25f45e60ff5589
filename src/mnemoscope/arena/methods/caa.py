"""Contrastive activation addition: the mean difference of pairs at one layer, times a factor.

Panickssery et al. (2023), "Steering Llama 2 via contrastive activation addition", arXiv 2312.06681. It is added at
every token from the decision on.
"""

from __future__ import annotations

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.lists import Bench
from mnemoscope.arena.vectors import of_settings, settings, spread_layers
from mnemoscope.steering import Toward

LAYERS = 8
STRENGTHS = (0.1, 0.2, 0.4, 0.8)  # norm of the shift over that of the states


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and strength; InputError with too few pairs."""
    layers = [(layer,) for layer in spread_layers(bench, LAYERS)]
    return of_settings(bench, "caa", settings("nmd", toward, layers, (1.0,), STRENGTHS))
