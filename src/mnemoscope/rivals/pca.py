"""First principal component of the pair differences.

Zou et al. (2023), "Representation engineering", arXiv 2310.01405.
"""

from __future__ import annotations

import numpy as np

from mnemoscope.interventions.sources import Labels, Sources


def direction(sources: Sources, labels: Labels) -> np.ndarray:
    """The component about zero, oriented so that most differences point along it; labels decide this alone."""
    rows = []
    for differences_PD in sources.differences_PLD(labels).swapaxes(0, 1):
        component_D = np.linalg.svd(differences_PD, full_matrices=False)[2][0]
        along = (differences_PD @ component_D > 0).mean() - 0.5
        rows.append(component_D if along >= 0 else -component_D)
    return sources.evenly(np.stack(rows))
