"""Tests of paired differences by group, and their correction for multiplicity.

Shapes: N examples, G groups, K tests.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mnemoscope.statistics.intervals import LEAST_GROUPS, TIE, Groups, group_index

EXACT = 14  # groups up to which every pattern of signs is tried


def sign_flips(values_N: ArrayLike, groups_N: Groups, rng: np.random.Generator, flips: int = 9999) -> float:
    """Two-sided p-value of "the differences of a group are as likely to have the other sign", by their mean.

    All differences of a group flip together (Canay, Romano & Shaikh 2017, "Randomization tests under an approximate
    symmetry assumption", Econometrica 85:1013-1030). Exact for up to ``EXACT`` groups, else from random flips, of which
    the observed one counts as one more, so that p is never 0. A NaN does not count.

    Returns:
        NaN with less than ``LEAST_GROUPS`` groups; 1 where no group differs.

    Raises:
        ValueError: lengths differ.
    """
    given_N = np.asarray(values_N, dtype=np.float64)
    index_N, known_N = group_index(groups_N, len(given_N)), ~np.isnan(given_N)
    counts_G = np.bincount(index_N[known_N], minlength=int(index_N.max(initial=-1)) + 1)
    if (counts_G > 0).sum() < LEAST_GROUPS:
        return math.nan
    sums_G = np.bincount(index_N[known_N], weights=given_N[known_N], minlength=len(counts_G))
    sums_G = sums_G[np.abs(sums_G) > TIE]
    if not len(sums_G):
        return 1.0
    observed = abs(sums_G.sum()) - TIE
    if len(sums_G) <= EXACT:
        patterns = (np.arange(2 ** len(sums_G))[:, None] >> np.arange(len(sums_G))) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ sums_G) >= observed))
    signs = rng.choice((-1.0, 1.0), size=(flips, len(sums_G)))
    return float((1 + (np.abs(signs @ sums_G) >= observed).sum()) / (1 + flips))


def holm(p_K: ArrayLike) -> NDArray[np.float64]:
    """P-values adjusted for multiplicity, family-wise (Holm 1979, Scandinavian Journal of Statistics 6:65-70).

    NaN stays NaN and counts for nothing.
    """
    found_K = np.asarray(p_K, dtype=np.float64).copy()
    known = np.flatnonzero(~np.isnan(found_K))
    order = known[np.argsort(found_K[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    found_K[order] = np.minimum(1.0, np.maximum.accumulate(factors * found_K[order]))
    return found_K
