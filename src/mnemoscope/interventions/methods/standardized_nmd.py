"""NMD in units of each neuron's standard deviation."""

from __future__ import annotations

import numpy as np

from mnemoscope.interventions.sources import Labels, Sources

BY_RHO = True


def direction(sources: Sources, labels: Labels) -> np.ndarray:
    """2 rho, up to scale: huge neurons do not dominate."""
    return np.nan_to_num(sources.moments(labels).rho_LD)
