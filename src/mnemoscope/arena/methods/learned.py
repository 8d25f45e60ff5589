"""Ours: a shift at one layer, optimized for the wanted answer under a budget of norm (``directions.learned``)."""

from __future__ import annotations

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.lists import Bench
from mnemoscope.arena.vectors import of_settings, settings, spread_layers
from mnemoscope.steering import Toward

LAYERS = 3
STRENGTHS = (0.25, 0.6, 1.2)  # of the shift, in units of each neuron's spread


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and strength, each learned apart; InputError with too few pairs."""
    layers = [(layer,) for layer in spread_layers(bench, LAYERS)]
    return of_settings(bench, "learned", settings("learned", toward, layers, (1.0,), STRENGTHS))
