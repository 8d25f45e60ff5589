"""Neuron-wise mean difference on the neurons that correlate most with the behaviour, over all layers.

``alpha * NMD`` on the top share of neurons by |rho|, as in arXiv 2412.18497.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.shifts import by_factors
from mnemoscope.models import blocks_of

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "mean difference on the neurons that correlate most, all layers (arXiv 2412.18497)"
TOPS = (0.005, 0.02, 0.1, 0.3)


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every share and factor; InputError with too few pairs."""
    everywhere = [tuple(range(len(blocks_of(bench.asking.model))))]
    return by_factors(bench, "nmd", toward, everywhere, TOPS)
