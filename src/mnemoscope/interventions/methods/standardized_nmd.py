"""NMD in units of each neuron's standard deviation."""

from __future__ import annotations

import numpy as np

from mnemoscope.interventions.shifts import OneDirection
from mnemoscope.interventions.sources import Labels, Sources

ABOUT = "mean difference in units of each neuron's spread, one layer"


def standardized_nmd(sources: Sources, labels: Labels) -> np.ndarray:
    """2 rho, up to scale: huge neurons do not dominate."""
    return np.nan_to_num(sources.moments(labels).rho_LD)


METHOD = OneDirection("standardized-nmd", standardized_nmd, by_rho=True)
candidates, again = METHOD.candidates, METHOD.again
