"""Paired tests by group and their correction: by hand, by enumeration, and under the null."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mnemoscope.statistics import holm, sign_flips

RNG = np.random.default_rng(0)


def test_few_groups_are_tried_in_full() -> None:
    groups = np.repeat(np.arange(6), 2)
    values = np.repeat([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2)
    assert sign_flips(values, groups, RNG) == pytest.approx(2 / 64)  # all signs as observed, or all the other way
    values[:2] = -1
    # A sum of at least 4 in size: at most one group against the others.
    assert sign_flips(values, groups, RNG) == pytest.approx(14 / 64)


def test_groups_flip_together_and_ties_count_for_nothing() -> None:
    groups = np.repeat(np.arange(8), 10)
    values = np.tile(np.r_[np.ones(5), -np.ones(5)], 8)  # cancels within each group
    assert sign_flips(values, groups, RNG) == 1.0
    assert sign_flips(np.zeros(80), groups, RNG) == 1.0
    assert math.isnan(sign_flips(np.ones(5), np.arange(5), RNG))
    assert math.isnan(sign_flips([], [], RNG))
    with_nan = np.r_[np.ones(6), math.nan]
    assert sign_flips(with_nan, np.arange(7), RNG) == sign_flips(np.ones(6), np.arange(6), RNG)


def test_random_flips_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(1)
    values, groups = rng.normal(0.4, 1, 40), np.arange(40) // 3
    exact = sign_flips(values, groups, rng)
    sums = np.bincount(groups, weights=values)
    drawn = np.abs(rng.choice((-1.0, 1.0), size=(40_000, len(sums))) @ sums) >= abs(sums.sum())
    assert exact == pytest.approx(drawn.mean(), abs=0.01)
    many = np.r_[values, rng.normal(0.4, 1, 40)]
    assert 0 < sign_flips(many, np.arange(80) // 3, rng) < 0.2


def test_under_the_null_small_values_are_rare() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(16), 3)
    found = []
    for _ in range(400):
        of_group = np.repeat(rng.normal(size=16), 3)
        found.append(sign_flips(of_group + rng.normal(size=48), groups, rng, flips=199))
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_holm_by_hand() -> None:
    adjusted = holm([0.01, 0.04, 0.03, math.nan, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, math.nan, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    assert holm([]).tolist() == []
