"""Estimates with their intervals: shares, areas under the ROC curve, means over seeds.

Shapes: N examples, P of them positive, G groups, R resamples.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Groups = Sequence[Any] | NDArray[Any]  # names of groups: strings or integers
Statistic = Callable[[Floats], Floats]  # of group weights (R, G), one value per resample (R)

LEVEL, RESAMPLES = 0.95, 2000  # coverage of every interval, and resamples of every bootstrap
TIE = 1e-9  # statistics that differ by less are equal up to rounding
BLOCK_NUMBERS = 2_000_000  # of resample weights in one block (16 MB)


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate from ``n`` examples, pairs or states with its interval; NaN where it is undefined."""

    estimate: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        """Whether the value is defined."""
        return not math.isnan(self.estimate)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies wholly above or below 0, else 0 (also where there is none)."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @classmethod
    def undefined(cls, n: int = 0) -> Estimate:
        """An estimate that does not exist."""
        return cls(math.nan, math.nan, math.nan, n)


def named_rng(name: str) -> np.random.Generator:
    """Random stream that depends on a name alone, so that equal records give equal intervals."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def group_index(groups_N: Groups, n: int) -> NDArray[np.intp]:
    """Number of the group of each example, in sorted order of the names."""
    same("groups_N: length", n, len(groups_N))
    return np.unique(np.asarray(groups_N), return_inverse=True)[1]


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover 0 to ``total``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def same(name: str, allowed: object, value: object) -> None:
    """Raise ValueError with the name unless the value is the allowed one."""
    if value != allowed:
        raise ValueError(f"{name}: {value}; allowed is {allowed}")


def proportion(
    hits_N: ArrayLike, groups_N: Groups, rng: np.random.Generator | str, *, signed: bool = False
) -> Estimate:
    """Mean of hits with a percentile bootstrap interval over whole groups, whose examples are not independent.

    Method: Field & Welsh (2007), "Bootstrapping clustered data", JRSS B 69:369-390. Where every group has the same mean
    the bootstrap interval has width 0 and looks certain. If all hits are 0 or all are 1, the exact interval of Clopper
    & Pearson (1934, Biometrika 26:404-413) replaces it, with the number of *groups* as N; all -1 mirrors it. Otherwise
    the ends are NaN.

    Args:
        hits_N: bool or float, paired differences in {-1, 0, 1} too; a NaN does not count.
        rng: draws the resamples. Under a name, all means of as many groups share them: a report has thousands.
        signed: hits are differences; where all are 0, the interval reaches to both sides.

    Returns:
        `n` is the number of hits that count. No hits: undefined. A single group: the mean, with NaN for the ends.

    Raises:
        ValueError: `hits_N` and `groups_N` differ in length.
    """
    values_N, index_N = np.asarray(hits_N, dtype=np.float64), group_index(groups_N, np.size(hits_N))
    values_N, index_N = values_N[~np.isnan(values_N)], index_N[~np.isnan(values_N)]
    if not len(values_N):
        return Estimate.undefined()
    mean, n = float(values_N.mean()), len(values_N)
    _, index_N, counts_G = np.unique(index_N, return_inverse=True, return_counts=True)
    if len(counts_G) == 1:
        return Estimate(mean, math.nan, math.nan, n)
    if np.ptp(values_N) == 0 and mean in (-1, 0, 1):
        low, high = _clopper_pearson(abs(int(mean)), len(counts_G))
        if mean == -1:
            low, high = -high, -low
        return Estimate(mean, -high if signed and mean == 0 else low, high, n)
    sums_G = np.bincount(index_N, weights=values_N)

    def mean_of(weights_RG: Floats) -> Floats:
        return np.asarray((weights_RG @ sums_G) / (weights_RG @ counts_G))

    return Estimate(mean, *_bootstrap(mean_of, (n, len(counts_G)), rng), n)


def auroc(scores_N: ArrayLike, labels_N: ArrayLike, groups_N: Groups, rng: np.random.Generator | str) -> Estimate:
    """Area under the ROC curve, ties counted half (Mann-Whitney), with a percentile bootstrap by group.

    Resamples without both classes are dropped. Where the scores separate the classes perfectly (area 1 or 0), so does
    every resample. With P groups holding positives, Q negatives and G in all, k = min(P, Q, G // 2) positives and
    negatives can be matched with no group used twice: k equal independent comparisons, with the exact Clopper-Pearson
    interval. Undefined without both classes; a single group gives NaN ends. ``rng``: as in `proportion`.

    Raises:
        ValueError: lengths differ, or, with two classes, a score is NaN or a label is neither 0 nor 1.
    """
    ranked_N, truth_N = np.asarray(scores_N, dtype=np.float64), np.asarray(labels_N, dtype=np.float64)
    n, index_N = len(ranked_N), group_index(groups_N, len(ranked_N))
    same("labels_N: length", n, len(truth_N))
    if len(np.unique(truth_N)) < 2:
        return Estimate.undefined(n)
    if np.isnan(ranked_N).any() or not np.isin(truth_N, (0, 1)).all():
        raise ValueError("scores_N, labels_N: NaN or another label; allowed are scores with a rank and labels 0 and 1")
    area_of = _area(ranked_N, truth_N == 1, index_N)
    groups = int(index_N.max()) + 1
    area = float(area_of(np.ones((1, groups)))[0])
    if groups == 1:
        return Estimate(area, math.nan, math.nan, n)
    if area in (0, 1):
        positive, negative = (len(np.unique(index_N[truth_N == label])) for label in (1, 0))
        return Estimate(area, *_clopper_pearson(int(area), min(positive, negative, groups // 2)), n)
    return Estimate(area, *_bootstrap(area_of, (n, groups), rng), n)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over seeds with Student's t interval, not clipped; `n` is the sum over the seeds.

    NaN seeds are dropped; a single one is returned unchanged. If all agree exactly t would give width 0, and the
    interval spans the seeds' own intervals instead.
    """
    kept = [estimate for estimate in estimates if estimate.known]
    if len(kept) < 2:
        return kept[0] if kept else Estimate.undefined()
    values_S = np.array([estimate.estimate for estimate in kept])
    mean, n = float(values_S.mean()), sum(estimate.n for estimate in kept)
    if np.ptp(values_S) == 0:
        low = float(np.fmin.reduce([estimate.low for estimate in kept]))  # fmin and fmax pass over NaN
        return Estimate(mean, low, float(np.fmax.reduce([estimate.high for estimate in kept])), n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(kept) - 1) * values_S.std(ddof=1) / math.sqrt(len(kept)))
    return Estimate(mean, mean - half, mean + half, n)


