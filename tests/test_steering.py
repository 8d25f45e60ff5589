"""Steering vectors by algebra and against a shift that is added by hand."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import cache_utils

from families import tiny
from helpers import hook_count, mini_examples, shifted_by_hand
from mnemoscope.behaviour import Asking, capturing
from mnemoscope.interventions import Binding, Card, Held, LowRank, Shift, SteeringVector, edited
from mnemoscope.models import SITES, select_rows
from mnemoscope.runs.digests import facts_digest
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.export import check_portable


def random_vector(site: str = "block", scale: float = 2.0, seed: int = 0, **facts: object) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    width = 256 if site == "neuron" else 64
    shifts = {layer: scale * torch.randn(width, generator=generator) for layer in (0, 1)}
    return SteeringVector("generalized", shifts, site=site, **facts)  # type: ignore[arg-type]


def low_rank_vector(site: str = "block", seed: int = 0, **facts: object) -> SteeringVector:
    """A constant shift in layer 0, shifts that depend on the state in both layers."""
    generator = torch.Generator().manual_seed(seed)
    width = 256 if site == "neuron" else 64

    def edit() -> LowRank:
        read_KD, write_KD = (torch.randn(3, width, generator=generator) for _ in range(2))
        return LowRank(read_KD / width, torch.randn(3, generator=generator), write_KD)

    constant = Shift(torch.randn(width, generator=generator))
    return SteeringVector("generalized", {0: (constant, edit()), 1: edit()}, site=site, **facts)  # type: ignore[arg-type]


@pytest.fixture
def asking(mini: Callable[[str], Asking]) -> Asking:
    return mini("addition")


def inputs_of(asking: Asking, n: int = 6) -> dict[str, torch.Tensor]:
    prompts = [e.prompt for e in mini_examples("addition", n)]
    prompts[0] = "1+2="  # shorter, so that the batch is padded
    return dict(asking.tokenizer(prompts, return_tensors="pt", padding=True))


def logits(asking: Asking, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return asking.model(**inputs_of(asking), **options).logits


def generated(asking: Asking, **options: object) -> list[list[int]]:
    return asking.model.generate(**inputs_of(asking), max_new_tokens=8, do_sample=False, **options).tolist()


@pytest.mark.parametrize("site", SITES)
def test_alpha_zero_and_nothing_are_bit_identical_to_no_hook(asking: Asking, site: str) -> None:
    plain, text, vector = logits(asking), generated(asking), low_rank_vector(site)
    with vector.apply(asking.model):
        assert not torch.equal(logits(asking), plain)
    for nothing, alpha in ((vector, 0.0), (vector - vector, 1.0), (vector * 0.0, 1.0), (vector + -vector, 3.0)):
        with nothing.apply(asking.model, alpha=alpha):
            assert hook_count(asking.model) == 0
            assert torch.equal(logits(asking), plain)
            assert generated(asking) == text
    assert torch.equal(logits(asking), plain)


@pytest.mark.parametrize("last", ["first", "second"])
def test_contexts_may_end_in_any_order(last: str) -> None:
    """As those of two generators do; the model is then what it was."""
    model = tiny("llama")
    before, own = dict(model.__dict__), dict(model.generation_config.__dict__)
    ids = torch.tensor([[3, 4, 5]])
    plain = model(ids).logits
    vector = SteeringVector("generalized", {1: torch.ones(32)})
    contexts = {"first": vector.apply(model), "second": vector.apply(model)}
    for context in contexts.values():
        context.__enter__()
    model(ids)
    for name in sorted(contexts, key=lambda name: name == last):
        contexts[name].__exit__(None, None, None)
        if name != last:
            assert not torch.equal(model(ids).logits, plain), "the other one still acts"
    assert hook_count(model) == 0
    assert dict(model.__dict__) == before
    assert dict(model.generation_config.__dict__) == own
    assert torch.equal(model(ids).logits, plain)


def test_a_layer_that_runs_twice_in_a_pass_is_refused() -> None:
    """A looped model would be shifted once a loop."""
    model = tiny("llama")
    layers, forward = model.model.layers, type(model.model).forward

    def looped(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        layers[1](found.last_hidden_state, position_embeddings=self.rotary_emb(found.last_hidden_state, POSITIONS))
        return found

    model.model.forward = MethodType(looped, model.model)
    with (
        SteeringVector("generalized", {1: torch.ones(32)}).apply(model),
        pytest.raises(InputError, match="1 steered layers ran 2 times in this pass"),
    ):
        model(torch.tensor([[3, 4, 5]]))
    with pytest.raises(InputError, match="captured layers ran 4 times"), capturing(model, "block"):
        model(torch.tensor([[3, 4, 5]]))


POSITIONS = torch.arange(3)[None]


def test_no_hook_is_left_after_an_error_and_nesting_adds_up(asking: Asking) -> None:
    plain = logits(asking)
    vector, other = random_vector(), random_vector(seed=1)
    with pytest.raises(RuntimeError, match="on purpose"), vector.apply(asking.model):
        raise RuntimeError("on purpose")
    assert hook_count(asking.model) == 0
    assert torch.equal(logits(asking), plain)
    with vector.apply(asking.model), other.apply(asking.model):
        nested = logits(asking)
    with (vector + other).apply(asking.model):
        torch.testing.assert_close(logits(asking), nested, rtol=1e-4, atol=1e-4)
    assert hook_count(asking.model) == 0


def test_a_whole_pass_equals_a_shift_added_by_hand(asking: Asking) -> None:
    vector = random_vector()
    last = inputs_of(asking)["input_ids"].shape[1] - 1
    everywhere = replace(vector, positions="all")
    for moved, first, options in ((vector, last, {}), (vector, 3, {"start": 3}), (everywhere, 0, {})):
        with moved.apply(asking.model, **options):  # type: ignore[arg-type]
            ours = logits(asking)
        with shifted_by_hand(asking.model, vector.shifts, first):
            assert torch.equal(ours, logits(asking))


@pytest.mark.parametrize("read", [logits, generated, partial(generated, use_cache=False)])
def test_every_prompt_has_its_own_factor(asking: Asking, read: Callable[[Asking], Any]) -> None:
    """Of a shift and of what depends on the state: as all of them with that factor."""
    vector, factors = low_rank_vector(), [1.0, 0.0, -2.0]
    with vector.apply(asking.model, alpha=2 * factors):
        together = [torch.as_tensor(row) for row in read(asking)]
    for place, alpha in enumerate(factors):
        with vector.apply(asking.model, alpha=alpha):
            alone = [torch.as_tensor(row) for row in read(asking)]
        for row in (place, place + 3):
            length = min(len(together[row]), len(alone[row]))  # of a batch, whose answers may all have ended
            torch.testing.assert_close(together[row][:length], alone[row][:length], rtol=1e-4, atol=1e-4)


def test_algebra() -> None:
    vector, other, state = random_vector(), low_rank_vector(seed=1), torch.randn(2, 3, 64)
    twenty = 20 * vector
    for layer in vector.layers:
        assert torch.equal((-(vector * -20)).shifts[layer], twenty.shifts[layer])
        assert torch.equal((vector + vector).shifts[layer], (2 * vector).shifts[layer])
    assert (-vector).toward == (vector * -1).toward == "memorized"
    assert (vector - vector).layers == (other - other).layers == []
    one = low_rank_vector()
    for layer in (0, 1):
        both = (one + 2 * other).low_rank[layer].added(state)
        expected = one.low_rank[layer].added(state) + 2 * other.low_rank[layer].added(state)
        torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((-one).low_rank[layer].added(state), -one.low_rank[layer].added(state))
    with pytest.raises(InputError, match="site"):
        vector + random_vector("mlp")


def test_held_neurons_have_their_values_at_the_decision_position_or_from_it_on(asking: Asking) -> None:
    """As ablations and patches need them, bit by bit."""
    value_D, share_D = torch.arange(64.0), (torch.arange(64) % 2 == 0).float()
    last = inputs_of(asking)["input_ids"].shape[1] - 1
    for positions, first, end in (("once", 2, 3), ("decision", 2, last + 1), ("all", 0, last + 1)):
        held, start = {1: Held(value_D, share_D)}, 2 if first else None
        with (
            edited(asking.model, held, "block", positions, start),  # type: ignore[arg-type]
            capturing(asking.model, "block", [1], offsets=None) as states,
        ):
            logits(asking)
        with capturing(asking.model, "block", [1], offsets=None) as plain:
            logits(asking)
        wanted = plain[0].clone()
        wanted[:, first:end, ::2] = value_D[::2]
        assert torch.equal(states[0], wanted)


def test_a_saved_vector_comes_back_and_is_bound_to_its_model(
    asking: Asking, mini: Callable[[str], Asking], tmp_path: Path
) -> None:
    card = Card("addition, seed 0", {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 10}, cost={"novel": -0.01})
    facts = {"task": "addition", "method": "nmd", "strength": 1.5, "card": card, "opening": (3, 4)}
    vector = replace(random_vector(), **facts).bound_to(asking.model, asking.tokenizer)
    path = str(tmp_path / "vector.safetensors")
    assert [str(file) for file in vector.save(path)] == [path, str(tmp_path / "vector.json")]
    back = SteeringVector.load(path, asking.model, asking.tokenizer)
    assert replace(back, edits={}) == replace(vector, edits={})
    assert all(torch.equal(back.shifts[layer], vector.shifts[layer]) for layer in vector.layers)
    assert str(back.card) == (
        "fitted on addition, seed 0: 0 pairs of 0 groups\ntest shift 0.500 [0.400, 0.600], n = 10\n"
        "cost, change in accuracy: novel -0.010"
    )
    other = mini("addition-digits")
    with pytest.raises(InputError, match="weights: the vector was made on"):
        SteeringVector.load(path, other.model, other.tokenizer)
    assert SteeringVector.load(path, other.model, other.tokenizer, force=True).layers == [0, 1]
    with pytest.raises(InputError, match="model, tokenizer: give both"):
        SteeringVector.load(path, asking.model)
    assert SteeringVector.load(path, asking.model, force=True).layers == [0, 1]
    random_vector().save(path)
    with pytest.raises(InputError, match=r"^binding: the vector does not say which model it was made on"):
        SteeringVector.load(path, asking.model, asking.tokenizer)
    replace(vector, edits={0: torch.ones(3)}).save(path)
    with pytest.raises(InputError, match="3 neurons in layer 0"):
        SteeringVector.load(path, asking.model, asking.tokenizer, force=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_follows_its_model_into_half_precision_and_back(
    asking: Asking, tmp_path: Path, dtype: torch.dtype
) -> None:
    half, path = copy.deepcopy(asking.model).to(dtype), tmp_path / "v.safetensors"
    assert not torch.equal(next(half.parameters()).float(), next(asking.model.parameters()))
    vector = SteeringVector("generalized", {0: torch.ones(64)})
    for made_on, used_on in ((asking.model, half), (half, asking.model), (half, half)):
        vector.bound_to(made_on, asking.tokenizer).save(path)
        assert SteeringVector.load(path, used_on, asking.tokenizer).layers == [0]
    with torch.no_grad():
        next(half.parameters())[0, 0] += 0.1
    with pytest.raises(InputError, match=r"^weights: the vector was made on"):
        SteeringVector.load(path, half, asking.tokenizer)


def test_a_binding_is_to_the_exact_bytes_of_the_weights_and_to_the_words_of_the_tokenizer(asking: Asking) -> None:
    """One bit that rounding hides; only a model of another precision is compared by what both round to."""
    other, half = copy.deepcopy(asking.model), copy.deepcopy(asking.model).to(torch.bfloat16)
    with torch.no_grad():
        next(other.parameters()).view(-1).view(torch.int32)[0] ^= 1
    bound, flipped, rounded = (Binding.of(model, asking.tokenizer) for model in (asking.model, other, half))
    assert bound.rounded == flipped.rounded == rounded.rounded
    with pytest.raises(InputError, match=r"^weights: the vector was made on"):
        bound.check(flipped, "vector")
    bound.check(rounded, "vector")
    rounded.check(bound, "vector")
    words = copy.deepcopy(asking.tokenizer)
    words(["1+2=", "1="], padding=True, truncation=True, max_length=4)
    assert Binding.of(asking.model, words) == bound, "padding is a matter of the call"
    words.add_tokens(["never seen"])
    assert Binding.of(asking.model, words).tokenizer != bound.tokenizer


def with_other_dtype(file: Path, facts: Path) -> None:
    """Tensors in half precision, with the digests of what is there now."""
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    found = json.loads(facts.read_text())
    found["digest"]["tensors"] = hashlib.sha256(file.read_bytes()).hexdigest()
    facts.write_text(json.dumps(found))


def changed_json(path: Path, sealed: bool = False, **facts: object) -> None:
    """Other facts, with their own digest where they are sealed again."""
    found = json.loads(path.read_text()) | facts
    digests = found.pop("digest")
    if sealed:
        digests["facts"] = facts_digest(found)
    path.write_text(json.dumps({"digest": digests} | found))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file, facts: file.write_bytes(file.read_bytes()[:50]), "the digest of its tensors differs"),
        (lambda file, facts: save_file({"layer.0": torch.ones(64)}, file), "the digest of its tensors differs"),
        (with_other_dtype, "its tensors are torch.float16, and were saved as torch.float32"),
        (lambda file, facts: file.unlink(), "No such file"),
        (lambda file, facts: facts.unlink(), "No such file"),
        (lambda file, facts: facts.write_text("{"), "Expecting property name"),
        (lambda file, facts: facts.write_text("{}"), "digest"),
        (lambda file, facts: changed_json(facts, strength=2.0), "the digest of its facts differs"),
        (
            lambda file, facts: changed_json(facts, True, layers=[0, 2]),
            "its layers are not those of the JSON beside it",
        ),
        (lambda file, facts: changed_json(facts, True, colour=1), "colour"),
        (lambda file, facts: changed_json(facts, True, card={"shift": 1}), "fitted_on"),
    ],
)
def test_a_damaged_artefact_is_refused_by_name(
    damage: Callable[[Path, Path], object], message: str, tmp_path: Path
) -> None:
    file, facts = random_vector().save(tmp_path / "vector.safetensors")
    assert SteeringVector.load(file).layers == [0, 1]
    damage(file, facts)
    with pytest.raises(InputError, match=rf"{re.escape(str(file.with_suffix('')))}.*{message}") as error:
        SteeringVector.load(str(file))
    assert "\n" not in str(error.value)


def test_vectors_of_earlier_versions_are_loaded(tmp_path: Path) -> None:
    """Those of 0.2.0 do not say what kind they are; older ones, without a digest of their facts, by force only."""
    file, facts = low_rank_vector().save(tmp_path / "vector.safetensors")
    found = json.loads(facts.read_text())
    older = {name: fact for name, fact in found.items() if name not in ("kind", "edits", "setting", "contrast")}
    facts.write_text(json.dumps(older))
    changed_json(facts, sealed=True)
    back = SteeringVector.load(file)
    assert all(torch.equal(part, back.tensors()[name]) for name, part in low_rank_vector().tensors().items())
    facts.write_text(json.dumps(found | {"digest": found["digest"]["tensors"]}))
    with pytest.raises(InputError, match="an earlier version wrote it, without a digest of its facts"):
        SteeringVector.load(file)
    assert SteeringVector.load(file, force=True).layers == [0, 1]


def test_impossible_vectors_are_refused(asking: Asking) -> None:
    low = LowRank(torch.ones(1, 3), torch.ones(1), torch.ones(1, 3))
    far = SteeringVector("generalized", {7: torch.ones(64)}), SteeringVector("generalized", {1: low})
    for one, options, message in (
        (far[0], {}, "layers: 7"),
        (far[1], {}, "3 neurons in layer 1"),
        (random_vector(), {"alpha": float("nan")}, "alpha"),
        (random_vector(), {"start": -1}, r"^start: -1; allowed is a column of the batch, from 0 on$"),
    ):
        with pytest.raises(InputError, match=message), one.apply(asking.model, **options):  # type: ignore[arg-type]
            pass
    for edits in ({0: torch.tensor([float("inf")])}, {0: LowRank(torch.ones(2, 3), torch.ones(2), torch.ones(1, 3))}):
        with pytest.raises(InputError, match="not finite"):
            SteeringVector("generalized", edits)
    with pytest.raises(InputError, match="toward"):
        SteeringVector("both", {})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="depends on the state"):
        check_portable(replace(low_rank_vector(), positions="all"), "gguf")


@pytest.mark.skipif(not hasattr(cache_utils, "LinearAttentionLayer"), reason="this version of the library has none")
def test_a_cache_with_a_recurrent_state_is_not_shared() -> None:
    cache = cache_utils.DynamicCache()
    cache.layers = [cache_utils.LinearAttentionLayer()]
    with pytest.raises(InputError, match="has a LinearAttentionLayer; only caches of attention can be shared"):
        select_rows(cache, None)
