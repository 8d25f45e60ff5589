"""How alike two sets of neurons or two directions are, beside chance; halves of groups; tests of paired differences.

Shapes: N examples, G groups, K tests, L layers, D neurons.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mnemoscope.statistics.intervals import LEAST_GROUPS, LEVEL, TIE, Estimate, Groups, group_index, same

EXACT = 14  # groups up to which every pattern of signs is tried


def cosine(first: ArrayLike, second: ArrayLike) -> float:
    """Cosine of two arrays; NaN where one is all 0 or holds a NaN, ValueError where the shapes differ."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    same("second: shape", a.shape, b.shape)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip((a * b).sum() / norms, -1, 1)) if norms > 0 else math.nan


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation over all entries that are NaN in neither array, ties at their mean rank.

    NaN where less than two are left or all of an array are equal; ValueError where the shapes differ.
    """
    a, b = np.asarray(first, dtype=np.float64).ravel(), np.asarray(second, dtype=np.float64).ravel()
    same("second: shape", np.shape(first), np.shape(second))
    known = ~np.isnan(a) & ~np.isnan(b)
    if known.sum() < 2:
        return math.nan
    ranks_2N = np.stack([stats.rankdata(a[known]), stats.rankdata(b[known])])
    ranks_2N -= ranks_2N.mean(axis=1, keepdims=True)
    return cosine(*ranks_2N)


def top_by_magnitude(values_LD: ArrayLike, top: float) -> NDArray[np.bool_]:
    """The ceil(top * L * D) entries of largest magnitude over all rows, bool (L, D); ValueError unless 0 < top <= 1.

    NaN counts as 0; of equal entries the one with the lower row, then index, is taken.
    """
    if not 0 < top <= 1:
        raise ValueError(f"top: {top}; allowed is a share of the neurons in (0, 1]")
    values = np.asarray(values_LD, dtype=np.float64)
    strength = np.nan_to_num(np.abs(values), nan=0.0).ravel()
    # 0.07 * 100 is 7.000000000000001 in floating point, and must not be rounded up to 8.
    count = max(1, math.ceil(top * strength.size * (1 - 1e-12)))
    chosen = np.zeros(strength.size, dtype=np.bool_)
    chosen[np.argsort(-strength, kind="stable")[:count]] = True
    return chosen.reshape(values.shape)


def overlap(first: ArrayLike, second: ArrayLike) -> float:
    """Share of a set's members (True) that another contains; NaN for empty sets, ValueError for sets of two sizes."""
    a, b = _two_sets(first, second)
    return float((a & b).sum() / a.sum()) if a.any() else math.nan


def overlap_by_chance(first_LD: ArrayLike, second_LD: ArrayLike) -> Estimate:
    """Mean and central interval of `overlap` where every row is permuted in itself; ``n`` is the number of members.

    Exact, without drawing permutations: what a row shares is hypergeometric, and rows are independent. One row of all
    entries, `first_LD.reshape(1, -1)`, gives the weaker null that ignores rows; its mean is the share of members. NaN
    ends where only one overlap is possible. ValueError as `overlap`, or where the arrays do not have two axes.
    """
    a, b = _two_sets(first_LD, second_LD)
    if a.ndim != 2:
        raise ValueError(f"first_LD: {a.ndim} axes; allowed is 2")
    members = int(a.sum())
    if not members:
        return Estimate.undefined()
    chances = np.ones(1)
    for size_a, size_b in zip(a.sum(axis=1), b.sum(axis=1), strict=True):
        shared = np.arange(min(size_a, size_b) + 1)
        chances = np.convolve(chances, stats.hypergeom.pmf(shared, a.shape[1], size_a, size_b))
    mean = float((a.sum(axis=1) / a.shape[1]) @ b.sum(axis=1)) / members
    below = np.cumsum(chances) / chances.sum()
    # Against rounding: a tail of exactly (1 - LEVEL) / 2 belongs to the interval's end.
    low, high = (int(np.searchsorted(below, tail - TIE)) for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(mean, *((low / members, high / members) if low < high else (math.nan, math.nan)), members)


def in_group_order(groups_N: Groups, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of all examples in random order, group by group: the first n are n examples collected by group."""
    index_N = group_index(groups_N, np.size(groups_N))
    place_G = rng.permutation(len(np.unique(index_N)))
    return np.lexsort((rng.random(len(index_N)), place_G[index_N]))


def half_of_groups(groups_N: Groups, rng: np.random.Generator) -> NDArray[np.bool_]:
    """True for the examples of a random half of the groups, of an odd number the smaller half."""
    index_N = group_index(groups_N, np.size(groups_N))
    groups = len(np.unique(index_N))
    return np.isin(index_N, rng.permutation(groups)[: groups // 2])


def _two_sets(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a, b = np.asarray(first, dtype=np.bool_), np.asarray(second, dtype=np.bool_)
    same("second: shape", a.shape, b.shape)
    same("second: members", int(a.sum()), int(b.sum()))
    return a, b


def sign_flips(values_N: ArrayLike, groups_N: Groups, rng: np.random.Generator, flips: int = 9999) -> float:
    """Two-sided p-value of "the differences of a group are as likely to have the other sign", by their mean.

    All differences of a group flip together (Canay, Romano & Shaikh 2017, "Randomization tests under an approximate
    symmetry assumption", Econometrica 85:1013-1030). Exact for up to ``EXACT`` groups, else from random flips, of which
    the observed one counts as one more, so that p is never 0. A NaN does not count. NaN with less than ``LEAST_GROUPS``
    groups; 1 where no group differs; ValueError where lengths differ.
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
