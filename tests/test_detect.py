"""Detectors: calibrated where there is something to know, silent where there is nothing; gates inside generation."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from typer.testing import CliRunner

from families import prompts, tiny, tokenizer
from helpers import hook_count, mini_examples
from mnemoscope.behaviour import Asking, prepare, score
from mnemoscope.cli import app
from mnemoscope.detect import Detector, Gate, Observed, Reading, find_detector, read_prompts, states_at_the_end
from mnemoscope.directions import with_prefixes
from mnemoscope.errors import InputError
from mnemoscope.models import cache_of, load_model, pass_inputs, site_width
from mnemoscope.stages.neutral import written
from mnemoscope.steering import SteeringVector
from mnemoscope.tasks import Example

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
    return Detector.fit(drawn(1500, 0), drawn(800, 1))


def test_probabilities_are_those_that_the_behaviour_was_drawn_with(detector: Detector) -> None:
    fresh = drawn(4000, 2)
    reading = detector.read(fresh.states_NLD)
    assert reading.layer == 1
    conflict_N = fresh.followed_N != "neither"
    true_N = expit(1.5 * fresh.states_NLD[:, 1, 2])
    assert np.abs(reading.p_memorized_N - true_N)[conflict_N].mean() < 0.06
    # Reliable: of those with about p, about p remembered.
    memorized_N = fresh.followed_N == "memorized"
    for low in np.arange(0.1, 0.9, 0.2):
        inside_N = conflict_N & (reading.p_memorized_N >= low) & (reading.p_memorized_N < low + 0.2)
        assert abs(memorized_N[inside_N].mean() - reading.p_memorized_N[inside_N].mean()) < 0.07


def test_where_there_is_nothing_to_know_it_says_the_base_rate() -> None:
    rng = np.random.default_rng(3)

    def blind(n: int) -> Observed:
        followed_N = np.where(rng.random(n) < 0.7, "memorized", "generalized").astype(object)
        return Observed(rng.standard_normal((n, LAYERS, NEURONS)), followed_N)

    reading = Detector.fit(blind(1000), blind(1000)).read(blind(500).states_NLD)
    assert abs(reading.p_memorized_N.mean() - 0.7) < 0.05
    assert reading.p_memorized_N.std() < 0.08
    assert np.isnan(reading.p_conflict_N).all()  # no prompt without a conflict was seen


def test_it_tells_conflicts_from_questions_without_one_and_says_what_is_unlike_both(detector: Detector) -> None:
    fresh = drawn(1000, 4)
    reading = detector.read(fresh.states_NLD)
    assert ((reading.p_conflict_N > 0.5) == (fresh.followed_N != "neither")).mean() > 0.98
    assert reading.unlike_N.mean() < 0.04
    away_NLD = fresh.states_NLD.copy()
    away_NLD[:, 1, 7] += 9.0
    assert detector.read(away_NLD).unlike_N.mean() > 0.98


def test_a_neuron_that_never_moved_makes_nobody_unlike_by_noise() -> None:
    parts = [drawn(600, seed) for seed in (5, 6)]
    for part in parts:
        part.states_NLD[:, :, 9] = 3.0
    detector = Detector.fit(*parts)
    assert detector.read(parts[1].states_NLD).unlike_N.mean() < 0.02
    moved_NLD = parts[1].states_NLD.copy()
    moved_NLD[:, :, 9] += 0.5  # nothing is known of how far it may go
    np.testing.assert_array_equal(detector.read(moved_NLD).distance_N, detector.read(parts[1].states_NLD).distance_N)


def test_a_gate_acts_on_the_other_behaviour_in_a_conflict_that_is_known() -> None:
    p_NL = np.array([[0.9], [0.9], [0.9], [0.2], [0.6]])
    reading = Reading(0, p_NL, np.array([0.9, 0.1, math.nan, 0.9, 0.9]), np.array([0.5, 0.5, 0.5, 0.5, 1.5]))
    assert reading.acts("generalized", 0.5).tolist() == [True, False, True, False, False]
    assert reading.acts("memorized", 0.5).tolist() == [False, False, False, True, False]
    assert reading.acts("generalized", 0.95).tolist() == [False] * 5


def test_readable_from_is_the_first_layer_that_stays_sure() -> None:
    p_NL = np.array([[0.9, 0.6, 0.8, 0.9], [0.5, 0.2, 0.1, 0.05], [0.5, 0.5, 0.5, 0.6], [0.9, 0.9, 0.9, 0.9]])
    reading = Reading(3, p_NL, np.zeros(4), np.zeros(4))
    assert reading.readable_from_N == [2, 1, None, 0]


def test_too_few_prompts_of_a_behaviour_are_refused() -> None:
    few = Observed(np.zeros((9, 1, 2)), np.array(["memorized"] * 9, dtype=object))
    with pytest.raises(InputError, match="fit: 0 prompts were answered generalized; at least 8 are needed"):
        Detector.fit(few, few)


def test_saved_and_loaded_it_reads_the_same(detector: Detector, tmp_path: Path) -> None:
    model, words = tiny("gpt2"), tokenizer()
    bound = detector.bound_to(model, words, "mine")
    bound.save(tmp_path / "detector.safetensors")
    found = find_detector(tmp_path, model, words)
    states_NLD = drawn(20, 7).states_NLD
    assert np.array_equal(found.read(states_NLD).p_memorized_NL, detector.read(states_NLD).p_memorized_NL)
    assert found.task == "mine"
    for cell in ("a", "b"):
        (tmp_path / "run" / "cells" / cell).mkdir(parents=True)
        bound.save(tmp_path / "run" / "cells" / cell / "detector.safetensors")
    with pytest.raises(
        InputError, match=r"from: what several cells of the run made can be used with this model; name one of .*a, .*b$"
    ):
        find_detector(tmp_path / "run", model, words)
    assert find_detector(tmp_path / "run" / "cells" / "b", model, words).task == "mine"
    with pytest.raises(InputError, match="model_type: the detector was made on gpt2, this model has llama"):
        find_detector(tmp_path, tiny("llama"), words)
    narrow = Detector.fit(
        *(Observed(part.states_NLD[..., :12], part.followed_N) for part in (drawn(300, 8), drawn(300, 9)))
    )
    narrow.save(tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match=r"it reads \(3, 12\) layers and neurons, this model has \(3, 32\)"):
        Detector.load(tmp_path / "narrow.safetensors", model, words, force=True)
    (tmp_path / "detector.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        find_detector(tmp_path, model, words)
    with pytest.raises(InputError, match="neither a detector nor a folder"):
        find_detector(tmp_path / "elsewhere", model, words)


def splitting(model: object, words: object, texts: list[str], site: str = "block", layer: int = -1) -> Detector:
    """A detector that finds every second one of these prompts memorized, by the state of a layer itself."""
    inputs = words(texts, return_tensors="pt", padding=True)  # type: ignore[operator]
    states_NLD = states_at_the_end(model, inputs.input_ids, inputs.attention_mask, site)  # type: ignore[arg-type]
    signs_N = np.where(np.arange(len(texts)) % 2 == 0, 1.0, -1.0)
    layers, width = states_NLD.shape[1:]
    here_ND = np.c_[states_NLD[:, layer].astype(np.float64), np.ones(len(texts))]
    *weights_D, bias = np.linalg.lstsq(here_ND, 20 * signs_N, rcond=None)[0]
    weights_LD = np.zeros((layers, width))
    weights_LD[layer] = weights_D
    nothing_D = np.full(width, math.nan)
    return Detector(
        site,  # type: ignore[arg-type]
        layer % layers,
        weights_LD,
        np.full(layers, bias),
        nothing_D,
        math.nan,
        np.zeros(width),
        np.zeros((width, width)),
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
@pytest.mark.parametrize("positions", ["decision", "all"])
def test_gated_generation_steers_the_chosen_prompts_and_leaves_the_others_untouched(
    family: str, positions: str
) -> None:
    model, words, texts = tiny(family), tokenizer(), prompts()
    detector = splitting(model, words, texts)
    generator = torch.Generator().manual_seed(1)
    shifts = {layer: torch.randn(site_width(model, layer, "block"), generator=generator) for layer in (0, 2)}
    vector = SteeringVector("generalized", shifts, positions=positions)  # type: ignore[arg-type]
    inputs = words(texts, return_tensors="pt", padding=True)
    before = hook_count(model)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}):
        options |= {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        gate = Gate(detector, "generalized")
        with vector.apply(model, gate=gate):
            found = model.generate(**inputs, **options)
        with vector.apply(model, alpha=[1.0, 0.0] * (len(texts) // 2)):
            assert torch.equal(found, model.generate(**inputs, **options)), options
        rows = len(texts) * options.get("num_beams", 1)
        assert (gate.asked, gate.acted) == (rows, rows // 2)
    assert hook_count(model) == before
    plain = model(**inputs).logits
    with vector.apply(model, gate=Gate(detector, "generalized", 1.0)):
        assert torch.equal(model(**inputs).logits, plain)


def test_padding_is_no_word_that_the_tokenizer_does_not_know() -> None:
    model, words, texts = tiny("llama"), tokenizer(), prompts()
    detector = splitting(model, words, texts)
    words.pad_token = words.unk_token
    found = read_prompts(detector, Asking(model, words), texts)
    alone = [read_prompts(detector, Asking(model, words), [text]) for text in texts]
    np.testing.assert_allclose(found.p_memorized_NL, np.concatenate([a.p_memorized_NL for a in alone]), atol=1e-5)
    with pytest.raises(InputError, match="cannot encode 'w1 nonsense'"):
        read_prompts(detector, Asking(model, words), [*texts, "w1 nonsense"])


def test_a_gate_reads_a_continued_cache_without_leaving_a_trace() -> None:
    model, words, texts = tiny("llama"), tokenizer(), prompts()
    detector = splitting(model, words, texts)
    inputs = words(texts, return_tensors="pt", padding=True)
    ids_NT, mask_NT = inputs.input_ids, inputs.attention_mask
    cache = cache_of(model(**pass_inputs(model, ids_NT[:, :-1], mask_NT[:, :-1])))
    gate = Gate(detector, "generalized")
    vector = SteeringVector("generalized", {1: torch.ones(site_width(model, 1, "block"))})
    with vector.apply(model, gate=gate):
        model(**pass_inputs(model, ids_NT[:, -1:], mask_NT, cache))
    assert gate.acted == len(texts) // 2
    assert cache.get_seq_length() == ids_NT.shape[1]


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_a_gate_decides_the_same_on_cached_prefixes_and_for_every_answer(
    mini: Callable[[str], Asking], site: str
) -> None:
    """Blocks below the shift are replayed there, and the answers have rows of their own."""
    asking = mini("addition")
    # One prompt twice would be split to both sides, and rounding would decide where it goes.
    examples = list({e.prompt: e for e in mini_examples("addition", 90) if e.kind == "conflict"}.values())[:24]
    (batch,) = prepare(asking, examples)
    texts = [examples[i].prompt for i in batch.examples_N]
    detector = splitting(asking.model, asking.tokenizer, texts, site, layer=0)  # read below the shift
    states_NLD = states_at_the_end(asking.model, batch.ids_NT, batch.mask_NT, site)  # type: ignore[arg-type]
    acts_N = detector.read(states_NLD).acts("generalized", 0.5)
    assert 0 < acts_N.sum() < len(acts_N)
    strong = 3 * states_NLD.std()
    width = site_width(asking.model, 1, "block")
    vector = SteeringVector("generalized", {1: strong * torch.ones(width).cumsum(0).sin()})
    by_hand = score(asking, [batch], applied=lambda: vector.apply(asking.model, alpha=acts_N.astype(float)))
    for prepared in ([batch], with_prefixes(asking, examples)):
        gate = Gate(detector, "generalized")
        found = score(asking, prepared, applied=lambda g=gate: vector.apply(asking.model, gate=g))
        assert (gate.asked, gate.acted) == (len(acts_N), acts_N.sum())
        np.testing.assert_allclose(found.margin_N, by_hand.margin_N, atol=1e-4)
        assert found.behaviour_N.tolist() == by_hand.behaviour_N.tolist()
    plain, steered = score(asking, [batch]), score(asking, [batch], applied=lambda: vector.apply(asking.model))
    changed_N = np.abs(by_hand.margin_N - plain.margin_N)[batch.examples_N] > 1e-3
    assert changed_N.tolist() == acts_N.tolist()
    assert np.abs(steered.margin_N - plain.margin_N).min() > 1e-3


def test_a_gate_hears_the_model_without_any_vector_beside_it() -> None:
    model, words, texts = tiny("llama"), tokenizer(), prompts()
    inputs = words(texts, return_tensors="pt", padding=True)
    detector = splitting(model, words, texts)
    width = site_width(model, 0, "block")
    loud = SteeringVector("memorized", {0: 50 * torch.ones(width).cumsum(0).sin()})
    vector = SteeringVector("generalized", {1: torch.ones(width)})
    first, second = Gate(detector, "memorized"), Gate(detector, "generalized")
    with loud.apply(model, gate=first), vector.apply(model, gate=second):
        model(**inputs)
    assert (first.asked, first.acted, second.asked, second.acted) == (4, 2, 4, 2)
    alone = Gate(detector, "generalized")
    with loud.apply(model), vector.apply(model, gate=alone):
        model(**inputs)
    assert alone.acted == 2


def test_a_gate_that_cannot_read_says_so() -> None:
    model, words, texts = tiny("llama"), tokenizer(), prompts()
    vector = SteeringVector("generalized", {1: torch.ones(site_width(model, 1, "block"))})
    gate = Gate(splitting(model, words, texts), "generalized")
    inputs = words(texts, return_tensors="pt", padding=True)
    embedded = model.get_input_embeddings()(inputs.input_ids)
    with (
        vector.apply(model, gate=gate),
        pytest.raises(InputError, match="gate: it reads prompts as token ids"),
    ):
        model(inputs_embeds=embedded, attention_mask=inputs.attention_mask)
    with pytest.raises(InputError, match=r"gate: 1\.5 is not a probability"):
        Gate(gate.detector, "generalized", 1.5)


# --- in a study ----------------------------------------------------------------------------------------------------


def test_a_run_has_a_detector_that_reads_as_its_records_say(mini_run: Path) -> None:
    cell = mini_run / "cells" / "addition-0"
    model, words = load_model(cell / "model")
    detector = find_detector(mini_run, model, words)
    table = pd.read_parquet(cell / "records" / "detection.parquet")
    assert set(table.examples) == {"conflict", "novel"}  # memory examples of sums are conflicts themselves
    assert set(table.split) == {"test"}
    rows = table[table.examples == "conflict"].head(20)
    reading = read_prompts(detector, Asking(model, words, batch_size=7), rows.prompt.tolist())
    # Where both answers begin with one token the state is read behind it; in sums they never do.
    np.testing.assert_allclose(reading.p_memorized_N, rows.p_memorized, atol=1e-4)
    known = table[table.followed.isin(["memorized", "generalized"])]
    mean = known.p_memorized.groupby(known.followed).mean()
    assert mean["memorized"] > mean["generalized"] + 0.2


def test_where_a_gate_would_act_is_where_it_acts(mini_run: Path, mini: Callable[[str], Asking]) -> None:
    cell = mini_run / "cells" / "addition-0"
    model, words = load_model(cell / "model")
    gates = pd.read_parquet(cell / "records" / "gate.parquet")
    steering = pd.read_parquet(cell / "records" / "steering.parquet")
    lists = gates.groupby(["direction", "examples"]).size()
    judged = steering[(steering.role == "vector") & (steering.aim == "conflict")]
    judged = judged.drop_duplicates(["direction", "examples", "example"]).groupby(["direction", "examples"]).size()
    assert {key: lists[key] for key in judged.index} == judged.to_dict()
    pairs = pd.read_parquet(cell / "records" / "pairs.parquet")
    table = pairs[pairs.is_pair & (pairs.split == "test")]
    examples = [
        Example(r.item, getattr(r, f"prompt_{s}"), "conflict", r.group, "", "test", r.memorized, r.generalized)
        for r in table.itertuples()
        for s in ["a" if r.behaviour_a == "memorized" else "b"]
    ]
    examples = list({(e.item, e.prompt): e for e in examples}.values())  # each is judged once
    said = gates[(gates.direction == "to_generalized") & (gates.examples == "pairs")]
    detector = find_detector(cell, model, words)
    gate = Gate(detector, "generalized")
    vector = SteeringVector("generalized", {0: torch.ones(64)})
    asking = Asking(model, words, ("",), batch_size=64)
    score(asking, prepare(asking, examples[: len(said)]), applied=lambda: vector.apply(model, gate=gate))
    assert gate.acted == said.acts.sum()


def test_detect_on_the_command_line(mini_run: Path) -> None:
    model = str(mini_run / "cells" / "addition-0" / "model")
    source = ["--from", str(mini_run)]
    done = CliRunner().invoke(app, ["detect", model, *source, "--json", "12+34=", "zz"])
    assert done.exit_code == 2
    assert done.stderr == "error: prompt: the tokenizer cannot encode 'zz'\n"
    done = CliRunner().invoke(app, ["detect", model, *source, "--chat", "12+34="])
    assert done.stderr == "error: chat: the detector was made of prompts that were put as they are; leave out --chat\n"
    done = CliRunner().invoke(app, ["detect", model, *source, "--json", "12+34=", "34+12="])
    said = json.loads(done.stdout)
    assert [row["prompt"] for row in said["prompts"]] == ["12+34=", "34+12="]
    for row in said["prompts"]:
        assert 0 <= row["p_memorized"] <= 1
        assert row["p_memorized"] == row["p_memorized_by_layer"][said["layer"]]
    done = CliRunner().invoke(app, ["detect", model, *source, "12+34="])
    assert "P(memorized)" in done.stdout
    done = CliRunner().invoke(
        app, ["steer", model, *source, "--toward", "generalized", "--gate", "0.5", "--json", "12+34=", "34+12="]
    )
    assert json.loads(done.stdout)["gate"]["asked"] == 2
    for arguments in (["--gate", "2"], ["--from", "nowhere"]):
        done = CliRunner().invoke(app, ["steer", model, *source, "--toward", "generalized", *arguments, "12+34="])
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")


def test_a_run_without_a_detector_says_how_to_get_one(mini_run: Path, tmp_path: Path) -> None:
    model = str(mini_run / "cells" / "addition-0" / "model")
    done = CliRunner().invoke(app, ["detect", model, "--from", str(tmp_path), "12+34="])
    assert done.exit_code == 2
    assert "detection.fitted: true" in done.stderr


def test_a_damaged_shape_is_refused(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    detector.save(path)
    arrays = load_file(path)
    del arrays["weights_LD"]
    save_file(arrays, path)
    with pytest.raises(InputError, match="cannot be read"):
        Detector.load(path)


def test_divergence_on_neutral_text_is_that_of_whole_passes(mini_run: Path) -> None:
    cell = mini_run / "cells" / "addition-0"
    table = pd.read_parquet(cell / "records" / "neutral.parquet")
    assert len(table) == 2 * 2 * 20
    untouched = table[table.dose == 0]
    assert (untouched.kl_first == 0).all()
    assert (untouched.kl_next == 0).all()
    assert untouched.same_top.all()
    model, words = load_model(cell / "model")
    best = json.loads((cell / "records" / "chosen.json").read_text())["pairs"]["best"]["to_memorized"]
    vector = SteeringVector.load(cell / "vectors" / f"to_memorized-{best}.safetensors")
    texts = written(Asking(model, words, ("",)), 4, 28, seed_of_neutral_text())
    rows = table[(table.direction == "to_memorized") & (table.dose == 1)]
    assert rows.kl_first.max() > 1e-4
    for row in rows.itertuples():
        # The first token, behind which all is written, is part of what is read.
        ids = texts[row.text : row.text + 1, : row.place + 4]
        assert row.place + 4 <= texts.shape[1] == 29
        with torch.no_grad():
            plain = model(ids).logits[0, row.place - 1 :].log_softmax(-1)
            with vector.apply(model, start=row.place - 1):
                moved = model(ids).logits[0, row.place - 1 :].log_softmax(-1)
        kl = (plain.exp() * (plain - moved)).sum(-1)
        assert kl[0].item() == pytest.approx(row.kl_first, abs=1e-5)
        assert kl[1:].mean().item() == pytest.approx(row.kl_next, abs=1e-5)


def seed_of_neutral_text() -> int:
    return int(np.random.default_rng([0, zlib.crc32(b"neutral")]).integers(2**31))
