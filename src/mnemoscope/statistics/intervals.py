"""Estimates with their intervals: shares, means, areas under the ROC curve, means over seeds.

Examples of one group are not independent, so variances are those of group sums, and quantiles are Student's t with one
degree of freedom less than there are groups. ``benchmarks/coverage.py`` simulates what the intervals cover.

Shapes: N examples, G groups, P positives, Q negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Groups = ArrayLike  # names of groups: strings or integers
Ends = tuple[float, float]

LEVEL = 0.95  # coverage of every interval
NORMAL = 1.959964  # quantile of the normal distribution for this level
LEAST_GROUPS = 6  # with fewer there is no interval: none of the methods tried covers what it says
NO_ENDS = (math.nan, math.nan)
TIE = 1e-9  # statistics that differ by less are equal up to rounding


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate from ``n`` examples of ``groups`` groups with its interval; NaN where it is undefined.

    ``groups`` is 0 where the interval does not come from groups.
    """

    estimate: float
    low: float
    high: float
    n: int
    groups: int = 0

    @property
    def known(self) -> bool:
        """Whether the value is defined."""
        return not math.isnan(self.estimate)

    @property
    def too_few(self) -> bool:
        """Whether there is no interval because there are too few groups."""
        return self.known and math.isnan(self.low) and 0 < self.groups < LEAST_GROUPS

    @property
    def error(self) -> float:
        """About one standard error, of the width of the interval; infinite where there is none."""
        width = self.high - self.low
        return math.inf if math.isnan(width) else width / (2 * NORMAL)

    @property
    def at_least(self) -> float:
        """The lower end of the interval; the estimate itself where there is none."""
        return self.low if math.isfinite(self.low) else self.estimate

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies wholly above or below 0, else 0 (also where there is none)."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @classmethod
    def undefined(cls, n: int = 0) -> Estimate:
        """An estimate that does not exist."""
        return cls(math.nan, math.nan, math.nan, n)


def same(name: str, allowed: object, value: object) -> None:
    """Raise ValueError with the name unless the value is the allowed one."""
    if value != allowed:
        raise ValueError(f"{name}: {value}; allowed is {allowed}")


def group_index(names_N: Groups, n: int, what: str = "groups_N") -> NDArray[np.intp]:
    """Number of the group of each example, in sorted order of the names."""
    names = np.asarray(names_N)
    same(f"{what}: length", n, len(names))
    return np.unique(names, return_inverse=True)[1]


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover 0 to ``total``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def proportion(hits_N: ArrayLike, groups_N: Groups, draws_N: Groups | None = None) -> Estimate:
    """Share of hits with Wilson's interval for the number of independent examples that the groups are worth.

    That number is m (1 - m) / V, where V is the variance of the mean m by group (and by draw, see `mean`), and the
    quantile is Student's t: Dean & Pagano (2015), "Evaluating confidence interval methods for binomial proportions in
    clustered surveys", Journal of Survey Statistics and Methodology 3:484-503. If all hits are 0 or all are 1, the
    exact interval of Clopper & Pearson (1934, Biometrika 26:404-413) for as many examples as there are *groups*.

    ``hits_N``: bool, or float in [0, 1]; a NaN does not count. ``draws_N``: the draw of a control that each hit belongs
    to; examples are repeated in every draw. ValueError where lengths differ.
    """
    return _estimate(hits_N, groups_N, draws_N, share=True)


def mean(values_N: ArrayLike, groups_N: Groups, draws_N: Groups | None = None) -> Estimate:
    """Mean of numbers, differences among them, with a t interval by group.

    The variance is the jackknife's, leaving out one group at a time (MacKinnon, Nielsen & Webb 2023, "Fast and reliable
    jackknife and bootstrap methods for cluster-robust inference", Journal of Applied Econometrics 38:671-694). Of
    several draws, which are a sample as well, the variance by draw is added, with Satterthwaite's degrees of freedom.
    Where all values are 0, 1 or -1 the interval is that of `proportion`, to both sides of 0. NaN ends with less than
    `LEAST_GROUPS` groups, and where all groups have the same mean; arguments and errors as of `proportion`.
    """
    return _estimate(values_N, groups_N, draws_N, share=False)


def surely_more(values_N: ArrayLike, groups_N: Groups, draws_N: Groups) -> bool:
    """Whether a vector does more than a control, if it could be another draw of that control.

    The interval of `mean` tells the vector from the *mean* of all draws; a single draw varies more, by the variance of
    one draw on top. ``values_N``: hit of the vector minus hit of a draw on the same example.
    """
    found = _moments(values_N, groups_N, draws_N)
    if found is None or found.groups < LEAST_GROUPS or found.draws < 2:  # how much draws vary is not known from one
        return False
    if not found.by_draw + found.by_group:
        return mean(values_N, groups_N, draws_N).sign > 0
    one_draw = found.by_draw * (found.draws + 1)
    quantile = _quantile(found.by_group, found.groups, one_draw, found.draws)
    return found.mean > quantile * math.sqrt(found.by_group + one_draw)


