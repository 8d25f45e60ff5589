"""Intervals, tests and streamed moments: every number with an uncertainty comes from here.

Shapes: N examples or pairs, G groups, R resamples, B permutations, L layers, D neurons.
Undefined is NaN, never 0, and an interval of width 0 is never reported: it looks certain and is not.
Randomness enters through an explicit generator, or through a hash where shards must agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, stats

Floats = NDArray[np.float64]
Groups = Sequence[Any] | NDArray[Any]  # names of groups: strings or integers

# Two statistics that differ by rounding alone are a tie. In units of the statistic, which is at most sqrt(N).
TIE = 1e-9
# Resample weights are made in blocks of about this many numbers (16 MB), permutations in blocks of so many rows.
BLOCK_NUMBERS = 2_000_000
BLOCK_PERMUTATIONS = 64
# An area under the ROC curve goes by pairs of groups where these are at most so many times the examples.
FEW_GROUPS = 50


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate with its interval.

    Attributes:
        estimate: the value; NaN where it is undefined.
        low, high: ends of the interval; NaN where no interval can be given.
        n: how many examples, pairs or states the estimate rests on.
    """

    estimate: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """The form `results.json` holds."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    def undefined(cls, n: int = 0) -> Estimate:
        """An estimate that does not exist."""
        return cls(math.nan, math.nan, math.nan, n)


def proportion(
    hits_N: ArrayLike,
    groups_N: Groups,
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    signed: bool = False,
) -> Estimate:
    """The mean of hits, with a percentile bootstrap interval that resamples whole groups.

    Examples of one group are not independent, so groups are drawn with replacement and keep all their examples
    (Field & Welsh 2007, "Bootstrapping clustered data", JRSS B 69:369-390).

    Where every group has the same mean, so has every resample, and the bootstrap interval has width 0: it looks certain
    and is not. If all hits are 0 or all are 1, the exact interval of Clopper & Pearson (1934, Biometrika 26:404-413)
    takes its place, with the number of *groups* as its N, for groups are what is independent; all -1 is its mirror
    image. Otherwise its ends are NaN.

    Args:
        hits_N: bool or float, paired differences in {-1, 0, 1} too. An example whose hit is NaN does not count.
        groups_N: the group of each hit, strings or integers.
        rng, resamples, level: draws the resamples; how many; coverage of the interval.
        signed: hits are differences and could be negative: where all are 0, the interval reaches to both sides.

    Returns:
        `n` is the number of hits that count. No hits: undefined. A single group: the mean, with NaN for the ends.

    Raises:
        ValueError: `hits_N` and `groups_N` differ in length.
    """
    values_N, index_N = np.asarray(hits_N, dtype=np.float64), _group_index(groups_N, np.size(hits_N))
    values_N, index_N = values_N[~np.isnan(values_N)], index_N[~np.isnan(values_N)]
    if not len(values_N):
        return Estimate.undefined()
    mean, n = float(values_N.mean()), len(values_N)
    _, index_N, counts_G = np.unique(index_N, return_inverse=True, return_counts=True)
    if len(counts_G) == 1:
        return Estimate(mean, math.nan, math.nan, n)
    if np.ptp(values_N) == 0 and mean in (-1, 0, 1):
        low, high = _clopper_pearson(abs(int(mean)), len(counts_G), level)
        if mean == -1:
            low, high = -high, -low
        return Estimate(mean, -high if signed and mean == 0 else low, high, n)
    sums_G = np.bincount(index_N, weights=values_N)

    def mean_of(weights_RG: Floats) -> Floats:
        return np.asarray((weights_RG @ sums_G) / (weights_RG @ counts_G))

    return Estimate(mean, *_bootstrap(mean_of, (n, len(counts_G)), rng, resamples, level), n)


def auroc(
    scores_N: ArrayLike,
    labels_N: ArrayLike,
    groups_N: Groups,
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Area under the ROC curve, ties counted half (Mann-Whitney), with a percentile bootstrap by group.

    Resamples without both classes are dropped. Where the scores separate the classes perfectly (area 1 or 0), so does
    every resample. With P groups holding positives, Q negatives and G in all, k = min(P, Q, G // 2) positives and
    negatives can then be matched with no group used twice: k independent comparisons that came out alike, for which
    the exact Clopper-Pearson interval is given.

    Args:
        scores_N: float, no NaN; higher means positive.
        labels_N: 1 (or True) positive, 0 negative.
        groups_N, rng, resamples, level: as in `proportion`.

    Returns:
        Not both classes: undefined. A single group: the area, with NaN for the ends.

    Raises:
        ValueError: lengths differ, a score is NaN, or a label is neither 0 nor 1.
    """
    ranked_N, truth_N = np.asarray(scores_N, dtype=np.float64), np.asarray(labels_N, dtype=np.float64)
    n, index_N = len(ranked_N), _group_index(groups_N, len(ranked_N))
    _same("labels_N: length", n, len(truth_N))
    if np.isnan(ranked_N).any() or not np.isin(truth_N, (0, 1)).all():
        raise ValueError("scores_N, labels_N: NaN or another label; allowed are scores with a rank and labels 0 and 1")
    if len(np.unique(truth_N)) < 2:
        return Estimate.undefined(n)
    area_of = _area(ranked_N, truth_N == 1, index_N)
    groups = int(index_N.max()) + 1
    area = float(area_of(np.ones((1, groups)))[0])
    if groups == 1:
        return Estimate(area, math.nan, math.nan, n)
    if area in (0, 1):
        positive, negative = (len(np.unique(index_N[truth_N == label])) for label in (1, 0))
        return Estimate(area, *_clopper_pearson(int(area), min(positive, negative, groups // 2), level), n)
    return Estimate(area, *_bootstrap(area_of, (n, groups), rng, resamples, level), n)


def over_seeds(estimates: Sequence[Estimate], *, level: float = 0.95) -> Estimate:
    """One estimate for several seeds: their mean with Student's t interval over the seeds, not clipped to any range.

    Seeds whose estimate is NaN are dropped; none left is undefined, one is returned unchanged. If several agree exactly
    t would give width 0, and the interval spans the seeds' own intervals instead. `n` is the sum over the seeds.
    """
    kept = [estimate for estimate in estimates if not math.isnan(estimate.estimate)]
    if len(kept) < 2:
        return kept[0] if kept else Estimate.undefined()
    values_S = np.array([estimate.estimate for estimate in kept])
    mean, n = float(values_S.mean()), sum(estimate.n for estimate in kept)
    if np.ptp(values_S) == 0:
        low = float(np.fmin.reduce([estimate.low for estimate in kept]))  # fmin and fmax pass over NaN
        return Estimate(mean, low, float(np.fmax.reduce([estimate.high for estimate in kept])), n)
    half = float(stats.t.ppf((1 + level) / 2, len(kept) - 1) * values_S.std(ddof=1) / math.sqrt(len(kept)))
    return Estimate(mean, mean - half, mean + half, n)


def cosine(first: ArrayLike, second: ArrayLike) -> float:
    """Cosine of the angle between two arrays of one shape; NaN where one is all 0 or holds a NaN.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    _same("second: shape", a.shape, b.shape)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip((a * b).sum() / norms, -1, 1)) if norms > 0 else math.nan


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation over all entries of two arrays of one shape, ties at their mean rank.

    An entry that is NaN in either array does not count. NaN where less than two are left, or all of an array are equal.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = np.asarray(first, dtype=np.float64).ravel(), np.asarray(second, dtype=np.float64).ravel()
    _same("second: shape", np.shape(first), np.shape(second))
    known = ~np.isnan(a) & ~np.isnan(b)
    if known.sum() < 2:
        return math.nan
    ranks_2N = np.stack([stats.rankdata(a[known]), stats.rankdata(b[known])])
    ranks_2N -= ranks_2N.mean(axis=1, keepdims=True)
    return cosine(*ranks_2N)


def top_by_magnitude(values_LD: ArrayLike, top: float) -> NDArray[np.bool_]:
    """The ceil(top * L * D) entries of largest magnitude, over all rows at once.

    NaN counts as 0; of equal entries the one with the lower row, then index, is taken.

    Args:
        values_LD: any floats.
        top: share of all entries, in (0, 1].

    Returns:
        bool, shape (L, D).

    Raises:
        ValueError: `top` outside (0, 1].
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
    """Share of one set that is in the other as well; NaN for empty sets.

    Args:
        first, second: bool arrays of one shape, True for the members; equally many in both.

    Raises:
        ValueError: the shapes or the numbers of members differ.
    """
    a, b = _two_sets(first, second)
    return float((a & b).sum() / a.sum()) if a.any() else math.nan


def overlap_by_chance(first_LD: ArrayLike, second_LD: ArrayLike, *, level: float = 0.95) -> Estimate:
    """The permutation distribution of `overlap` where every row is permuted in itself: its mean and central interval.

    So much would two sets share that know nothing of each other except how many members each row has. It is exact, with
    no permutation drawn: what a row shares is hypergeometric, and rows are independent. One row of all L * D entries,
    `first_LD.reshape(1, -1)`, gives the weaker null in which a set knows nothing of the rows either: its mean is the
    share of members.

    Args:
        first_LD, second_LD: bool (L, D), as in `overlap`.
        level: of the interval.

    Returns:
        `n` is the number of members. NaN ends where only one overlap is possible.

    Raises:
        ValueError: as `overlap`, or the arrays do not have two axes.
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
    # Against rounding: a tail of exactly (1 - level) / 2 belongs to the interval's end.
    low, high = (int(np.searchsorted(below, tail - TIE)) for tail in ((1 - level) / 2, (1 + level) / 2))
    return Estimate(mean, *((low / members, high / members) if low < high else (math.nan, math.nan)), members)


def in_group_order(groups_N: Groups, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of all examples: the groups in random order, each in one piece, its examples in random order.

    The first n are what one has after collecting n examples group by group.
    """
    index_N = _group_index(groups_N, len(groups_N))
    place_G = rng.permutation(int(index_N.max()) + 1) if len(index_N) else np.zeros(0, dtype=np.intp)
    return np.lexsort((rng.random(len(index_N)), place_G[index_N]))


def half_of_groups(groups_N: Groups, rng: np.random.Generator) -> NDArray[np.bool_]:
    """True for the examples of a random half of the groups, of an odd number the smaller half."""
    index_N = _group_index(groups_N, len(groups_N))
    groups = int(index_N.max()) + 1 if len(index_N) else 0
    chosen_G = np.zeros(groups, dtype=np.bool_)
    chosen_G[rng.permutation(groups)[: groups // 2]] = True
    return np.asarray(chosen_G[index_N])


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """False discovery rates (q) of p-values of any shape, one family (Benjamini & Hochberg 1995, JRSS B 57:289-300).

    NaN stays NaN and does not belong to the family.
    """
    q = np.array(p, dtype=np.float64)
    defined = ~np.isnan(q)
    q[defined] = stats.false_discovery_control(q[defined])
    return q


@dataclass(slots=True, eq=False)
class PairedMoments:
    """Count, means and sums of squared deviations of paired states, streamed in float64.

    A batch is summed in two passes around its first pair, so that a large common offset costs no digits. Batches are
    joined by the pairwise update of Chan, Golub & LeVeque (1983, "Algorithms for computing the sample variance", The
    American Statistician 37:242-247), for the difference of two series in the form of Pebay (2008, Sandia report
    SAND2008-6212). Any sharding and any order agree up to rounding.

    Attributes:
        count: pairs so far. While it is 0 the arrays hold starting zeros, not estimates.
        means_2LD: means of the states, generalized then memorized.
        squares_3LD: sums of squared deviations from the mean: generalized, memorized, generalized - memorized.
    """

    count: int
    means_2LD: Floats
    squares_3LD: Floats

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> PairedMoments:
        """Moments of no pairs; `shape` is that of one state, (L, D)."""
        return cls(0, np.zeros((2, *shape)), np.zeros((3, *shape)))

    def add(self, states_generalized_NLD: ArrayLike, states_memorized_NLD: ArrayLike) -> None:
        """Take in N more pairs, row n of both arrays being one pair; ValueError unless both are (N, L, D)."""
        generalized_NLD = _batch("states_generalized", states_generalized_NLD, self.means_2LD[0])
        memorized_NLD = _batch("states_memorized", states_memorized_NLD, self.means_2LD[1])
        _same("states_memorized: number of pairs", len(generalized_NLD), len(memorized_NLD))
        if not len(generalized_NLD):
            return
        series = generalized_NLD, memorized_NLD, generalized_NLD - memorized_NLD
        means, squares = zip(*map(_mean_and_squares, series), strict=True)
        self.merge(PairedMoments(len(generalized_NLD), np.stack(means[:2]), np.stack(squares)))

    def merge(self, other: PairedMoments) -> Self:
        """Take in another shard's moments in place, and return self; ValueError unless the shapes agree."""
        _same("shape", self.means_2LD.shape, other.means_2LD.shape)
        if not other.count:
            return self
        count = self.count + other.count
        steps_2LD = other.means_2LD - self.means_2LD
        steps_3LD = np.concatenate([steps_2LD, steps_2LD[:1] - steps_2LD[1:]])
        self.squares_3LD += other.squares_3LD + self.count * other.count / count * steps_3LD**2
        self.means_2LD += other.count / count * steps_2LD
        self.count = count
        return self


@dataclass(slots=True, eq=False)
class SignFlips:
    """A paired sign-flip permutation test with the max statistic, streamed.

    If a neuron does not tell the behaviours apart, the differences of a group are as likely to have the other sign.
    Whole groups flip, for the pairs of a group are not independent (exchangeability blocks: Winkler et al. 2014,
    NeuroImage 92:381-397). The statistic of a neuron is |sum of signed differences| / sqrt(sum of squared differences),
    whose denominator no flip changes. Sign b of a group is bit b of a hash of (seed, group), so that shards on
    different workers, and different runs, flip alike and their sums add up.

    Memory is (B + 2) * L * D * 8 bytes, whatever N is: 25 MB for 6 layers of 512 at B = 1000.

    Attributes:
        seed, count: picks the flips, the same in all shards; differences so far.
        sum_LD, squares_LD: sum of the differences and of their squares.
        sums_BLD: the sum of the differences with the signs of permutation b.
    """

    seed: int
    count: int
    sum_LD: Floats
    squares_LD: Floats
    sums_BLD: Floats = field(repr=False)

    @classmethod
    def empty(cls, shape: tuple[int, ...], permutations: int = 1000, seed: int = 0) -> SignFlips:
        """A test of no pairs, for differences of `shape` (L, D); ValueError for less than one permutation.

        The smallest p-value is 1 / (permutations + 1).
        """
        if permutations < 1:
            raise ValueError(f"permutations: {permutations}; allowed is 1 or more")
        return cls(seed, 0, np.zeros(shape), np.zeros(shape), np.zeros((permutations, *shape)))

    def add(self, differences_NLD: ArrayLike, groups: Sequence[str]) -> None:
        """Take in N more differences (generalized - memorized) and their groups; ValueError unless (N, L, D) and N."""
        values_NLD = _batch("differences", differences_NLD, self.sum_LD)
        _same("groups: length", len(values_NLD), len(groups))
        if not len(values_NLD):
            return
        names_G, index_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        # Flipping a group's total once is the same as flipping each of its pairs, and costs G columns instead of N.
        members_GN = sparse.csr_array((np.ones(len(index_N)), (index_N, np.arange(len(index_N)))))
        totals_GD = members_GN @ values_NLD.reshape(len(index_N), -1)
        permutations = len(self.sums_BLD)
        signs_BG = np.stack([_signs(self.seed, permutations, str(name)) for name in names_G], axis=1).astype(np.float64)
        for rows in _blocks(permutations, BLOCK_PERMUTATIONS):  # in blocks, for a second array of B sums may not fit
            self.sums_BLD[rows] += (signs_BG[rows] @ totals_GD).reshape(-1, *self.sum_LD.shape)
        self.count += len(index_N)
        self.sum_LD += values_NLD.sum(axis=0)
        self.squares_LD += (values_NLD**2).sum(axis=0)

    def merge(self, other: SignFlips) -> Self:
        """Take in another shard's sums in place, and return self; ValueError unless seed, B and shape agree."""
        _same("seed", self.seed, other.seed)
        _same("shape", self.sums_BLD.shape, other.sums_BLD.shape)
        self.count += other.count
        self.sum_LD += other.sum_LD
        self.squares_LD += other.squares_LD
        self.sums_BLD += other.sums_BLD
        return self

    def p_values(self) -> tuple[Floats, Floats]:
        """Two-sided p-values (p_family_wise_LD, p_per_neuron_LD): 1 where all differences are 0, NaN while count is 0.

        Family-wise compares each neuron with the largest statistic of each permutation (Westfall & Young 1993,
        "Resampling-based multiple testing"). Both are (1 + number of permutations at least as extreme) / (B + 1), which
        is never 0 (Phipson & Smyth 2010, SAGMB 9:39).
        """
        shape, permutations = self.sum_LD.shape, len(self.sums_BLD)
        if not self.count:
            return np.full(shape, math.nan), np.full(shape, math.nan)
        # Where all differences are 0 the statistic is 0 for every flip: never the maximum, and always a tie, so p = 1.
        scale_LD = np.sqrt(np.where(self.squares_LD > 0, self.squares_LD, 1.0))
        threshold_LD = np.abs(self.sum_LD) / scale_LD - TIE
        maxima_B, extreme_LD = np.empty(permutations), np.zeros(shape, dtype=np.int64)
        for rows in _blocks(permutations, BLOCK_PERMUTATIONS):
            statistics_BLD = np.abs(self.sums_BLD[rows]) / scale_LD
            maxima_B[rows] = statistics_BLD.reshape(len(statistics_BLD), -1).max(axis=1)
            extreme_LD += (statistics_BLD >= threshold_LD).sum(axis=0)
        beaten_LD = permutations - np.searchsorted(np.sort(maxima_B), threshold_LD)
        return (1 + beaten_LD) / (permutations + 1), (1 + extreme_LD) / (permutations + 1)


@lru_cache(maxsize=65_536)
def _signs(seed: int, permutations: int, group: str) -> NDArray[np.int8]:
    """B signs of a group, from a hash that is the same in every process, machine and version (not Python's `hash`)."""
    digest = hashlib.shake_256(f"{seed}:{group}".encode()).digest((permutations + 7) // 8)
    bits_B = np.unpackbits(np.frombuffer(digest, dtype=np.uint8), count=permutations)
    return 2 * bits_B.astype(np.int8) - 1


def _mean_and_squares(values_NLD: Floats) -> tuple[Floats, Floats]:
    """Mean and sum of squared deviations, around the first row so that an offset costs no digits."""
    first_LD = values_NLD[0]
    centered_NLD = values_NLD - first_LD
    shift_LD = centered_NLD.mean(axis=0)
    centered_NLD -= shift_LD
    squares_LD: Floats = (centered_NLD**2).sum(axis=0)
    return first_LD + shift_LD, squares_LD


def _area(scores_N: Floats, positive_N: NDArray[np.bool_], index_N: NDArray[np.intp]) -> Callable[[Floats], Floats]:
    """A function from group weights (R, G) to areas (R), NaN where a class has no weight.

    With few groups the comparisons are counted once for every two groups, else scores are sorted once and then weighed.
    """
    groups = int(index_N.max()) + 1
    if groups**2 <= FEW_GROUPS * len(scores_N):
        return _area_of_few(scores_N, positive_N, index_N, groups)
    order = np.argsort(scores_N, kind="stable")
    index_N, positive_N = index_N[order], positive_N[order]
    starts = np.unique(scores_N[order], return_index=True)[1]  # where each of the K distinct scores begins

    def areas(weights_RG: Floats) -> Floats:
        weights_RN = weights_RG[:, index_N]
        positive_RK = np.add.reduceat(weights_RN * positive_N, starts, axis=1)
        negative_RK = np.add.reduceat(weights_RN * ~positive_N, starts, axis=1)
        below_RK = np.cumsum(negative_RK, axis=1) - negative_RK / 2
        comparisons_R = positive_RK.sum(axis=1) * negative_RK.sum(axis=1)
        wins_R = (positive_RK * below_RK).sum(axis=1)
        areas_R: Floats = np.divide(wins_R, comparisons_R, out=np.full(len(wins_R), math.nan), where=comparisons_R > 0)
        return areas_R

    return areas


def _area_of_few(
    scores_N: Floats, positive_N: NDArray[np.bool_], index_N: NDArray[np.intp], groups: int
) -> Callable[[Floats], Floats]:
    """As `_area`: entry (g, h) counts how often a positive of group g is above a negative of group h, ties half."""
    positive, negative = scores_N[positive_N], scores_N[~positive_N]
    of_positive, of_negative = index_N[positive_N], index_N[~positive_N]
    wins_GG = np.empty((groups, groups))
    for group in range(groups):
        others = np.sort(negative[of_negative == group])
        below = (np.searchsorted(others, positive, "left") + np.searchsorted(others, positive, "right")) / 2
        wins_GG[:, group] = np.bincount(of_positive, weights=below, minlength=groups)
    sizes_2G = [np.bincount(members, minlength=groups).astype(np.float64) for members in (of_positive, of_negative)]

    def areas(weights_RG: Floats) -> Floats:
        comparisons_R = (weights_RG @ sizes_2G[0]) * (weights_RG @ sizes_2G[1])
        wins_R = ((weights_RG @ wins_GG) * weights_RG).sum(axis=1)
        areas_R: Floats = np.divide(wins_R, comparisons_R, out=np.full(len(wins_R), math.nan), where=comparisons_R > 0)
        return areas_R

    return areas


def _bootstrap(
    statistic: Callable[[Floats], Floats], size: tuple[int, int], rng: np.random.Generator, resamples: int, level: float
) -> tuple[float, float]:
    """Percentile interval of a statistic of group weights (R, G) -> (R), of `size` (N, G).

    NaN resamples are dropped. NaN ends: none is left, or all are equal and the interval would have width 0.
    """
    groups, values = size[1], []
    for block in _blocks(resamples, max(1, BLOCK_NUMBERS // max(size))):
        rows = block.stop - block.start
        # Multinomial weights: how often each group is drawn in G draws with replacement.
        drawn_RG = rng.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        weights_RG = np.bincount(drawn_RG.ravel(), minlength=rows * groups).reshape(rows, groups)
        values.append(statistic(weights_RG.astype(np.float64)))
    values_R = np.concatenate(values)
    values_R = values_R[~np.isnan(values_R)]
    if not len(values_R) or np.ptp(values_R) < TIE:
        return math.nan, math.nan
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _clopper_pearson(value: int, n: int, level: float) -> tuple[float, float]:
    """Exact interval of a proportion of which none (value 0) or all (value 1) of n trials were hits."""
    tail = ((1 - level) / 2) ** (1 / n)  # the beta quantiles are closed forms at the ends
    return (tail, 1.0) if value else (0.0, 1 - tail)


def _two_sets(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a, b = np.asarray(first, dtype=np.bool_), np.asarray(second, dtype=np.bool_)
    _same("second: shape", a.shape, b.shape)
    _same("second: members", int(a.sum()), int(b.sum()))
    return a, b


def _group_index(groups_N: Groups, n: int) -> NDArray[np.intp]:
    """Number of the group of each example, in sorted order of the names."""
    _same("groups_N: length", n, len(groups_N))
    return np.unique(np.asarray(groups_N), return_inverse=True)[1]


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _batch(name: str, values: ArrayLike, like_LD: Floats) -> Floats:
    values_NLD = np.asarray(values, dtype=np.float64)
    _same(f"{name}: shape", (len(values_NLD), *like_LD.shape), values_NLD.shape)
    return values_NLD


def _same(name: str, allowed: object, value: object) -> None:
    if value != allowed:
        raise ValueError(f"{name}: {value}; allowed is {allowed}")
