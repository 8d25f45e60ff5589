"""The steepest ascent of the decision margin at one layer (``directions.gradient``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.shifts import of_settings, settings, spread_layers

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "steepest ascent of the decision margin, one layer"
LAYERS = 8
TOPS = (0.5,)
STRENGTHS = (0.1, 0.2, 0.4, 0.8)  # of the shift, in units of each neuron's spread


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer, share and strength; InputError with too few pairs."""
    layers = [(layer,) for layer in spread_layers(bench, LAYERS)]
    return of_settings(bench, "gradient", settings("gradient", toward, layers, TOPS, STRENGTHS))