def mean_with_range(values: ArrayLike) -> Estimate:
    """Mean of draws that are not NaN, with their range as ends, which is no confidence interval as draws share data.

    NaN ends where the draws do not differ; `n` is the number of draws.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return Estimate.undefined()
    low, high = (float(known.min()), float(known.max())) if np.ptp(known) > 0 else (math.nan, math.nan)
    return Estimate(float(known.mean()), low, high, len(known))


def _area(scores_N: Floats, positive_N: NDArray[np.bool_], index_N: NDArray[np.intp]) -> Statistic:
    """Areas (R) as a function of group weights, NaN where a class has no weight."""
    groups, scores_P = int(index_N.max()) + 1, scores_N[positive_N]
    sizes_2G = [np.bincount(index_N[side_N], minlength=groups).astype(float) for side_N in (positive_N, ~positive_N)]
    wins_GG = np.empty((groups, groups))  # how often a positive of group g is above a negative of group h, ties half
    for group in range(groups):
        others = np.sort(scores_N[~positive_N & (index_N == group)])
        below_P = (np.searchsorted(others, scores_P, "left") + np.searchsorted(others, scores_P, "right")) / 2
        wins_GG[:, group] = np.bincount(index_N[positive_N], weights=below_P, minlength=groups)

    def areas(weights_RG: Floats) -> Floats:
        comparisons_R = (weights_RG @ sizes_2G[0]) * (weights_RG @ sizes_2G[1])
        wins_R, undefined_R = ((weights_RG @ wins_GG) * weights_RG).sum(axis=1), np.full(len(weights_RG), math.nan)
        return np.divide(wins_R, comparisons_R, out=undefined_R, where=comparisons_R > 0)

    return areas


def _bootstrap(statistic: Statistic, size: tuple[int, int], rng: np.random.Generator | str) -> tuple[float, float]:
    """Percentile interval over (N, G) without NaN resamples; NaN ends where none is left or all are equal."""
    values_R = np.concatenate([statistic(weights_RG) for weights_RG in _weights(rng, size)])
    values_R = values_R[~np.isnan(values_R)]
    if not len(values_R) or np.ptp(values_R) < TIE:
        return math.nan, math.nan
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _weights(rng: np.random.Generator | str, size: tuple[int, int]) -> Iterator[Floats]:
    """Group weights of all resamples, in blocks of bounded memory; in one block where they are shared."""
    if isinstance(rng, str):
        yield _shared_weights(rng, size[1])
        return
    for block in blocks(RESAMPLES, max(1, BLOCK_NUMBERS // max(size))):
        yield _drawn(rng, block.stop - block.start, size[1])


@lru_cache(maxsize=16)
def _shared_weights(name: str, groups: int) -> Floats:
    return _drawn(named_rng(f"{name}/{groups}"), RESAMPLES, groups)


def _drawn(rng: np.random.Generator, rows: int, groups: int) -> Floats:
    """How often each group is drawn in as many draws with replacement, shape (rows, G), float64."""
    drawn_RG = rng.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
    return np.bincount(drawn_RG.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float64)


def _clopper_pearson(value: int, n: int) -> tuple[float, float]:
    """Exact interval of a proportion of which none (value 0) or all (value 1) of n trials were hits."""
    tail = ((1 - LEVEL) / 2) ** (1 / n)  # the beta quantiles are closed forms at the ends
    return (tail, 1.0) if value else (0.0, 1 - tail)