def auroc(scores_N: ArrayLike, labels_N: ArrayLike, groups_N: Groups) -> Estimate:
    """Area under the ROC curve, ties counted half, with a t interval by group on the scale of log odds.

    After Obuchowski (1997), "Nonparametric analysis of clustered ROC curve data", Biometrics 53:567-578: positives and
    negatives of a group vary together. Log odds keep the interval inside 0 to 1. Where the scores separate the classes
    perfectly (area 1 or 0): with P groups of positives, Q of negatives and G in all, k = min(P, Q, G // 2) of each can
    be matched with no group used twice, and the interval is Clopper & Pearson's of k comparisons. Undefined without
    both classes; ``groups`` is 2 k, the groups of those comparisons. ValueError where lengths differ or, with two
    classes, a score is NaN or a label is neither 0 nor 1.
    """
    scores_N, truth_N = np.asarray(scores_N, dtype=np.float64), np.asarray(labels_N, dtype=np.float64)
    n, index_N = len(scores_N), group_index(groups_N, len(scores_N))
    same("labels_N: length", n, len(truth_N))
    if len(np.unique(truth_N)) < 2:
        return Estimate.undefined(n)
    if np.isnan(scores_N).any() or not np.isin(truth_N, (0, 1)).all():
        raise ValueError("scores_N, labels_N: NaN or another label; allowed are scores with a rank and labels 0 and 1")
    groups, positive_N = int(index_N.max()) + 1, truth_N == 1
    above_P = _below(scores_N[~positive_N], scores_N[positive_N])  # share of negatives that each positive is above
    above_Q = 1 - _below(scores_N[positive_N], scores_N[~positive_N])
    area = float(above_P.mean())
    sides = [len(np.unique(index_N[side_N])) for side_N in (positive_N, ~positive_N)]
    pairs = min(*sides, groups // 2)
    if 2 * pairs < LEAST_GROUPS:
        return Estimate(area, *NO_ENDS, n, 2 * pairs)
    if area in (0, 1):
        return Estimate(area, *_clopper_pearson(int(area), pairs), n, 2 * pairs)
    # Influence of each example on the area, summed by group: positives and negatives of one group go together.
    influence_N = np.empty(n)
    influence_N[positive_N] = (above_P - area) / len(above_P)
    influence_N[~positive_N] = (above_Q - area) / len(above_Q)
    variance = _variance(influence_N, index_N)
    if not variance:
        return Estimate(area, *NO_ENDS, n, 2 * pairs)
    half = _t(min(sides) - 1) * math.sqrt(variance) / (area * (1 - area))
    odds = math.log(area / (1 - area))
    low, high = (1 / (1 + math.exp(-(odds + side * half))) for side in (-1, 1))
    return Estimate(area, low, high, n, 2 * pairs)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over seeds with Student's t interval, not clipped; `n` and `groups` are sums over the seeds.

    NaN seeds are dropped, and beside others those with too few groups, which cannot tell; a single one is returned
    unchanged. If all agree exactly t would give width 0, and the interval spans the seeds' own intervals instead.
    """
    known = [estimate for estimate in estimates if estimate.known]
    kept = [estimate for estimate in known if not estimate.too_few] or known
    if len(kept) < 2:
        return kept[0] if kept else Estimate.undefined()
    values_S = np.array([estimate.estimate for estimate in kept])
    if np.ptp(values_S) == 0:
        return over_draws(kept)
    middle, half = float(values_S.mean()), _t(len(kept) - 1) * float(values_S.std(ddof=1)) / math.sqrt(len(kept))
    return _pooled(kept, lambda *_: (middle, middle - half, middle + half))


def over_draws(estimates: Sequence[Estimate]) -> Estimate:
    """Of seeds' ``mean_with_range`` the mean of their means, with the range of all; `n` is the sum."""
    # fmin and fmax pass over NaN.
    return _pooled(estimates, lambda each, low, high: (each.mean(), np.fmin.reduce(low), np.fmax.reduce(high)))


def averaged(estimates: Sequence[Estimate]) -> Estimate:
    """Of seeds' distributions by chance the mean, and the mean of each end; `n` is the sum."""
    return _pooled(estimates, lambda *each_3S: np.mean(each_3S, axis=1))


def _pooled(estimates: Sequence[Estimate], of: Callable[[Floats, Floats, Floats], Iterable[float]]) -> Estimate:
    """What ``of`` makes of the estimates, lower and upper ends of all seeds that have one."""
    kept = [estimate for estimate in estimates if estimate.known]
    if not kept:
        return Estimate.undefined()
    each_3S = np.transpose([(one.estimate, one.low, one.high) for one in kept])
    middle, low, high = map(float, of(*each_3S))
    return Estimate(middle, low, high, sum(one.n for one in kept), sum(one.groups for one in kept))


def mean_with_range(values: ArrayLike) -> Estimate:
    """Mean of draws that are not NaN, with their range as ends, which is no confidence interval as draws share data.

    NaN ends where the draws do not differ; `n` is the number of draws.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return Estimate.undefined()
    low, high = (float(known.min()), float(known.max())) if np.ptp(known) > 0 else NO_ENDS
    return Estimate(float(known.mean()), low, high, len(known))


@dataclass(frozen=True, slots=True)
class _Moments:
    """A mean with its variance by group and by draw; ``constant``: all values are the same."""

    mean: float
    n: int
    groups: int
    draws: int
    by_group: float
    by_draw: float
    constant: bool


def _estimate(values_N: ArrayLike, groups_N: Groups, draws_N: Groups | None, *, share: bool) -> Estimate:
    """Mean with Wilson's interval for a share, else Student's."""
    found = _moments(values_N, groups_N, draws_N)
    if found is None:
        return Estimate.undefined()
    low, high, variance = math.nan, math.nan, found.by_group + found.by_draw
    if found.groups >= LEAST_GROUPS and found.constant and found.mean in (-1, 0, 1):
        low, high = _clopper_pearson(abs(int(found.mean)), found.groups)
        if found.mean < 0:
            low, high = -high, -low
        elif found.mean == 0 and not share:
            low = -high
    elif found.groups >= LEAST_GROUPS and variance:
        quantile = _quantile(found.by_group, found.groups, found.by_draw, found.draws)
        if share:
            low, high = _wilson(found.mean, variance, quantile)
        else:
            low, high = (found.mean + side * quantile * math.sqrt(variance) for side in (-1, 1))
    return Estimate(found.mean, low, high, found.n, found.groups)


def _moments(values_N: ArrayLike, groups_N: Groups, draws_N: Groups | None) -> _Moments | None:
    given_N = np.asarray(values_N, dtype=np.float64)
    index_N, known_N = group_index(groups_N, len(given_N)), ~np.isnan(given_N)
    draw_N = np.zeros(len(given_N), np.intp) if draws_N is None else group_index(draws_N, len(given_N), "draws_N")
    found_N, index_N, draw_N = given_N[known_N], index_N[known_N], draw_N[known_N]
    if not (n := len(found_N)):
        return None
    middle = float(found_N.mean())
    influence_N = (found_N - middle) / n
    groups, draws = (len(np.unique(one_N)) for one_N in (index_N, draw_N))
    by_group, by_draw = (_variance(influence_N, one_N) for one_N in (index_N, draw_N))
    return _Moments(middle, n, groups, draws, by_group, by_draw, constant=not np.ptp(found_N))


def _variance(influence_N: Floats, index_N: NDArray[np.intp]) -> float:
    """Jackknife variance of a mean with these influences, one cluster left out at a time; 0 for a single cluster."""
    counts_G = np.bincount(index_N)
    there_G = counts_G > 0
    share_G = counts_G[there_G] / len(index_N)
    if len(share_G) < 2:
        return 0.0
    moved_G = np.bincount(index_N, weights=influence_N)[there_G] / (1 - share_G)
    return float((len(share_G) - 1) / len(share_G) * (moved_G**2).sum()) if np.abs(moved_G).max() > 1e-12 else 0.0


def _quantile(by_group: float, groups: int, by_draw: float, draws: int) -> float:
    """Quantile of Student's t for a sum of two variances, with Satterthwaite's degrees of freedom."""
    parts = by_group**2 / (groups - 1) + (by_draw**2 / (draws - 1) if draws > 1 else 0.0)
    return _t((by_group + by_draw) ** 2 / parts)


def _wilson(share: float, variance: float, quantile: float) -> Ends:
    """Where a test of the share rejects, for as many independent examples as have this variance."""
    worth, square = share * (1 - share) / variance, quantile**2
    center = share + square / (2 * worth)
    width = quantile * math.sqrt(variance + square / (4 * worth**2))
    return (center - width) / (1 + square / worth), (center + width) / (1 + square / worth)


def _below(others: Floats, scores: Floats) -> Floats:
    """Share of the others below each score, ties counted half."""
    others = np.sort(others)
    both = np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")
    return np.asarray(both / (2 * len(others)))


def _t(degrees: float) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, degrees))


def _clopper_pearson(value: int, n: int) -> Ends:
    """Exact interval of a proportion of which none (value 0) or all (value 1) of n trials were hits."""
    tail = ((1 - LEVEL) / 2) ** (1 / n)  # the beta quantiles are closed forms at the ends
    return (tail, 1.0) if value else (0.0, 1 - tail)
