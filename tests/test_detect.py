"""Detectors: calibrated where there is something to know, silent where there is nothing; gates inside generation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from families import prompts, tiny, tokenizer
from helpers import hook_count, mini_examples
from mnemoscope.behaviour import Asking, prepare, score, states_at_the_end
from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import Card, SteeringVector, Toward
from mnemoscope.interventions.detect import Detector, Observed, Reading, fit_detectors
from mnemoscope.interventions.sources import with_prefixes
from mnemoscope.models import Site, cache_of, load_model, pass_inputs, site_width
from mnemoscope.runs.errors import InputError

LAYERS, NEURONS = 3, 32  # those of the tiny models


def drawn(n: int, seed: int, strength: float = 1.5) -> Observed:
    """Behaviours that follow the third neuron of layer 1 with known odds, and prompts without a conflict elsewhere."""
    rng = np.random.default_rng(seed)
    states_NLD = rng.standard_normal((n, LAYERS, NEURONS))
    followed_N = np.where(rng.random(n) < expit(strength * states_NLD[:, 1, 2]), "memorized", "generalized")
    followed_N = followed_N.astype(object)
    bare_N = rng.random(n) < 0.2
    states_NLD[bare_N, :, 5] += 6.0
    followed_N[bare_N] = "neither"
    return Observed(states_NLD, followed_N)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return fit_detectors(drawn(1500, 0), drawn(800, 1))[0]


def test_probabilities_are_those_that_the_behaviour_was_drawn_with(detector: Detector) -> None:
    fresh = drawn(4000, 2)
    reading = detector.read(fresh.states_NLD)
    assert reading.layer == 1
    conflict_N = fresh.followed_N != "neither"
    true_N = expit(1.5 * fresh.states_NLD[:, 1, 2])
    assert np.abs(reading.p_memorized - true_N)[conflict_N].mean() < 0.06
    # Reliable: of those with about p, about p memorized.
    memorized_N = fresh.followed_N == "memorized"
    for low in np.arange(0.1, 0.9, 0.2):
        inside_N = conflict_N & (reading.p_memorized >= low) & (reading.p_memorized < low + 0.2)
        assert abs(memorized_N[inside_N].mean() - reading.p_memorized[inside_N].mean()) < 0.07
    alone = detector.read_verdict(fresh.states_NLD[:, 1])
    for name in ("p_memorized", "p_conflict", "distance"):
        np.testing.assert_allclose(getattr(alone, name), getattr(reading, name))


def test_a_second_detector_reads_the_best_layer_up_to_a_limit(detector: Detector) -> None:
    fit, tune = drawn(600, 0), drawn(400, 1)
    assert fit_detectors(fit, tune, below=-1)[1] is None
    for below, layer in ((0, 0), (1, 1), (2, 1)):
        best, lower = fit_detectors(fit, tune, below=below)
        assert lower is not None
        assert (best.layer, lower.layer) == (1, layer)
        np.testing.assert_array_equal(best.weights_LD, lower.weights_LD)


def test_few_prompts_do_not_make_it_too_sure() -> None:
    """Calibrated on eight prompts of either behaviour; plain labels give probabilities of 0 and 1."""
    losses, fresh = [], drawn(2000, 99, 4.0)
    conflict_N = fresh.followed_N != "neither"
    truth_N = (fresh.followed_N == "memorized")[conflict_N]
    for seed in range(5):
        tune = drawn(60, 100 + seed, 4.0)
        rows = np.concatenate([np.flatnonzero(tune.followed_N == name)[:8] for name in ("memorized", "generalized")])
        few = Observed(tune.states_NLD[rows], tune.followed_N[rows])
        p_N = fit_detectors(drawn(400, seed, 4.0), few)[0].read(fresh.states_NLD).p_memorized[conflict_N]
        losses.append(-np.log(np.where(truth_N, p_N, 1 - p_N)).mean())
    assert np.mean(losses) < 0.45


def test_where_there_is_nothing_to_know_it_says_the_base_rate() -> None:
    rng = np.random.default_rng(3)

    def blind(n: int) -> Observed:
        followed_N = np.where(rng.random(n) < 0.7, "memorized", "generalized").astype(object)
        return Observed(rng.standard_normal((n, LAYERS, NEURONS)), followed_N)

    reading = fit_detectors(blind(1000), blind(1000))[0].read(blind(500).states_NLD)
    assert abs(reading.p_memorized.mean() - 0.7) < 0.05
    assert reading.p_memorized.std() < 0.08
    assert np.isnan(reading.p_conflict).all()  # no prompt without a conflict was seen


def test_it_separates_conflicts_from_other_questions_and_marks_what_is_unlike_both(detector: Detector) -> None:
    fresh = drawn(1000, 4)
    reading = detector.read(fresh.states_NLD)
    assert ((reading.p_conflict > 0.5) == (fresh.followed_N != "neither")).mean() > 0.98
    assert reading.unlike.mean() < 0.04
    away_NLD = fresh.states_NLD.copy()
    away_NLD[:, 1, 7] += 9.0
    assert detector.read(away_NLD).unlike.mean() > 0.98


def test_few_other_prompts_beside_many_conflicts_are_told_as_well() -> None:
    """Twenty of one kind beside four hundred of the other, a spread and a half apart in one neuron."""

    def observed(seed: int, others: int) -> Observed:
        rng = np.random.default_rng(seed)
        states_NLD, labels = rng.normal(size=(400 + others, 1, 8)), np.array(["memorized", "generalized"] * 200)
        states_NLD[:400:2, 0, 1] += 2.0
        states_NLD[400:, 0, 0] += 3.0
        return Observed(states_NLD, np.r_[labels, ["neither"] * others].astype(object))

    found, _ = fit_detectors(observed(0, 20), observed(1, 20))
    told_N = found.read(observed(2, 400).states_NLD).p_conflict < 0.5
    assert told_N[400:].mean() > 0.85
    assert told_N[:400].mean() < 0.15
    few = Observed(np.zeros((9, 1, 2)), np.array(["memorized"] * 9, dtype=object))
    with pytest.raises(InputError, match="fit: 0 prompts were answered generalized; at least 8 are needed"):
        fit_detectors(few, few)


def test_a_gate_acts_on_the_other_behaviour_in_a_conflict_that_is_known() -> None:
    p_NL = np.array([[0.9], [0.9], [0.9], [0.2], [0.6]])
    reading = Reading(0, p_NL, np.array([0.9, 0.1, math.nan, 0.9, 0.9]), np.array([0.5, 0.5, 0.5, 0.5, 1.5]))
    assert reading.acts("generalized", 0.5).tolist() == [True, False, True, False, False]
    assert reading.acts("memorized", 0.5).tolist() == [False, False, False, True, False]
    assert reading.acts("generalized", 0.95).tolist() == [False] * 5


def test_readable_from_is_the_first_layer_that_stays_sure() -> None:
    p_NL = np.array([[0.9, 0.6, 0.8, 0.9], [0.5, 0.2, 0.1, 0.05], [0.5, 0.5, 0.5, 0.6], [0.9, 0.9, 0.9, 0.9]])
    assert Reading(3, p_NL, np.zeros(4), np.zeros(4)).readable_from == [2, 1, None, 0]


def test_saved_and_loaded_it_reads_the_same(detector: Detector, tmp_path: Path) -> None:
    model, words, path = tiny("gpt2"), tokenizer(), str(tmp_path / "detector.safetensors")
    replace(detector, task="mine").bound_to(model, words).save(path)
    found = Detector.load(path, model, words)
    states_NLD = drawn(20, 7).states_NLD
    assert np.array_equal(found.read(states_NLD).p_memorized_by_layer, detector.read(states_NLD).p_memorized_by_layer)
    assert found.task == "mine"
    with pytest.raises(InputError, match="model_type: the detector was made on gpt2, this model has llama"):
        Detector.load(path, tiny("llama"), words)
    parts = (Observed(part.states_NLD[..., :12], part.followed_N) for part in (drawn(300, 8), drawn(300, 9)))
    fit_detectors(*parts)[0].save(path)
    with pytest.raises(InputError, match=r"it reads \(3, 12\) layers and neurons, this model has \(3, 32\)"):
        Detector.load(path, model, words, force=True)


def test_a_card_keeps_what_is_undefined(detector: Detector, tmp_path: Path) -> None:
    """Of few test groups there is no interval; JSON has null for it."""
    path = tmp_path / "detector.safetensors"
    auroc = {"estimate": 0.7, "low": math.nan, "high": math.nan, "n": 9.0, "input_only": 0.6}
    replace(detector, card=Card("mine", shift=auroc, auroc=auroc, cost={"memory": math.nan})).save(path)
    assert json.loads(path.with_suffix(".json").read_text())["card"]["auroc"]["low"] is None
    found = Detector.load(path)
    assert found.as_good_as_the_input == (0.7, 0.6)
    assert "test AUROC 0.700 no interval, as groups are few, n = 9" in str(found.card)


# --- gates ----------------------------------------------------------------------------------------------------------


def splitting(model: Any, words: Any, texts: list[str], site: Site = "block", layer: int = 0) -> Detector:
    """A detector that finds every second one of these prompts memorized, by the state of a layer itself."""
    inputs = words(texts, return_tensors="pt", padding=True)
    states_NLD = states_at_the_end(model, inputs.input_ids, inputs.attention_mask, site)
    signs_N = np.where(np.arange(len(texts)) % 2 == 0, 1.0, -1.0)
    layers, width = states_NLD.shape[1:]
    here_ND = np.c_[states_NLD[:, layer].astype(np.float64), np.ones(len(texts))]
    *weights_D, bias = np.linalg.lstsq(here_ND, 20 * signs_N, rcond=None)[0]
    weights_LD = np.zeros((layers, width))
    weights_LD[layer] = weights_D
    nothing_D, known = np.full(width, math.nan), (np.zeros(width), np.zeros((width, width)))
    return Detector(site, layer, weights_LD, np.full(layers, bias), nothing_D, math.nan, *known)


def shifting(model: Any, layers: tuple[int, ...], site: Site = "block", positions: Any = "decision") -> SteeringVector:
    generator = torch.Generator().manual_seed(1)
    shifts = {layer: torch.randn(site_width(model, layer, site), generator=generator) for layer in layers}
    return SteeringVector("generalized", shifts, site=site, positions=positions)


@pytest.mark.parametrize(("family", "positions"), [("gpt2", "all"), ("llama", "decision"), ("opt", "decision")])
def test_a_gate_in_the_same_pass_steers_as_factors_computed_beforehand(family: str, positions: str) -> None:
    model, words, texts = tiny(family), tokenizer(), prompts()
    detector, vector = splitting(model, words, texts), shifting(model, (0, 2), positions=positions)
    inputs, before, factors = words(texts, return_tensors="pt", padding=True), hook_count(model), [1.0, 0.0] * 2
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}):
        options |= {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        plain = model.generate(**inputs, **options)
        with vector.apply(model, gate=detector.gate("generalized", 0.5)):
            found, again = (model.generate(**inputs, **options) for _ in range(2))
        with vector.apply(model, alpha=factors):
            assert torch.equal(found, model.generate(**inputs, **options)), options
        assert torch.equal(found, again), "the second prompt of a context is decided anew"
        rows = torch.arange(len(found)) % 2 == 1
        assert torch.equal(found[rows], plain[rows]), "what the gate lets through is untouched"
        assert not torch.equal(found, plain)
    assert hook_count(model) == before


@torch.no_grad()
def test_a_gate_reads_a_continued_cache_and_embedded_prompts() -> None:
    model, words, texts = tiny("llama"), tokenizer(), prompts()
    gate, vector = splitting(model, words, texts).gate("generalized", 0.5), shifting(model, (1,))
    inputs = words(texts, return_tensors="pt", padding=True)
    ids_NT, mask_NT = inputs.input_ids, inputs.attention_mask
    with vector.apply(model, alpha=[1.0, 0.0] * 2):
        wanted = model(**pass_inputs(model, ids_NT, mask_NT)).logits[:, -1]
    cache = cache_of(model(**pass_inputs(model, ids_NT[:, :-1], mask_NT[:, :-1])))
    with vector.apply(model, gate=gate):
        found = model(**pass_inputs(model, ids_NT[:, -1:], mask_NT, cache)).logits[:, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    embedded = pass_inputs(model, ids_NT, mask_NT) | {"inputs_embeds": model.get_input_embeddings()(ids_NT)}
    with vector.apply(model, gate=gate):
        found = model(**{name: value for name, value in embedded.items() if name != "input_ids"}).logits[:, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_gate_decides_the_same_on_cached_prefixes_and_for_every_answer(mini: Callable[[str], Asking]) -> None:
    """Blocks below the shift are replayed there, and the answers have rows of their own."""
    asking, site = mini("addition"), "mlp"
    # One prompt twice would be split to both sides, and rounding would decide where it goes.
    examples = list({e.prompt: e for e in mini_examples("addition", 90) if e.kind == "conflict"}.values())[:24]
    (batch,) = prepare(asking, examples)
    texts = [examples[i].prompt for i in batch.examples_N]
    detector = splitting(asking.model, asking.tokenizer, texts, site)  # type: ignore[arg-type]
    states_NLD = states_at_the_end(asking.model, batch.ids_NT, batch.mask_NT, site)  # type: ignore[arg-type]
    acts_N = detector.read(states_NLD).acts("generalized", 0.5)
    assert 0 < acts_N.sum() < len(acts_N)
    strong = 3 * states_NLD.std()
    width = site_width(asking.model, 1, "block")
    vector = SteeringVector("generalized", {1: strong * torch.ones(width).cumsum(0).sin()})
    by_hand = score(asking, [batch], applied=lambda: vector.apply(asking.model, alpha=acts_N.astype(float)))
    gate = detector.gate("generalized", 0.5)
    for prepared in ([batch], with_prefixes(asking, examples)):
        found = score(asking, prepared, applied=lambda: vector.apply(asking.model, gate=gate))
        np.testing.assert_allclose(found.margin_N, by_hand.margin_N, atol=1e-4)
        assert found.behaviour_N.tolist() == by_hand.behaviour_N.tolist()
    plain, steered = score(asking, [batch]), score(asking, [batch], applied=lambda: vector.apply(asking.model))
    changed_N = np.abs(by_hand.margin_N - plain.margin_N)[batch.examples_N] > 1e-3
    assert changed_N.tolist() == acts_N.tolist()
    assert np.abs(steered.margin_N - plain.margin_N).min() > 1e-3


@pytest.mark.parametrize(
    ("reads", "shifts", "allowed"),
    [
        (("block", 1), ("block", 1), True),
        (("attention", 1), ("mlp", 1), True),
        (("mlp", 1), ("attention", 1), False),
        (("block", 2), ("block", 1), False),
    ],
)
def test_a_gate_must_read_below_the_first_shift(
    reads: tuple[Site, int], shifts: tuple[Site, int], allowed: bool, tmp_path: Path
) -> None:
    model, words, texts = tiny("llama"), tokenizer(), prompts()
    detector = splitting(model, words, texts, *reads).bound_to(model, words)
    vector = shifting(model, (shifts[1], 2), shifts[0])
    fitted = Fitted(tmp_path, model, words, {"generalized": {"shift": vector}}, detector, None)
    inputs = fitted.inputs(texts)
    assert fitted.gate(inputs).tolist() == [1.0, 0.0, 1.0, 0.0]
    with fitted.steer("generalized", fitted.gate(inputs)):
        wanted = model(**inputs).logits
    if allowed:
        with fitted.steer("generalized", gate=0.5):
            assert torch.equal(model(**inputs).logits, wanted)
        return
    line = f"^gate: the detector reads {reads[0]} {reads[1]}, which this vector shifts from {shifts[0]} {shifts[1]} on"
    with pytest.raises(InputError, match=line), fitted.steer("generalized", gate=0.5):
        pass
    assert hook_count(model) == 0


def test_padding_is_no_word_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    model, words, texts = tiny("llama"), tokenizer(), prompts()
    words.pad_token = words.unk_token
    splitting(model, words, texts).bound_to(model, words).save(tmp_path / "d.safetensors")
    fitted = Fitted.open(tmp_path / "d.safetensors", model, words)
    found = fitted.detect(texts).p_memorized
    assert (found > 0.5).tolist() == [True, False, True, False]
    np.testing.assert_allclose(found, [fitted.detect([text]).p_memorized[0] for text in texts], atol=1e-5)
    with pytest.raises(InputError, match="prompt: the tokenizer has no token for 'nonsense' in 'w1 nonsense'"):
        fitted.detect([*texts, "w1 nonsense"])
    with pytest.raises(InputError, match=r"gate: 1\.5 is not a probability"):
        splitting(model, words, texts).gate("generalized", 1.5)


# --- in a study ----------------------------------------------------------------------------------------------------


def test_a_run_has_detectors_that_read_as_its_records_say(mini_run: Path) -> None:
    cell = mini_run / "cells" / "addition-0"
    fitted = Fitted.open(mini_run, *load_model(cell / "model"))
    table = pd.read_parquet(cell / "records" / "detection.parquet")
    assert set(table.examples) == {"conflict", "novel"}  # memory examples of sums are conflicts themselves
    assert set(table.split) == {"test"}
    assert table.p_memorized.between(0, 1).all()
    # Where both answers begin with one token the state is read behind it; in sums they never do.
    rows = table[table.examples == "conflict"].head(20)
    np.testing.assert_allclose(fitted.detect(rows.prompt.tolist()).p_memorized, rows.p_memorized, atol=1e-4)
    first = min(vector.layers[0] for vector in fitted.vectors.values())
    if fitted.lower_detector is None:
        assert table.p_memorized_below.isna().all()
        assert first == 0
    else:
        below = replace(fitted, detector=fitted.lower_detector).detect(rows.prompt.tolist())
        np.testing.assert_allclose(below.p_memorized, rows.p_memorized_below, atol=1e-4)
        assert below.layer <= first
    gates, steering = (pd.read_parquet(cell / "records" / f"{name}.parquet") for name in ("gate", "steering"))
    lists = gates.groupby(["direction", "examples"]).size()
    judged = steering[(steering.role == "vector") & (steering.aim == "conflict")]
    judged = judged.drop_duplicates(["direction", "examples", "example"]).groupby(["direction", "examples"]).size()
    assert {key: lists[key] for key in judged.index} == judged.to_dict()


def test_a_gate_says_why_it_does_not_act_and_a_reading_is_a_table_of_prompts() -> None:
    p_NL, distance_N = np.array([[0.9], [0.2], [0.9], [0.9]]), np.array([0.5, 0.5, 0.5, 3.0])
    reading = Reading(0, p_NL, np.array([0.8, 0.8, 0.1, 0.1]), distance_N, prompts=["a", "b", "c", "d"])
    held = reading.held(Toward.GENERALIZED, 0.6).tolist()
    assert held[0] == ""
    for said, why in zip(held[1:], ("less probable than 0.6", "seem to agree", "unlike the prompts"), strict=True):
        assert why in said
    assert reading.acts(Toward.GENERALIZED, 0.6).tolist() == [True, False, False, False]
    assert [line.split()[0] for line in str(reading).splitlines()] == ["P(memorized)", "0.90", "0.20", "0.90", "0.90"]
    assert str(reading).endswith("'d' (unlike those of the fit: ignore this)")
    undefined = str(replace(reading, p_conflict=np.full(4, np.nan)))
    assert undefined.endswith("P(conflict) is nan: the fit had too few prompts without a conflict")
