"""Intervals and tests against independent oracles: plain loops, exact enumeration, scipy and scikit-learn."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import spatial, stats
from sklearn.metrics import roc_auc_score

from mnemoscope.statistics import (
    Estimate,
    Floats,
    auroc,
    averaged,
    cosine,
    half_of_groups,
    holm,
    mean,
    over_draws,
    over_seeds,
    overlap,
    overlap_by_chance,
    proportion,
    rank_correlation,
    sign_flips,
    surely_more,
)
from mnemoscope.statistics.contrast import ContrastAccumulator

coverage = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "coverage.py")))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def left_out(values: np.ndarray, names_N: np.ndarray) -> float:
    """The jackknife variance of a mean, by a loop that leaves out one name at a time."""
    means = [values[names_N != name].mean() for name in set(names_N.tolist())]
    return float((len(means) - 1) / len(means) * ((np.array(means) - values.mean()) ** 2).sum())


def test_a_mean_has_the_t_interval_of_a_jackknife_over_groups() -> None:
    draw = rng(1)
    groups = np.repeat(np.arange(12), draw.integers(1, 8, size=12))
    values = draw.normal(size=12)[groups] + draw.normal(size=len(groups))
    result, half = mean(values, groups), stats.t.ppf(0.975, 11) * math.sqrt(left_out(values, groups))
    assert (result.estimate, result.n, result.groups) == (pytest.approx(values.mean()), len(groups), 12)
    assert (result.low, result.high) == pytest.approx((values.mean() - half, values.mean() + half))
    alone = mean(values, np.arange(len(values)))  # every example a group: the textbook interval
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (alone.low, alone.high) == pytest.approx((oracle.low, oracle.high))


def test_a_share_has_wilsons_interval_for_what_its_groups_are_worth() -> None:
    hits = rng(2).random(60) < 0.7
    result = proportion(hits, np.arange(60))
    worth = hits.mean() * (1 - hits.mean()) / left_out(hits.astype(float), np.arange(60))
    square = stats.t.ppf(0.975, 59) ** 2
    # Wilson's ends are where the test of a share rejects: (m - p)^2 = t^2 p (1 - p) / worth.
    for end in (result.low, result.high):
        assert (hits.mean() - end) ** 2 == pytest.approx(square * end * (1 - end) / worth)
    pairs = proportion(np.repeat(hits, 2), np.repeat(np.arange(60), 2))  # twice the rows, no more information
    assert (pairs.low, pairs.high) == pytest.approx((result.low, result.high))


def test_draws_of_a_control_are_a_sample_as_well() -> None:
    draw = rng(3)
    groups, draws = np.repeat(np.arange(10), 3 * 20), np.tile(np.arange(20), 30)
    values = draw.normal(size=10)[groups] + draw.normal(size=20)[draws] + draw.normal(size=600)
    result, parts = mean(values, groups, draws), (left_out(values, groups), left_out(values, draws))
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 9 + parts[1] ** 2 / 19)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(sum(parts))
    assert (result.low, result.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert result.high - result.low > mean(values, groups).high - mean(values, groups).low
    # A vector that is one more draw differs from their mean for certain, and not from single draws.
    beyond = values - values.mean() + 1.05 * half
    assert mean(beyond, groups, draws).sign == 1
    assert not surely_more(beyond, groups, draws)
    assert surely_more(beyond + 4, groups, draws)
    assert not surely_more([], [], [])
    assert not surely_more(beyond + 4, groups, np.zeros(600)), "how much draws vary is not known from one"
    assert surely_more(np.ones(600), groups, draws), "a vector that always does what its control never does"
    assert not surely_more(np.zeros(600), groups, draws)
    assert not surely_more(np.ones(5), range(5), [0, 0, 0, 1, 1]), "too few groups"


@pytest.mark.slow
@pytest.mark.parametrize("groups", [6, 20])
def test_intervals_cover_what_they_say(groups: int) -> None:
    """By the simulation of ``benchmarks/coverage.py``, with fewer repeats; its table is in the log."""
    found = coverage.covered(groups, -1.0, 1000, 0)
    assert all(0.93 <= found[name] <= 0.97 for name in ("shift", "control", "difference"))
    assert found["more"] <= 0.03
    assert 0.93 <= coverage.ranking(groups, 1.0, 1000, 1) <= 0.97


def test_values_all_alike_have_the_exact_interval_of_as_many_groups() -> None:
    groups = np.repeat(list("abcdefg"), 20)
    for value in (0, 1):
        result, exact = proportion(np.full(140, value), groups), stats.binomtest(7 * value, 7).proportion_ci(0.95)
        assert (result.estimate, result.low, result.high, result.n) == pytest.approx((value, *exact, 140))
    up = 1 - 0.025 ** (1 / 7)
    unchanged, worse = mean(np.zeros(7), range(7)), mean(-np.ones(7), range(7))  # to the sides they can take
    assert (unchanged.low, unchanged.high) == pytest.approx((-up, up))
    assert (worse.low, worse.high) == pytest.approx((-1, -1 + up))


def test_what_has_no_interval_says_nan_and_why() -> None:
    assert not proportion([], []).known
    few = proportion([1, 0, 1, 1, 0], range(5))
    assert (few.estimate, math.isnan(few.low), few.groups, few.too_few, few.sign) == (0.6, True, 5, True, 0)
    balanced = proportion([1, 0] * 6, np.repeat(np.arange(6), 2))  # all groups have the same mean
    assert (balanced.estimate, math.isnan(balanced.low), balanced.too_few) == (0.5, True, False)


def test_neither_undefined_hits_nor_the_order_of_rows_count() -> None:
    hits, groups, order = rng(7).random(90) < 0.3, np.repeat(np.arange(30), 3), rng(8).permutation(90)
    result = proportion(hits, groups)
    shuffled = proportion(hits[order], groups[order])
    assert (shuffled.low, shuffled.high) == pytest.approx((result.low, result.high))
    assert proportion(np.append(hits, [math.nan] * 2), np.append(groups, [99, 1])) == result
    assert proportion([math.nan, math.nan], ["a", "b"]).n == 0


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="groups_N: length: 2; allowed is 3"):
        proportion([1, 0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="draws_N: length: 1; allowed is 2"):
        mean([1, 0], ["a", "b"], [0])
    with pytest.raises(ValueError, match="labels_N: length: 3; allowed is 2"):
        auroc([1, 2], [0, 1, 1], ["a", "b"])


def test_over_seeds_is_students_t() -> None:
    values = [0.91, 0.84, 1.0, 0.97]
    result = over_seeds([Estimate(value, 0.0, 1.0, 10) for value in values])
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert result.estimate == pytest.approx(np.mean(values))
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high))
    assert result.high > 1  # not clipped
    assert result.n == 40


def test_estimates_of_several_seeds_keep_what_their_ends_are() -> None:
    only, undefined = Estimate(0.5, 0.4, 0.7, 12), Estimate.undefined(3)
    assert over_seeds([only]) == over_seeds([undefined, only]) == over_draws([only, undefined]) == only
    assert not any(of([]).known for of in (over_seeds, over_draws, averaged))
    # Seeds that agree exactly do not look certain.
    result = over_seeds([Estimate(1, 0.8, 1, 10), Estimate(1, 0.6, 1, 5), Estimate(1, math.nan, math.nan, 1)])
    assert result == Estimate(1, 0.6, 1, 16)
    # A range stays the range of all draws; the ends of a permutation are averaged, and never leave 0 and 1.
    first, second = Estimate(0.2, 0.1, 0.4, 10), Estimate(0.6, 0.3, 0.7, 10)
    assert over_draws([first, second]) == Estimate(pytest.approx(0.4), 0.1, 0.7, 20)
    assert over_draws([first, Estimate(0.4, math.nan, math.nan, 1)]) == Estimate(pytest.approx(0.3), 0.1, 0.4, 11)
    assert averaged([first, second]) == Estimate(pytest.approx(0.4), pytest.approx(0.2), pytest.approx(0.55), 20)


def test_auroc_is_scikit_learns_and_its_interval_by_group() -> None:
    draw = rng(10)
    groups, labels = np.repeat(np.arange(25), 4), np.tile([0, 1, 0, 1], 25)
    scores = np.round(labels + 2 * np.repeat(draw.normal(size=25), 4) + draw.normal(size=100), 1)
    result = auroc(scores, labels, groups)
    assert result.estimate == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)  # also with ties
    areas = []
    for _ in range(600):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in draw.integers(25, size=25)])
        areas.append(auroc(scores[rows], labels[rows], rows).estimate)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=0.03)
    assert (result.n, result.groups) == (100, 24)


def test_an_area_of_perfect_or_no_separation_does_not_look_certain() -> None:
    labels = np.tile([0, 1], 12)
    for area in (0, 1):
        result = auroc(labels if area else -labels, labels, np.repeat(np.arange(12), 2))
        exact = stats.binomtest(6 * area, 6).proportion_ci(0.95)  # 12 groups make 6 disjoint comparisons
        assert (result.estimate, result.low, result.high) == pytest.approx((area, *exact))
    assert math.isnan(auroc([1.0, 2.0], [1, 1], [0, 1]).estimate)
    assert auroc([], [], []).n == 0
    few = auroc([0.0, 2.0, 1.0, 3.0], [0, 1, 0, 1], ["a", "a", "b", "b"])
    assert (few.estimate, math.isnan(few.low), few.too_few) == (1, True, True)
    constant = auroc(np.zeros(16), [0, 1] * 8, range(16))
    assert (constant.estimate, math.isnan(constant.low), constant.too_few) == (0.5, True, False)
    for scores, labels in (([1.0, math.nan], [0, 1]), ([1.0, 2.0], [-1, 1])):
        with pytest.raises(ValueError, match="allowed are scores with a rank and labels 0 and 1"):
            auroc(scores, labels, [0, 1])


def test_cosine_and_rank_correlation_agree_with_scipy() -> None:
    draw = rng(21)
    first, second = draw.integers(0, 9, size=(2, 3, 20)).astype(float)  # with ties
    assert cosine(first, second) == pytest.approx(1 - spatial.distance.cosine(first.ravel(), second.ravel()))
    assert cosine(first, -2 * first) == -1
    expected = stats.spearmanr(first.ravel(), second.ravel()).statistic
    assert rank_correlation(first, second) == pytest.approx(expected)
    gaps = first.copy()
    gaps[0, :5] = math.nan
    expected = stats.spearmanr(first.ravel()[5:], second.ravel()[5:]).statistic
    assert rank_correlation(gaps, second) == pytest.approx(expected)
    assert rank_correlation(first, np.exp(first)) == pytest.approx(1)


def test_what_has_no_direction_or_order_says_nan() -> None:
    assert math.isnan(cosine([0.0, 0.0], [1.0, 2.0]))
    assert math.isnan(cosine([math.nan, 1.0], [1.0, 2.0]))
    assert math.isnan(rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(rank_correlation([1.0, math.nan], [1.0, 2.0]))
    for compare in (cosine, rank_correlation, overlap):
        with pytest.raises(ValueError, match=r"second: shape: \(2,\); allowed is \(3,\)"):
            compare([1, 0, 1], [1, 0])


def test_overlap_counts_what_two_sets_share() -> None:
    first, second = np.array([[1, 1, 0, 0], [0, 0, 1, 1]]), np.array([[0, 1, 0, 1], [0, 1, 1, 0]])
    assert overlap(first, second) == 0.5
    assert overlap(first, first) == 1
    assert math.isnan(overlap(0 * first, 0 * first))
    with pytest.raises(ValueError, match="second: members: 3; allowed is 4"):
        overlap(first, second & [[1, 1, 1, 1], [1, 1, 0, 1]])


def test_overlap_by_chance_is_what_permutations_give() -> None:
    draw = rng(22)
    first, second = np.zeros((2, 3, 40), dtype=bool)
    for chosen, counts in ((first, (2, 8, 20)), (second, (4, 6, 20))):
        for row, count in zip(chosen, counts, strict=True):
            row[draw.choice(40, count, replace=False)] = True
    within = [overlap(draw.permuted(first, axis=1), second) for _ in range(6000)]
    anywhere = [overlap(draw.permuted(first.ravel()), second.ravel()) for _ in range(6000)]
    for drawn, chance in (
        (within, overlap_by_chance(first, second)),
        (anywhere, overlap_by_chance(first.reshape(1, -1), second.reshape(1, -1))),
    ):
        assert chance.n == 30
        assert chance.estimate == pytest.approx(np.mean(drawn), abs=0.005)
        assert (chance.low, chance.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1 / 30 + 1e-9)
    assert overlap_by_chance(first.reshape(1, -1), second.reshape(1, -1)).estimate == pytest.approx(30 / 120)
    assert overlap_by_chance(first, second).estimate == pytest.approx((2 * 4 + 8 * 6 + 20 * 20) / 40 / 30)
    # One that cannot vary has no interval.
    everything = overlap_by_chance(np.ones((2, 5)), np.ones((2, 5)))
    assert (everything.estimate, math.isnan(everything.low), everything.n) == (1, True, 10)
    assert math.isnan(overlap_by_chance(np.zeros((2, 5)), np.zeros((2, 5))).estimate)
    with pytest.raises(ValueError, match="first_LD: 1 axes; allowed is 2"):
        overlap_by_chance([1, 0], [0, 1])


def test_halves_have_half_of_the_groups_whole() -> None:
    groups = [f"g{i}" for i in rng(24).integers(0, 9, size=50)]
    halves = [half_of_groups(groups, rng(seed)) for seed in range(60)]
    for half in halves:
        inside, outside = (set(np.array(groups)[side]) for side in (half, ~half))
        assert (len(inside), len(outside), inside & outside) == (4, 5, set())
    assert 10 < np.sum(halves, axis=0).min() <= np.sum(halves, axis=0).max() < 45
    assert not half_of_groups(["one", "one"], rng()).any()


def flips_of(
    differences_NLD: Floats, groups: list[str], permutations: int = 1000, seed: int = 0
) -> ContrastAccumulator:
    flips = ContrastAccumulator.empty("block", *differences_NLD.shape[1:], permutations, seed)
    flips.add(differences_NLD, np.zeros_like(differences_NLD), groups)
    return flips


@pytest.mark.parametrize("size", [1, 2])
def test_sign_flips_of_whole_groups_agree_with_exact_enumeration(size: int) -> None:
    differences = rng(14).normal(size=(8 * size, 2, 3)) + 0.7 * rng(15).random((2, 3))
    scale, totals = np.sqrt((differences**2).sum(axis=0)), differences.reshape(8, size, 2, 3).sum(axis=1)
    observed = np.abs(totals.sum(axis=0)) / scale - 1e-9
    all_signs = np.array(list(itertools.product([-1, 1], repeat=8)))
    statistics_of = np.abs(np.einsum("bn,nld->bld", all_signs, totals)) / scale
    exact, most = (statistics_of >= observed).mean(axis=0), statistics_of.max(axis=(1, 2))
    groups = [f"group {i // size}" for i in range(8 * size)]
    family_wise, per_neuron = flips_of(differences, groups, permutations=20_000).p_values()
    np.testing.assert_allclose(per_neuron, exact, atol=0.015)  # four standard errors of 20,000 draws
    np.testing.assert_allclose(family_wise, (most[:, None, None] >= observed).mean(axis=0), atol=0.015)
    assert exact.min() < 0.1
    # The test of one list of differences tries all signs itself.
    assert sign_flips(differences[:, 0, 0], groups, rng()) == pytest.approx(exact[0, 0])


def test_signs_are_fair_differ_by_seed_and_group_and_are_the_same_in_every_process() -> None:
    """Shards of different processes add up only if a hash, and no process's own seed, gives the signs."""
    one = np.ones((1, 1, 1))
    signs = np.array([flips_of(one, [f"g{i}"], 500, s).sums_BLD[:, 0, 0] for s in (0, 1) for i in range(40)])
    assert set(np.unique(signs)) == {-1, 1}
    agreement = (signs @ signs.T / 500)[np.triu_indices(80, k=1)]
    assert np.abs(agreement).max() < 5 / math.sqrt(500)
    assert abs(signs.mean()) < 4 / math.sqrt(signs.size)
    assert flips_of(one, ["Zoë"], 8, 3).sums_BLD[:, 0, 0].tolist() == [-1, 1, 1, -1, -1, -1, -1, -1]


