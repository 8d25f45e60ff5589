"""Neuron-wise mean difference on the neurons that correlate most with the behaviour.

``alpha * NMD`` on the top share of neurons by |rho|, as in arXiv 2412.18497.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.shifts import OneDirection, with_factor
from mnemoscope.interventions.sources import Labels, Sources
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import blocks_of

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "mean difference on the neurons that correlate most, all layers (arXiv 2412.18497)"
TOPS = (0.005, 0.02, 0.1, 0.3)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def nmd(sources: Sources, labels: Labels) -> np.ndarray:
    """The neuron-wise mean difference."""
    return sources.moments(labels).nmd_LD


METHOD = OneDirection("nmd", nmd, by_rho=True)


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every share and factor over all layers, or what the bench tries; InputError with too few pairs."""
    found = list[Intervention]()
    if bench.tried.grids:
        for one in METHOD.candidates(bench, toward):
            assert isinstance(one, SteeringVector)
            found.append(with_factor(one, round(alpha(bench, one), 6)))
        return found
    everywhere = tuple(range(len(blocks_of(bench.asking.model))))
    for top, factor in product(TOPS, FACTORS):
        one = METHOD.vector(bench, toward, "norm", "block", everywhere, top, 1.0)
        of_one = alpha(bench, one)
        if of_one > 0:
            one = METHOD.vector(bench, toward, "norm", "block", everywhere, top, factor / of_one)
            found.append(with_factor(one, round(alpha(bench, one), 6)))
    return found


def again(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """The same setting under other labels."""
    return METHOD.again(bench, one, several)


def alpha(bench: Bench, one: SteeringVector) -> float:
    """The paper's alpha: norm of a vector over that of the mean difference of its neurons; NaN where it has none."""
    sources = bench.sources(one.site)
    shift_LD = one.dense(*sources.shape_LD)
    norm = np.linalg.norm(sources.moments().nmd_LD[shift_LD != 0])
    return float(np.linalg.norm(shift_LD) / norm) if norm else math.nan
