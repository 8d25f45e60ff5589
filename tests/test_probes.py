"""Probes against scikit-learn's own pipeline and plain loops; the baselines; what the probes stage scores and reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import GPT2LMHeadModel

from helpers import mini_examples
from mnemoscope.behaviour import Asking, encode, read_states
from mnemoscope.config import ProbesConfig, load_study
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
from mnemoscope.study.cells import Cell, cells_of
from mnemoscope.study.stages import probe as stage
from mnemoscope.study.stages.common import cell_model
from mnemoscope.study.stages.probe import SHUFFLES, phrasings, probes_stage, readable_offsets
from mnemoscope.study.stages.train import pairs_stage

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
    result = shuffled(500, np.random.default_rng(11))
    swapped = result != np.tile([1, 0], 500)
    assert result.sum() == 500
    assert (swapped[::2] == swapped[1::2]).all()
    assert swapped.mean() == pytest.approx(0.5, abs=0.1)


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


TABLES = ("probes", "learning", "halves")


def pair_table(pairs: int) -> pd.DataFrame:
    rows: dict[str, Any] = {"item": [f"i{n}" for n in range(pairs)], "group": [f"g{n // 2}" for n in range(pairs)]}
    rows |= {"split": "fit", "memorized": "7", "generalized": "12", "is_pair": True}
    for letter, behaviours in (("a", ("generalized", "memorized")), ("b", ("memorized", "generalized"))):
        rows[f"behaviour_{letter}"] = [behaviours[n % 2] for n in range(pairs)]
        rows[f"prompt_{letter}"] = [f"{n} {behaviours[n % 2]}" for n in range(pairs)]
        rows[f"family_{letter}"] = letter
    return pd.DataFrame(rows)


def test_the_side_answered_generalized_comes_first_and_the_cap_is_drawn_at_random() -> None:
    table = pair_table(30)
    table.loc[3, "is_pair"] = False
    table.loc[4, "split"] = "test"
    part = phrasings(table, "fit", 100, np.random.default_rng(0))
    assert len(part) == 56
    assert [e.prompt.split()[1] for e in part] == ["generalized", "memorized"] * 28
    assert [e.group for e in part[::2]] == [f"g{n // 2}" for n in range(30) if n not in (3, 4)]
    few = [phrasings(table, "fit", 10, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert [len(part) for part in few] == [20] * 3
    assert few[0] == few[1] != few[2]
    places = [int(e.prompt.split()[0]) for e in few[0]]
    assert places == sorted(places)
    assert max(places) > 10


def test_offsets_that_the_shortest_prompt_lacks_are_dropped(mini: Callable[[str], Asking]) -> None:
    asking, examples = mini("addition"), mini_examples("addition", 60)
    shortest = min(len(encoded.context) for encoded in encode(asking, examples))
    assert readable_offsets(asking, (16, 0, shortest, shortest - 1, 1), examples) == [0, 1, shortest - 1]
    for offsets, message in (((1, 2), "lack 0"), ((0, 2, 2), "there twice")):
        with pytest.raises(ValueError, match=message):
            ProbesConfig(offsets=offsets)


@pytest.fixture(scope="module")
def cell(mini_run: Path) -> Cell:
    """The cell of the miniature run."""
    return cells_of(load_study(str(mini_run / "study.yaml")), mini_run)[0]


@pytest.fixture(scope="module")
def tables(cell: Cell) -> dict[str, pd.DataFrame]:
    return {name: pd.read_parquet(cell.records / f"{name}.parquet") for name in ("pairs", *TABLES)}


def test_every_kind_scores_the_same_test_states(cell: Cell, tables: dict[str, pd.DataFrame]) -> None:
    pairs, probes = tables["pairs"], tables["probes"]
    test = pairs[pairs.is_pair & (pairs.split == "test")]
    groups = np.repeat(test.group.to_numpy(), 2)
    offsets = sorted(probes.offset.unique())
    assert offsets == sorted(cell.config.probes.offsets)  # all are within "12+34="
    kinds = {("state", layer, offset): 1 for layer in (0, 1) for offset in offsets}
    kinds |= {("shuffled", layer, 0): SHUFFLES for layer in (0, 1)}
    kinds |= {(kind, -1, 0): 1 for kind in ("input_only", "input_repeats", "entropy", "top_gap")}
    found = dict(iter(probes.groupby(["kind", "layer", "offset"])))
    assert set(found) == set(kinds)
    for key, times in kinds.items():
        assert (found[key].group.to_numpy() == np.tile(groups, times)).all()
        assert (found[key].label.to_numpy() == np.tile([1, 0], len(test) * times)).all()
    assert np.isfinite(probes.score).all()


def test_saved_probes_and_one_number_baselines_give_the_scores_of_the_table(
    cell: Cell, tables: dict[str, pd.DataFrame]
) -> None:
    """A baseline's direction was learned elsewhere: its scores are no numbers that were turned the right way round."""
    saved = json.loads((cell.folder / "probe.json").read_text())
    test = phrasings(tables["pairs"], "test", 10_000, np.random.default_rng(0))
    states, probes = read_states(cell_model(cell), test, "block"), tables["probes"]
    for layer, probe in enumerate(saved["layers"]):
        scores_N = states.at_decision_NLD[:, layer] @ np.array(probe["weights"]) + probe["bias"]
        recorded = probes.query("kind == 'state' and offset == 0 and layer == @layer").score
        np.testing.assert_allclose(recorded, scores_N, atol=1e-4)
    accuracies = [probe["tune_accuracy"] for probe in saved["layers"]]
    assert saved["best_layer"] == int(np.argmax(accuracies))
    for column, kind in enumerate(("entropy", "top_gap")):
        number_N, scores_N = states.uncertainty_N2[:, column], probes.score[probes.kind == kind].to_numpy()
        slope, at_zero = np.polyfit(number_N, scores_N, 1)
        np.testing.assert_allclose(scores_N, at_zero + slope * number_N, atol=1e-4)


