"""Linear discriminant of the pair differences."""

from __future__ import annotations

import numpy as np
from sklearn.covariance import ledoit_wolf

from mnemoscope.interventions.sources import Labels, Sources


def direction(sources: Sources, labels: Labels) -> np.ndarray:
    """The inverse of their shrunk covariance times NMD, layer by layer.

    Shrinkage: Ledoit and Wolf (2004), "A well-conditioned estimator".
    """
    rows, differences_PLD = [], sources.differences_PLD(labels)
    for layer, nmd_D in enumerate(sources.moments(labels).nmd_LD):
        covariance_DD, _ = ledoit_wolf(differences_PLD[:, layer])
        rows.append(np.linalg.lstsq(covariance_DD, nmd_D, rcond=1e-10)[0])
    return sources.evenly(np.stack(rows))
