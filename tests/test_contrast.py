"""The contrast against scipy on small cases, and by algebra: sharding, planted neurons, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy import stats

from mnemoscope.statistics import Floats
from mnemoscope.statistics.contrast import ARRAYS, Contrast, ContrastAccumulator

FIELDS = ("nmd_LD", "rho_LD", "effect_size_LD", "p_family_wise_LD", "p_false_discovery_LD", "state_norm_L")


def states(pairs: int, layers: int = 2, neurons: int = 4, seed: int = 0) -> tuple[Floats, Floats]:
    draw = np.random.default_rng(seed)
    shared = draw.normal(size=(pairs, layers, neurons))
    generalized, memorized = shared + draw.normal(size=(2, pairs, layers, neurons))
    return generalized + 0.3, memorized


def contrast_of(
    generalized: Floats, memorized: Floats, groups: list[str] | None = None, permutations: int = 200
) -> Contrast:
    _, layers, neurons = generalized.shape
    accumulator = ContrastAccumulator.empty("block", layers, neurons, permutations)
    accumulator.add(generalized, memorized, groups or [f"g{i}" for i in range(len(generalized))])
    return accumulator.result()


def test_every_statistic_agrees_with_scipy() -> None:
    generalized, memorized = states(30)
    accumulator = ContrastAccumulator.empty("block", 2, 4, permutations=200)
    accumulator.add(generalized, memorized, [f"g{i // 2}" for i in range(30)])
    contrast, (family_wise, per_neuron) = accumulator.result(), accumulator.p_values()
    assert (contrast.p_family_wise_LD == family_wise).all()
    assert (family_wise >= per_neuron).all()
    q = stats.false_discovery_control(per_neuron.ravel()).reshape(2, 4)
    np.testing.assert_allclose(contrast.p_false_discovery_LD, q)
    assert (contrast.site, contrast.pairs, contrast.groups) == ("block", 30, 15)
    labels = np.repeat([1.0, -1.0], 30)
    for layer, neuron in np.ndindex(2, 4):
        g, m = generalized[:, layer, neuron], memorized[:, layer, neuron]
        both = np.concatenate([g, m])
        assert contrast.nmd_LD[layer, neuron] == pytest.approx((g - m).mean())
        assert contrast.rho_LD[layer, neuron] == pytest.approx(stats.pearsonr(both, labels).statistic)
        assert contrast.effect_size_LD[layer, neuron] == pytest.approx(stats.ttest_rel(g, m).statistic / math.sqrt(30))
        assert np.cov(both, labels, ddof=0)[0, 1] == pytest.approx(contrast.nmd_LD[layer, neuron] / 2)
    norms = np.linalg.norm(np.concatenate([generalized, memorized]), axis=2)
    np.testing.assert_allclose(contrast.state_norm_L, np.sqrt((norms**2).mean(axis=0)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_contrasts_do_not_depend_on_sharding_or_order(data: st.DataObject) -> None:
    """Merged shards against the whole, and their moments against two passes in extended precision."""
    pairs = data.draw(st.integers(1, 25), label="pairs")
    offset, scale = data.draw(st.sampled_from([(0.0, 1.0), (1e4, 1.0), (-1e4, 1e3), (1e4, 1e-3)]), label="at")
    seed = data.draw(st.integers(0, 99), label="seed")
    generalized, memorized = (offset + scale * side for side in states(pairs, seed=seed))
    groups = [f"g{i}" for i in data.draw(st.lists(st.integers(0, 5), min_size=pairs, max_size=pairs), label="groups")]
    order = np.array(data.draw(st.permutations(range(pairs)), label="order"))
    cuts = sorted(data.draw(st.lists(st.integers(0, pairs), max_size=6), label="cuts"))
    shards = []
    for rows in np.split(order, cuts):  # some are empty
        shard = ContrastAccumulator.empty("mlp", 2, 4, permutations=40)
        shard.add(generalized[rows], memorized[rows], [groups[i] for i in rows])
        shards.append(shard)
    while len(shards) > 1:  # any tree of merges
        other = shards.pop(data.draw(st.integers(0, len(shards) - 1), label="which"))
        shards[data.draw(st.integers(0, len(shards) - 1), label="into")].merge(other)
    moments, merged, whole = shards[0].moments, shards[0].result(), contrast_of(generalized, memorized, groups, 40)

    series = [x.astype(np.longdouble) for x in (generalized, memorized)]
    series.append(series[0] - series[1])
    np.testing.assert_allclose(moments.means_2LD, [x.mean(axis=0) for x in series[:2]], rtol=1e-9, atol=1e-9 * scale)
    # A state of 1e4 and a bit holds the bit to 2e-12 only, whichever way its square is computed.
    held = 4e-9 * pairs * scale**2 + 4e-15 * pairs * scale * abs(offset)
    squares = [((x - x.mean(axis=0)) ** 2).sum(axis=0) for x in series]
    np.testing.assert_allclose(moments.squares_3LD, np.array(squares, dtype=np.float64), rtol=1e-9, atol=held)
    assert (merged.pairs, merged.groups) == (pairs, len(set(groups)))
    for name in FIELDS if scale >= 1 else ("p_family_wise_LD",):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("groups", "size"), [(80, 1), (20, 4)])
def test_shuffled_labels_rarely_have_a_significant_neuron(groups: int, size: int) -> None:
    """At most 18 of 200 shuffles report any neuron: the 99.5th percentile of a test that holds its level of 5 %."""
    draw, names, significant = np.random.default_rng(17), np.repeat(np.arange(groups), size), [0, 0]
    for seed in range(200):
        shared = draw.normal(size=(groups, 2, 4))[names]  # pairs of one name have much in common
        differences, nothing = shared + 0.5 * draw.normal(size=shared.shape), np.zeros_like(shared)
        for grouped in (True, False):
            accumulator = ContrastAccumulator.empty("block", 2, 4, permutations=199, seed=seed)
            accumulator.add(differences, nothing, [f"g{n if grouped else i}" for i, n in enumerate(names)])
            significant[grouped] += bool((accumulator.result().p_family_wise_LD <= 0.05).any())
    assert significant[True] <= 18
    assert significant[True] >= 2  # a test that never speaks holds its level as well
    assert significant[False] > 60 or size == 1  # what ignoring the groups would claim


def test_what_does_not_vary_has_no_correlation() -> None:
    generalized, memorized = states(20, seed=3)
    generalized[:, 0, 0] = memorized[:, 0, 0] = 0.1  # constant
    generalized[:, 0, 1] = memorized[:, 0, 1] + 0.7  # constant difference, up to rounding
    generalized[:, 0, 2], memorized[:, 0, 2] = 1, -1  # the label itself
    contrast = contrast_of(generalized, memorized)
    assert np.isnan(contrast.rho_LD).tolist() == [[True, False, False, False], [False] * 4]
    assert np.isnan(contrast.effect_size_LD).tolist() == [[True, True, True, False], [False] * 4]
    assert contrast.rho_LD[0, 2] == 1
    assert contrast.p_family_wise_LD[0, 0] == 1
    assert not contrast.top_neurons(7 / 8)[0, 0]


def test_no_pairs_and_one_pair() -> None:
    nothing = ContrastAccumulator.empty("block", 2, 3).result()
    assert (nothing.pairs, nothing.groups) == (0, 0)
    assert all(np.isnan(getattr(nothing, name)).all() for name in FIELDS)
    one = contrast_of(*states(1))
    assert np.isnan(one.effect_size_LD).all()
    np.testing.assert_allclose(np.abs(one.rho_LD), 1)


def test_top_neurons_counts_over_all_layers_and_breaks_ties_by_index() -> None:
    rho = np.array([[0.1, -0.9, 0.5, math.nan, 0.5], [0.5, 0.2, 0.0, 0.0, -0.5]])
    contrast = replace(contrast_of(*states(4, neurons=5)), rho_LD=rho)
    assert np.flatnonzero(contrast.top_neurons(0.3)).tolist() == [1, 2, 4]
    assert np.flatnonzero(contrast.top_neurons(0.31)).tolist() == [1, 2, 4, 5]
    assert np.flatnonzero(contrast.top_neurons(1e-9)).tolist() == [1]
    hundred = replace(contrast, rho_LD=np.arange(100.0).reshape(4, 25))
    assert hundred.top_neurons(0.07).sum() == 7  # 0.07 * 100 is a little more than 7 in floating point
    for top in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"top: .*; allowed is a share of the neurons in \(0, 1\]"):
            contrast.top_neurons(top)


def test_what_cannot_be_averaged_or_merged_is_refused_and_leaves_nothing_behind() -> None:
    accumulator = ContrastAccumulator.empty("block", 2, 4, permutations=10, seed=0)
    generalized, memorized = states(3)
    broken = memorized.copy()
    broken[1, 1, 1] = math.inf
    for states_PLD, groups, message in (
        (memorized, ["a", "b"], "groups: length: 2; allowed is 3"),
        (memorized[:, :1], ["a", "b", "c"], r"states_memorized: shape: \(3, 1, 4\); allowed is \(3, 2, 4\)"),
        (memorized[:1], ["a", "b", "c"], "states_memorized: number of pairs: 1; allowed is 3"),
        (broken, ["a", "b", "c"], "states_memorized: a value is infinite or NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            accumulator.add(generalized, states_PLD, groups)
    others = (("mlp", 2, 4, 10, 0), ("block", 4, 2, 10, 0), ("block", 2, 4, 11, 0), ("block", 2, 4, 10, 1))
    for site, layers, neurons, permutations, seed in others:
        other = ContrastAccumulator.empty(site, layers, neurons, permutations, seed)
        other.add(np.ones((1, layers, neurons)), np.zeros((1, layers, neurons)), ["a"])
        with pytest.raises(ValueError, match="allowed"):
            accumulator.merge(other)
    assert (accumulator.moments.count, accumulator.sums_BLD.any(), len(accumulator.groups)) == (0, False, 0)
    with pytest.raises(ValueError, match="permutations: 0; allowed is 1 or more"):
        ContrastAccumulator.empty("block", 2, 4, permutations=0)


def test_a_saved_contrast_comes_back_and_equal_contrasts_are_equal_files(tmp_path: Path) -> None:
    generalized, memorized = states(20, seed=4)
    generalized[:, 0, 0] = memorized[:, 0, 0] = 0
    contrast = contrast_of(generalized, memorized)
    contrast.save(tmp_path / "contrast.safetensors")
    loaded = Contrast.load(tmp_path / "contrast.safetensors")
    assert (loaded.site, loaded.pairs, loaded.groups) == ("block", 20, 20)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(contrast, name))  # NaN equals NaN here
    assert set(load_file(tmp_path / "contrast.safetensors")) == set(ARRAYS)  # the library reads our header
    first = (tmp_path / "contrast.safetensors").read_bytes()
    for _ in range(12):
        contrast.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == first


GOOD = {name: np.zeros((2, 3)) for name in ARRAYS[:-1]} | {"state_norm": np.zeros(2)}
METADATA = {"site": "block", "pairs": "4", "groups": "2"}


def test_a_file_that_is_no_contrast_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "contrast.safetensors"
    with pytest.raises(FileNotFoundError):
        Contrast.load(path)
    save_file(GOOD, path, METADATA)
    assert Contrast.load(path).pairs == 4
    good, contents = path.read_bytes(), []
    for arrays, metadata in (
        ({name: array for name, array in GOOD.items() if name != "rho"}, METADATA),
        (GOOD, None),
        (GOOD, METADATA | {"pairs": "many"}),
        (GOOD, METADATA | {"digest": "0" * 64}),
        (GOOD, METADATA | {"digess": "0" * 64}),  # one bit away
        (GOOD | {"rho": np.zeros((3, 2))}, METADATA),
        (GOOD | {"state_norm": np.zeros(3)}, METADATA),
        (GOOD | {"nmd": np.zeros((2, 3), dtype=np.float32)}, METADATA),
    ):
        save_file(arrays, path, metadata)
        contents.append(path.read_bytes())
    header = json.dumps({"nmd": "?"}).encode()
    contents += [b"", good[:5], good[:60], good[:-8], b"\xff" * 200, len(header).to_bytes(8, "little") + header]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable contrast file") as caught:
            Contrast.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
