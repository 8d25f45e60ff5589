"""Contrastive activation addition: the mean difference of pairs at one layer, times a factor.

Panickssery et al. (2023), "Steering Llama 2 via contrastive activation addition", arXiv 2312.06681. It is added at
every token from the decision on.
"""

from __future__ import annotations

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.lists import Bench
from mnemoscope.arena.vectors import by_factors, spread_layers
from mnemoscope.steering import Toward

LAYERS = 8


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and factor; InputError with too few pairs."""
    layers = [(layer,) for layer in spread_layers(bench, LAYERS)]
    return by_factors(bench, "caa", toward, layers, (1.0,))