def test_the_learning_curve_ends_at_the_probe_and_the_contrast(cell: Cell, tables: dict[str, pd.DataFrame]) -> None:
    learning, pairs = tables["learning"], tables["pairs"]
    fit = pairs[pairs.is_pair & (pairs.split == "fit")]
    layer = json.loads((cell.folder / "probe.json").read_text())["best_layer"]
    sizes = [size for size in cell.config.probes.learning if size < len(fit)]
    assert sorted(learning.pairs.unique()) == [*sizes, len(fit)]
    whole = learning[learning.pairs == len(fit)].set_index(["what", "layer"])
    best = tables["probes"].query("kind == 'state' and offset == 0 and layer == @layer")
    accuracy = ((best.score > 0) == (best.label == 1)).mean()
    assert whole.value["accuracy", layer] == pytest.approx(accuracy)
    assert [whole.value["nmd_cosine", each] for each in (layer, -1)] == pytest.approx([1, 1])
    assert (whole.n["accuracy", layer], set(whole.groups)) == (len(best), {fit.group.nunique()})
    few = learning[learning.pairs == min(sizes)]
    assert sorted(few.draw.unique()) == list(range(cell.config.probes.learning_draws))
    assert few[few.what == "nmd_cosine"].value.between(-1, 0.999).all()


def planted_cell() -> tuple[Any, np.ndarray, list[str]]:
    """A cell's settings, and fit states whose first layer tells the labels apart and whose second is noise."""
    draw = np.random.default_rng(3)
    signs = np.tile([1, -1], 400)[:, None]
    effect = np.where(np.arange(50) % 5 == 0, 0.8, 0.0)
    states_NLD = draw.normal(size=(800, 2, 50))
    states_NLD[:, 0] += signs * effect
    settings = SimpleNamespace(probes=ProbesConfig(halvings=6), pairs=SimpleNamespace(site="block"))
    return SimpleNamespace(seed=0, config=settings), states_NLD, [f"g{n // 4}" for n in range(400)]


def test_halves_of_planted_neurons_agree_and_halves_of_noise_do_not() -> None:
    halves = pd.DataFrame(stage.halves_rows(*planted_cell()))
    by = halves.fillna({"top": 0}).groupby(["what", "layer", "top"]).value.mean()
    for what, least in (("nmd_cosine", 0.95), ("rho_rank_correlation", 0.4)):
        assert by[what, 0, 0] > least
        assert abs(by[what, 1, 0]) < 0.25
    assert by["overlap", -1, 0.1] == 1  # the ten planted neurons
    inside = halves[(halves.what == "overlap_in_layers") & (halves.top == 0.1)]
    np.testing.assert_allclose(inside.chance, 10 / 50)  # all in one layer of fifty
    assert not list(stage.halves_rows(planted_cell()[0], planted_cell()[1], ["one"] * 400))


def copied(cell: Cell, folder: Path) -> Cell:
    """The same cell with its model and configuration, and none of its records."""
    copy = replace(cell, folder=folder)
    copy.records.mkdir(parents=True)
    (copy.folder / "model").symlink_to((cell.folder / "model").resolve())
    return copy


def test_what_mining_has_read_probes_do_not_read_again(
    cell: Cell, tables: dict[str, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = cell.config.probes.model_copy(update={"offsets": (0,)})
    copy = replace(copied(cell, tmp_path / "cell"), config=cell.config.model_copy(update={"probes": probes}))
    passes: list[object] = []
    forward = GPT2LMHeadModel.forward

    @wraps(forward)  # whose signature says that it has a cache
    def counted(*args: object, **named: object) -> object:
        passes.append(args)
        return forward(*args, **named)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", counted)
    pairs_stage(copy, lambda *_: None)
    mined = len(passes)
    probes_stage(copy, lambda *_: None)
    assert len(passes) == mined > 0
    again, before = pd.read_parquet(copy.records / "probes.parquet"), tables["probes"].query("offset == 0")
    pd.testing.assert_frame_equal(again, before.reset_index(drop=True), atol=2e-3, rtol=1e-2)
    assert not (cell.folder / "states").exists(), "what a finished study has read is not kept"
