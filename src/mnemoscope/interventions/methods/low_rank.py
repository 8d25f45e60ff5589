"""Low-rank shifts of every token at several blocks, to memory taught by the model's own answers (``low_rank``).

They change how the text is read, so no cached prefix serves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.directions import Directions
from mnemoscope.interventions.shifts import DIRECTION, spread_layers
from mnemoscope.interventions.sources import LOW_RANK, Setting

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "low-rank shifts of every token at several blocks, taught by the model's own answers"
BLOCKS = 5
FACTORS = (0.5, 0.75, 1.0)  # on what was learned


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every factor of one learned shift; InputError with too few pairs."""
    directions, layers = Directions(bench.sources("block")), tuple(spread_layers(bench, BLOCKS))
    settings = [Setting(DIRECTION[toward], LOW_RANK, "block", layers, 1.0, factor, "all") for factor in FACTORS]
    return [
        replace(directions.vector(one), setting={"layers": list(layers), "factor": one.strength}) for one in settings
    ]