def test_neurons_without_differences_are_not_significant_and_ties_count_as_extreme() -> None:
    differences = np.ones((30, 1, 3))
    differences[:, 0, 1] = 0
    family_wise, per_neuron = flips_of(differences, [f"g{i}" for i in range(30)], 99).p_values()
    assert family_wise.tolist() == per_neuron.tolist() == [[0.01, 1.0, 0.01]]
    # Two groups have four flips, of which two reach the observed sum exactly: p tends to 1/2 and never below.
    differences = np.array([0.1, 0.2, 0.7, 0.3])[:, None, None]
    _, per_neuron = flips_of(differences, ["a", "a", "a", "b"], 4000).p_values()
    assert per_neuron[0, 0] == pytest.approx(0.5, abs=0.04)


def test_groups_of_one_list_flip_together_and_ties_count_for_nothing() -> None:
    groups, values = np.repeat(np.arange(6), 2), np.ones(12)
    assert sign_flips(values, groups, rng()) == pytest.approx(2 / 64)  # all signs as observed, or all the other way
    values[:2] = -1  # a sum of at least 4 in size: at most one group against the others
    assert sign_flips(values, groups, rng()) == pytest.approx(14 / 64)
    cancels = np.tile(np.r_[np.ones(5), -np.ones(5)], 8)  # within each group
    assert sign_flips(cancels, np.repeat(np.arange(8), 10), rng()) == 1.0
    assert math.isnan(sign_flips(np.ones(5), np.arange(5), rng()))
    assert sign_flips(np.r_[np.ones(6), math.nan], np.arange(7), rng()) == 2 / 64
    # Of more groups than are tried in full, signs are drawn.
    values, names = rng(1).normal(0.4, 1, 80), np.arange(80) // 3
    sums = np.bincount(names, weights=values)
    drawn = np.abs(rng(2).choice((-1.0, 1.0), size=(40_000, len(sums))) @ sums) >= abs(sums.sum())
    assert sign_flips(values, names, rng(3)) == pytest.approx(drawn.mean(), abs=0.01)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, math.nan, 0.005]), [0.03, 0.06, 0.06, math.nan, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    assert holm([]).tolist() == []
