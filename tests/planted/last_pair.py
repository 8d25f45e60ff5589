"""A shift-like method: the difference of the last pair alone."""

from __future__ import annotations

import numpy as np

from mnemoscope.interventions.shifts import OneDirection
from mnemoscope.interventions.sources import Labels, Sources

ABOUT = "the difference of one pair"


def last_pair(sources: Sources, labels: Labels) -> np.ndarray:
    return sources.differences_PLD(labels)[-1]


METHOD = OneDirection("last-pair", last_pair)
candidates, again = METHOD.candidates, METHOD.again
