"""A shift at one layer, optimized for the wanted answer under a budget of norm (``ascent``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.shifts import of_settings, settings, spread_layers

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "a shift that is optimized, one layer"
LAYERS = 3
STRENGTHS = (0.25, 0.6, 1.2)  # of the shift, in units of each neuron's spread


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and strength, each learned apart; InputError with too few pairs."""
    layers = [(layer,) for layer in spread_layers(bench, LAYERS)]
    return of_settings(bench, "learned", settings("learned", toward, layers, (1.0,), STRENGTHS))
