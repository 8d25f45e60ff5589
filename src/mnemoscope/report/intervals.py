"""How a number in the report gets its interval: a bootstrap clustered by group, seeded by the number's own name."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from mnemoscope.statistics import Estimate, proportion

Tree = dict[str, Any]


def rng_for(name: str) -> np.random.Generator:
    """The random stream of one number: it depends on the number's name alone, so equal records give equal bytes."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def mean(values_N: Any, groups_N: Any, name: str, *, signed: bool = False) -> Estimate:
    """The mean of the values that are not NaN, with a bootstrap interval clustered by group.

    Args:
        values_N: 0/1 values, differences of such (then ``signed``), or margins.
        groups_N: the group of each.
        name: the number's name, which seeds its bootstrap.
        signed: the values are differences, which could be negative.
    """
    values = np.asarray(values_N, dtype=np.float64)
    return proportion(values, np.asarray(groups_N, dtype=str), rng_for(name), signed=signed)


def spread(values: Any) -> Estimate:
    """The mean of repeated draws, with their smallest and largest as ends; NaN ends for a single draw.

    The ends say how much a number depends on the draw. They are no confidence interval: draws share their data.
    ``n`` is the number of draws; a NaN does not count.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return Estimate.undefined()
    low, high = (float(known.min()), float(known.max())) if np.ptp(known) > 0 else (np.nan, np.nan)
    return Estimate(float(known.mean()), low, high, len(known))
