"""Neuron-wise mean difference on the neurons that correlate most with the behaviour.

``alpha * NMD`` on the top share of neurons by |rho|, as in arXiv 2412.18497.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np

from mnemoscope.interventions import shifts
from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.shifts import Setting
from mnemoscope.interventions.sources import Labels, Sources
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import blocks_of

BY_RHO = True
TOPS = (0.005, 0.02, 0.1, 0.3)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def direction(sources: Sources, labels: Labels) -> np.ndarray:
    """The neuron-wise mean difference."""
    return sources.moments(labels).nmd_LD


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every share and factor over all layers, or what the bench tries; InputError with too few pairs."""
    found = shifts.candidates(bench, "nmd", toward) if bench.tried.grids else list[Intervention]()
    everywhere = tuple(range(len(blocks_of(bench.asking.model))))
    for top, factor in product(TOPS, FACTORS) if not found else ():
        setting = Setting("norm", "block", everywhere, top, 1.0)
        of_one = alpha(bench, shifts.vector(bench, "nmd", toward, setting))
        if of_one > 0:
            found.append(shifts.vector(bench, "nmd", toward, setting._replace(strength=factor / of_one)))
    return [replace(one, setting={**one.setting, "factor": round(alpha(bench, one), 6)}) for one in found]


def alpha(bench: Bench, one: Intervention) -> float:
    """The paper's alpha: norm of a vector over that of the mean difference of its neurons; NaN where it has none."""
    assert isinstance(one, SteeringVector)
    sources = bench.sources(one.site)
    shift_LD = one.dense(*sources.shape_LD)
    norm = np.linalg.norm(sources.moments().nmd_LD[shift_LD != 0])
    return float(np.linalg.norm(shift_LD) / norm) if norm else math.nan
