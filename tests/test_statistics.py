"""Intervals and tests against independent oracles: plain loops, exact enumeration, scipy and scikit-learn."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import spatial, stats
from sklearn.metrics import roc_auc_score

from mnemoscope.contrast import SignFlips
from mnemoscope.statistics import (
    Estimate,
    Floats,
    auroc,
    cosine,
    half_of_groups,
    in_group_order,
    over_seeds,
    overlap,
    overlap_by_chance,
    proportion,
    rank_correlation,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_an_estimate_is_a_record() -> None:
    assert asdict(Estimate(0.5, 0.25, 0.75, 8)) == {"estimate": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    signs = [Estimate(0.0, *ends, 8).sign for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (math.nan, 1))]
    assert signs == [1, -1, 0, 0]
    assert Estimate(0.5, math.nan, math.nan, 8).known
    assert not Estimate.undefined(8).known


def test_proportion_agrees_with_a_bootstrap_written_as_a_loop() -> None:
    draw = rng(1)
    sizes = draw.integers(1, 8, size=30)
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    hits = draw.random(len(groups)) < np.repeat(draw.random(30), sizes)
    of_group = {name: [h for h, g in zip(hits, groups, strict=True) if g == name] for name in set(groups)}
    names, means = sorted(of_group), []
    for _ in range(4000):
        drawn = [hit for i in draw.integers(len(names), size=len(names)) for hit in of_group[names[i]]]
        means.append(float(np.mean(drawn)))
    result = proportion(hits, groups, rng(2))
    assert (result.estimate, result.n) == (pytest.approx(hits.mean()), len(groups))
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.015)


def test_proportion_covers_the_truth_with_dependent_examples() -> None:
    draw, covered = rng(4), 0
    groups = np.repeat(np.arange(40), 5)
    for _ in range(200):
        rate_of_group = draw.beta(1, 1, size=40)
        result = proportion(draw.random(200) < rate_of_group[groups], groups, draw)
        covered += result.low <= 0.5 <= result.high
    assert 178 <= covered <= 199  # 190 expected, less a little for 40 groups


@pytest.mark.parametrize("value", [0, 1])
def test_all_hits_alike_give_the_exact_interval_of_the_number_of_groups(value: int) -> None:
    groups = np.repeat(["a", "b", "c", "d", "e", "f", "g"], 20)
    result = proportion(np.full(140, value), groups, rng())
    exact = stats.binomtest(7 * value, 7).proportion_ci(0.95, method="exact")
    assert (result.low, result.high) == pytest.approx((exact.low, exact.high))
    assert (result.estimate, result.n) == (value, 140)


def test_paired_differences_reach_to_the_sides_they_can_take() -> None:
    up = 1 - 0.025 ** (1 / 5)
    unchanged = proportion(np.zeros(5), range(5), rng(), signed=True)
    assert (unchanged.low, unchanged.high) == pytest.approx((-up, up))
    worse = proportion(-np.ones(5), range(5), rng())
    assert (worse.low, worse.high) == pytest.approx((-1, -1 + up))
    differences = rng(5).choice([-1, 0, 1], p=[0.2, 0.5, 0.3], size=400)
    result = proportion(differences, np.arange(400), rng(6))
    half = 1.96 * differences.std() / 20
    assert (result.low, result.high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.012)


def test_what_has_no_interval_says_nan() -> None:
    assert math.isnan(proportion([], [], rng()).estimate)
    single = proportion([1, 0, 1, 1], ["a"] * 4, rng())
    assert (single.estimate, math.isnan(single.low), math.isnan(single.high)) == (0.75, True, True)
    balanced = proportion([1, 0, 1, 0, 1, 0], [1, 1, 2, 2, 3, 3], rng())  # every resample is exactly one half
    assert (balanced.estimate, math.isnan(balanced.low)) == (0.5, True)


def test_neither_undefined_hits_nor_the_order_of_rows_count() -> None:
    hits, groups = np.array([1, 0, 1, 1, 0, 1.0]), np.array([4, 1, 2, 1, 3, 0])
    with_gaps = proportion(np.append(hits, [math.nan] * 2), np.append(groups, [9, 1]), rng())
    assert with_gaps == proportion(hits, groups, rng())
    assert proportion([math.nan, math.nan], ["a", "b"], rng()).n == 0
    hits, groups, order = rng(7).random(90) < 0.3, np.repeat(np.arange(30), 3), rng(8).permutation(90)
    assert proportion(hits, groups, rng(1)) == proportion(hits[order], groups[order], rng(1))
    assert proportion(hits, groups, rng(1)) != proportion(hits, groups, rng(2))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="groups_N: length: 2; allowed is 3"):
        proportion([1, 0, 1], ["a", "b"], rng())
    with pytest.raises(ValueError, match="labels_N: length: 3; allowed is 2"):
        auroc([1, 2], [0, 1, 1], ["a", "b"], rng())


def test_over_seeds_is_students_t() -> None:
    values = [0.91, 0.84, 1.0, 0.97]
    result = over_seeds([Estimate(value, 0.0, 1.0, 10) for value in values])
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert result.estimate == pytest.approx(np.mean(values))
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high))
    assert result.high > 1  # not clipped
    assert result.n == 40


def test_over_seeds_with_few_or_undefined_seeds() -> None:
    only = Estimate(0.5, 0.4, 0.7, 12)
    assert over_seeds([only]) == only
    assert over_seeds([Estimate.undefined(3), only]) == only
    assert math.isnan(over_seeds([Estimate.undefined()] * 2).estimate)
    assert over_seeds([]).n == 0
    # Seeds that agree exactly do not look certain.
    result = over_seeds([Estimate(1, 0.8, 1, 10), Estimate(1, 0.6, 1, 5), Estimate(1, math.nan, math.nan, 1)])
    assert result == Estimate(1, 0.6, 1, 16)
    assert math.isnan(over_seeds([Estimate(1, math.nan, math.nan, 1)] * 2).low)


def test_auroc_interval_agrees_with_a_loop_over_scikit_learn() -> None:
    draw = rng(10)
    groups = np.repeat(np.arange(25), 4)
    labels = np.tile([0, 1, 0, 1], 25)
    scores = np.round(labels + 2 * np.repeat(draw.normal(size=25), 4) + draw.normal(size=100), 1)
    areas = []
    for _ in range(600):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in draw.integers(25, size=25)])
        areas.append(float(roc_auc_score(labels[rows], scores[rows])))
    result = auroc(scores, labels, groups, rng(11))
    assert result.estimate == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)  # also with ties
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=0.015)


def test_auroc_drops_resamples_without_both_classes() -> None:
    # Of three groups one is positive: most resamples lack a class, and those left have an area of 0, 1/2 or 1.
    result = auroc([0.0, 2.0, 1.0], [0, 0, 1], ["a", "b", "c"], rng())
    assert (result.estimate, result.low, result.high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("area", [0, 1])
def test_perfect_separation_does_not_look_certain(area: int) -> None:
    labels = np.tile([0, 1], 12)
    result = auroc(labels if area else -labels, labels, np.repeat(np.arange(12), 2), rng())
    exact = stats.binomtest(6 * area, 6).proportion_ci(0.95, method="exact")  # 12 groups make 6 disjoint comparisons
    assert result.estimate == area
    assert (result.low, result.high) == pytest.approx((exact.low, exact.high))


def test_auroc_without_an_answer() -> None:
    assert math.isnan(auroc([1.0, 2.0], [1, 1], [0, 1], rng()).estimate)
    assert auroc([], [], [], rng()).n == 0
    single = auroc([1.0, 2.0], [0, 1], ["a", "a"], rng())
    assert (single.estimate, math.isnan(single.low)) == (1, True)
    constant = auroc(np.zeros(8), [0, 1] * 4, range(8), rng())
    assert constant.estimate == 0.5
    assert math.isnan(constant.low)
    for scores, labels in (([1.0, math.nan], [0, 1]), ([1.0, 2.0], [-1, 1])):
        with pytest.raises(ValueError, match="allowed are scores with a rank and labels 0 and 1"):
            auroc(scores, labels, [0, 1], rng())


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


def test_group_order_keeps_groups_together_and_is_random() -> None:
    groups = rng(23).integers(0, 10, size=60)
    orders = [in_group_order(groups, rng(seed)) for seed in range(40)]
    for order in orders:
        assert sorted(order) == list(range(60))
        assert len(np.flatnonzero(np.diff(groups[order]))) == len(set(groups)) - 1
    first = {order[0] for order in orders}
    assert len(first) > len({groups[member] for member in first}) > 7
    assert len(in_group_order([], rng())) == 0


def test_halves_have_half_of_the_groups_whole() -> None:
    groups = [f"g{i}" for i in rng(24).integers(0, 9, size=50)]
    halves = [half_of_groups(groups, rng(seed)) for seed in range(60)]
    for half in halves:
        inside, outside = (set(np.array(groups)[side]) for side in (half, ~half))
        assert (len(inside), len(outside), inside & outside) == (4, 5, set())
    assert 10 < np.sum(halves, axis=0).min() <= np.sum(halves, axis=0).max() < 45
    assert not half_of_groups(["one", "one"], rng()).any()


def flips_of(differences_NLD: Floats, groups: list[str], permutations: int = 1000, seed: int = 0) -> SignFlips:
    flips = SignFlips.empty(differences_NLD.shape[1:], permutations, seed)
    flips.add(differences_NLD, groups)
    return flips


def names(count: int, size: int = 1) -> list[str]:
    return [f"group {i // size}" for i in range(count * size)]


@pytest.mark.parametrize("size", [1, 2])
def test_sign_flips_of_whole_groups_agree_with_exact_enumeration(size: int) -> None:
    differences = rng(14).normal(size=(8 * size, 2, 3)) + 0.7 * rng(15).random((2, 3))
    scale, totals = np.sqrt((differences**2).sum(axis=0)), differences.reshape(8, size, 2, 3).sum(axis=1)
    observed = np.abs(totals.sum(axis=0)) / scale - 1e-9
    all_signs = np.array(list(itertools.product([-1, 1], repeat=8)))
    statistics_of = np.abs(np.einsum("bn,nld->bld", all_signs, totals)) / scale
    exact, most = (statistics_of >= observed).mean(axis=0), statistics_of.max(axis=(1, 2))
    family_wise, per_neuron = flips_of(differences, names(8, size), permutations=20_000).p_values()
    np.testing.assert_allclose(per_neuron, exact, atol=0.015)  # four standard errors of 20,000 draws
    np.testing.assert_allclose(family_wise, (most[:, None, None] >= observed).mean(axis=0), atol=0.015)
    assert exact.min() < 0.1


def test_signs_are_fair_differ_by_seed_and_group_and_are_the_same_in_every_process() -> None:
    """Shards of different processes add up only if a hash, and no process's own seed, gives the signs."""
    one = np.ones((1, 1, 1))
    signs = np.array([flips_of(one, [f"g{i}"], 500, s).sums_BLD[:, 0, 0] for s in (0, 1) for i in range(40)])
    assert set(np.unique(signs)) == {-1, 1}
    agreement = (signs @ signs.T / 500)[np.triu_indices(80, k=1)]
    assert np.abs(agreement).max() < 5 / math.sqrt(500)
    assert abs(signs.mean()) < 4 / math.sqrt(signs.size)
    assert flips_of(one, ["Zoë"], 8, 3).sums_BLD[:, 0, 0].tolist() == [-1, 1, 1, -1, -1, -1, -1, -1]


def test_neurons_without_differences_are_not_significant() -> None:
    differences = np.ones((30, 1, 3))
    differences[:, 0, 1] = 0
    family_wise, per_neuron = flips_of(differences, names(30), 99).p_values()
    assert family_wise.tolist() == per_neuron.tolist() == [[0.01, 1.0, 0.01]]
    untouched = SignFlips.empty((1, 2))
    untouched.add(np.zeros((0, 1, 2)), [])
    assert np.isnan(untouched.p_values()).all()


def test_ties_count_as_extreme() -> None:
    # Two groups have four flips, of which two reach the observed sum exactly: p tends to 1/2 and never below.
    differences = np.array([0.1, 0.2, 0.7, 0.3])[:, None, None]
    _, per_neuron = flips_of(differences, ["a", "a", "a", "b"], 4000).p_values()
    assert per_neuron[0, 0] == pytest.approx(0.5, abs=0.04)
