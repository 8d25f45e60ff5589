"""Means whose intervals share their resamples: a page has thousands, and drawing anew for each would take minutes.

Shapes: N values, G groups, R resamples.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.intervals import rng_for
from mnemoscope.statistics import Estimate, proportion

RESAMPLES, LEVEL = 2000, 0.95
WIDTH = 1e-9  # an interval narrower than this would look certain and is not


def shared_mean(values_N: Any, groups_N: Any, stream: str, *, signed: bool = False) -> Estimate:
    """``intervals.mean``, with the resamples of every other mean of the same stream and number of groups.

    Args:
        values_N: 0/1 values, differences of such (then ``signed``), or margins; a NaN does not count.
        groups_N: the group of each.
        stream: names the resamples, as a rule the cell.
        signed: the values are differences, which could be negative.
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    known_N = ~np.isnan(values_N)
    values_N, groups_N = values_N[known_N], pd.Series(groups_N)[known_N]
    index_N, found_G = pd.factorize(groups_N)
    if len(found_G) < 2 or np.ptp(values_N) == 0:  # closed forms, or no interval at all: nothing is resampled
        return proportion(values_N, index_N, rng_for(stream), signed=signed)
    sums_G, counts_G = np.bincount(index_N, weights=values_N), np.bincount(index_N)
    weights_RG = _weights(stream, len(found_G))
    means_R = (weights_RG @ sums_G) / (weights_RG @ counts_G)
    low, high = np.quantile(means_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if np.ptp(means_R) < WIDTH:
        low = high = np.nan
    return Estimate(float(values_N.mean()), float(low), float(high), len(values_N))


@lru_cache(maxsize=16)
def _weights(stream: str, groups: int) -> np.ndarray:
    """How often each group is drawn in as many draws with replacement, shape (R, G), float64."""
    drawn_RG = rng_for(f"{stream}/{groups}").integers(groups, size=(RESAMPLES, groups))
    drawn_RG += groups * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn_RG.ravel(), minlength=RESAMPLES * groups).reshape(RESAMPLES, groups).astype(np.float64)
