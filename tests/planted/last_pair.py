"""A shift-like method: the difference of the last pair alone."""

from __future__ import annotations

import numpy as np

from mnemoscope.interventions.sources import Labels, Sources


def direction(sources: Sources, labels: Labels) -> np.ndarray:
    return sources.differences_PLD(labels)[-1]
