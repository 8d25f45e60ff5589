"""Probes against scikit-learn's own pipeline and plain loops; the baselines by what they can and cannot learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mnemoscope.statistics import Floats
from mnemoscope.statistics.probes import (
    OF_STATES,
    LayerProbe,
    fit_layer_probes,
    input_features,
    repeat_features,
    share_right,
    shuffled,
)

Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def states(pairs: int, seed: int, layers: int = 3, neurons: int = 6) -> tuple[Floats, Labels, list[str]]:
    """Pairs of states in which layer l tells the labels apart by l standard deviations."""
    draw = np.random.default_rng(seed)
    labels = np.tile([1, 0], pairs)
    states_NLD = draw.normal(size=(2 * pairs, layers, neurons))
    states_NLD[:, :, 2] += np.arange(layers) * (labels[:, None] - 0.5)
    return states_NLD, labels, [f"pair {i // 2}" for i in range(2 * pairs)]


def test_a_layer_probe_is_scikit_learns_pipeline_in_the_raw_space() -> None:
    states_NLD, labels, _ = states(60, 0)
    raw = (states_NLD[:, 2] * [1, 100, 1e-3, 1, 5, 1] + [1e3, 0, 0, -7, 0, 0]).astype(np.float32)
    raw[:, 5] = 3  # a dead neuron
    for regularization in (0.01, 1.0):
        oracle = make_pipeline(StandardScaler(), LogisticRegression(C=regularization, max_iter=1000))
        oracle.fit(raw.astype(np.float64), labels)
        probe = LayerProbe(regularization)
        assert probe.fit(raw, labels) is probe
        np.testing.assert_allclose(probe.decision_function(raw), oracle.decision_function(raw), atol=1e-4)
    assert (probe.weights_D_.shape, probe.weights_D_[5]) == ((6,), 0)


def test_regularization_is_chosen_by_tune_accuracy_and_ties_go_to_the_strongest() -> None:
    fit, tune = states(20, 4, neurons=30), states(300, 5, neurons=30)
    probes = fit_layer_probes(*fit[:2], *tune[:2])
    for layer, probe in enumerate(probes):
        by_hand = {
            c: share_right(LayerProbe(c).fit(fit[0][:, layer], fit[1]).decision_function(tune[0][:, layer]), tune[1])
            for c in OF_STATES
        }
        best = max(by_hand.values())
        assert len(set(by_hand.values())) > 1
        assert probe.regularization == min(c for c in OF_STATES if by_hand[c] == best)
    separable = np.where(fit[1] == 1, 5.0, -5.0)[:, None, None] + fit[0]
    assert fit_layer_probes(separable, fit[1], separable, fit[1])[0].regularization == 0.001


def test_input_features_by_a_plain_loop() -> None:
    prompts = [[1, 4, 1, 0], [], [3], [2, 2, 2, 2, 0]]
    vocabulary, positions = 5, 3
    expected = np.zeros((4, vocabulary * (1 + positions)))
    for row, prompt in enumerate(prompts):
        for token in prompt:
            expected[row, token] += 1
        for from_end, token in enumerate(reversed(prompt)):
            if from_end < positions:
                expected[row, vocabulary * (1 + from_end) + token] = 1
    features = input_features(prompts, vocabulary, positions)
    assert (features.toarray() == expected).all()
    assert input_features(prompts[2:3], vocabulary).shape == (1, vocabulary * 65)  # whatever the prompts' lengths
    assert input_features([], vocabulary).shape == (0, vocabulary * 65)
    for outside, message in (([0, 5], "0 to 5"), ([2, -1], "-1 to 2")):
        with pytest.raises(ValueError, match=f"token_ids: {message}; allowed is 0 to 4"):
            input_features([outside], vocabulary)


def test_repeat_features_by_a_plain_loop() -> None:
    prompts = [[1, 4, 1, 0, 1], [], [3], [2, 2, 5, 6, 7, 8, 2], [9, 8, 9]]
    positions = 4
    expected = np.zeros((5, positions * positions))
    for row, prompt in enumerate(prompts):
        for place, token in enumerate(prompt):
            from_end, before = len(prompt) - 1 - place, [p for p in range(place) if prompt[p] == token]
            if before and from_end < positions:
                expected[row, positions * from_end + min(place - before[-1], positions) - 1] = 1
    assert (repeat_features(prompts, positions).toarray() == expected).all()
    assert expected.sum() == 4
    assert repeat_features([[], []]).shape == (2, 64 * 64)


def test_shuffling_swaps_whole_pairs_half_of_the_time() -> None:
    labels = np.tile([1, 0], 500)
    pair_ids = np.array([f"pair {i // 2}" for i in range(1000)])
    order = np.random.default_rng(10).permutation(1000)
    result = shuffled(labels[order], pair_ids[order], np.random.default_rng(11))
    swapped = np.empty(1000, dtype=bool)
    swapped[order] = result != labels[order]
    assert result.sum() == 500
    assert (swapped[::2] == swapped[1::2]).all()
    assert swapped.mean() == pytest.approx(0.5, abs=0.1)
    assert (labels == np.tile([1, 0], 500)).all()  # the argument is untouched


def test_labels_that_cannot_be_learned_from_are_refused() -> None:
    states_ND = np.random.default_rng(16).normal(size=(4, 2))
    with pytest.raises(ValueError, match="class"):
        LayerProbe().fit(states_ND, [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"labels: \[-1\]; allowed are 0 and 1"):
        LayerProbe().fit(states_ND, [1, -1, 1, -1])
    with pytest.raises(ValueError, match="states_ND: a value is infinite or NaN"):
        LayerProbe().fit(states_ND * np.nan, [1, 0, 1, 0])
    with pytest.raises(ValueError, match="empty"):
        fit_layer_probes(states_ND[:, None], [1, 0, 1, 0], np.zeros((0, 1, 2)), [])
    with pytest.raises(ValueError, match="labels_N: pair b does not have as many 1 as 0"):
        shuffled([1, 0, 1, 1], ["a", "a", "b", "b"], np.random.default_rng(0))
    with pytest.raises(ValueError, match="pair_ids_N: 1 values; allowed is 2"):
        shuffled([1, 0], ["a"], np.random.default_rng(0))
