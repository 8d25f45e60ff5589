"""Steered generation in every way the library offers, on families that differ in cache and layout; adapters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from families import prompts, tiny, tokenizer
from mnemoscope.behaviour import capturing
from mnemoscope.face.doctor import examine
from mnemoscope.interventions import SteeringVector
from mnemoscope.models import Layout, Site, blocks_of, layout_of, site_width, use_layout
from mnemoscope.models.caches import cache_argument
from mnemoscope.runs.errors import InputError

SOME = ("gpt2", "llama", "gemma2", "opt")


def random_vector(model: PreTrainedModel, site: Site = "block", scale: float = 1.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(1)
    shifts = {layer: scale * torch.randn(site_width(model, layer, site), generator=generator) for layer in (0, 2)}
    return SteeringVector("generalized", shifts, site=site)


def generated(model: PreTrainedModel, texts: list[str], **options: Any) -> list[list[int]]:
    """What follows the prompts, without the padding behind it."""
    inputs = tokenizer()(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(**inputs, **options)[:, inputs.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(("site", "positions"), [("block", "decision"), ("neuron", "all")])
def test_beams_and_every_kind_of_cache_follow_each_prompts_factor(family: str, site: Site, positions: Any) -> None:
    """What each prompt gives alone is the oracle: unpadded, cached, with one factor."""
    model, texts = tiny(family), prompts()
    vector = replace(random_vector(model, site), positions=positions)
    factors = [1.0, 0.0, 1.0, 0.0]
    plain = [generated(model, [text])[0] for text in texts]
    with vector.apply(model):
        alone = [generated(model, [text])[0] for text in texts]
    assert alone != plain
    wanted = [steered if factor else text for steered, text, factor in zip(alone, plain, factors, strict=True)]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with vector.apply(model, alpha=factors):
            assert generated(model, texts, **options) == wanted, options
    with vector.apply(model, alpha=factors):
        beams = generated(model, texts, num_beams=3)
    for text, factor, found in zip(texts, factors, beams, strict=True):
        with vector.apply(model, alpha=factor):
            assert generated(model, [text], num_beams=3) == [found]


def test_nothing_is_compiled_while_a_vector_hangs_in_the_model() -> None:
    """What was compiled before would not see the vector, and what is compiled now would keep it."""
    model = tiny("llama")
    with random_vector(model).apply(model):
        assert model.generation_config.disable_compile
        model(torch.tensor([[3, 4]]))  # or the context would say that nothing was steered
    assert not model.generation_config.disable_compile


@torch.no_grad()
def test_a_prompt_that_begins_with_the_one_before_is_another_prompt() -> None:
    """In one context, as in a loop over prompts of more and more examples: with a cache each is answered for itself."""
    model, words = tiny("llama"), tokenizer()
    vector = random_vector(model)
    asked = [words(text, return_tensors="pt").input_ids for text in ("w1 w2", "w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6")]

    def last(*prompts: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        with vector.apply(model, **options):
            return [model(ids_NT, **{cache_argument(model): DynamicCache()}).logits[:, -1] for ids_NT in prompts]

    wanted = [last(ids_NT)[0] for ids_NT in asked]
    assert not torch.allclose(last(asked[1], start=1)[0], wanted[1], atol=1e-3)
    assert all(torch.equal(found, expected) for found, expected in zip(last(*asked), wanted, strict=True))


def test_factors_that_do_not_fit_the_batch_are_refused() -> None:
    model = tiny("gpt2")
    vector = random_vector(model)
    for factors, options in (([1, 2, 3], {}), ([1.0, 0.0], {}), ([1.0, 0.0], {"num_beams": 2}), ([1.0] * 8, {})):
        rows = 4 * options.get("num_beams", 1)
        line = f"^alpha: {len(factors)} factors for a batch of {rows} rows; allowed is one for each prompt"
        with pytest.raises(InputError, match=line), vector.apply(model, factors):
            generated(model, prompts(), **options)
    with pytest.raises(InputError, match="alpha"), vector.apply(model, [1.0, float("inf")]):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_follow_the_precision_of_a_layer(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), random_vector(model).apply(model), capturing(model, "block") as states:
        assert model(input_ids=ids).logits.dtype == dtype
    assert all(state.dtype == dtype for state in states)


def test_a_batch_that_ends_in_padding_is_refused() -> None:
    model, words = tiny("llama"), tokenizer()
    words.padding_side = "right"
    vector = random_vector(model)
    inputs = words(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)
    for call in (model, partial(model.generate, max_new_tokens=2)):
        with vector.apply(model), pytest.raises(InputError, match=r"padding: .* pad on the left"):
            call(**inputs)
    with vector.apply(model, start=0):  # whoever names the column knows where it is
        model(**inputs)
    everywhere = []
    for start in (None, 2):  # what acts on every token does so wherever the decision position is
        with torch.no_grad(), replace(vector, positions="all").apply(model, start=start):
            everywhere.append(model(**inputs).logits)
    assert torch.equal(*everywhere)


def test_guesses_behind_a_prompt_need_its_end_said() -> None:
    model = tiny("llama")
    vector = random_vector(model)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    guesses: list[dict[str, Any]] = [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny("llama")}]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with vector.apply(model):
        wanted = model.generate(input_ids=ids, **options)
        for guessing in (*guesses, {"prefill_chunk_size": 2}):
            with pytest.raises(InputError, match=f"start: with {next(iter(guessing))}"):
                model.generate(input_ids=ids, **options, **guessing)
    assert "generate" not in model.__dict__
    with vector.apply(model, start=ids.shape[1] - 1):
        for guessing in guesses:
            assert model.generate(input_ids=ids, **options, **guessing).tolist() == wanted.tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", SOME)
def test_block_outputs_are_the_librarys_hidden_states(family: str) -> None:
    model, ids = tiny(family), torch.arange(3, 15).reshape(2, 6)
    with capturing(model, "block", offsets=None) as ours:
        theirs = model(input_ids=ids, output_hidden_states=True).hidden_states
    for state_NTD, other_NTD in zip(ours[:-1], theirs[1:-1], strict=True):  # the last is behind the final norm
        torch.testing.assert_close(state_NTD, other_NTD, rtol=0, atol=1e-5)


def test_a_model_of_no_known_family_says_where_its_parts_are() -> None:
    known, stranger = layout_of(tiny("gpt2")), torch.nn.Module()
    stranger.inner = tiny("gpt2")
    with pytest.raises(InputError, match="no known block layout; say where"):
        blocks_of(stranger)
    with pytest.raises(InputError, match=r"layout\.mlp: a block of Module has no part 'ffn'"):
        use_layout(stranger, replace(known, blocks="inner.transformer.h", mlp="ffn"))
    with pytest.raises(InputError, match=r"layout\.blocks: 'h' is no list"):
        use_layout(stranger, replace(known, blocks="h"))
    use_layout(stranger, replace(known, blocks="inner.transformer.h"))
    assert len(blocks_of(stranger)) == 3


def test_a_mixture_of_experts_has_no_single_down_projection() -> None:
    model = tiny("gpt2")
    use_layout(model, Layout("transformer.h", "attn", "mlp", ""))
    with pytest.raises(InputError, match="'neuron' does not exist"):
        site_width(model, 0, "neuron")
    assert not [check for check in examine(model, tokenizer(), prompts()) if check.name.startswith("neuron")]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("part", ["", "model.layers.1"])
def test_a_compiled_model_is_refused_instead_of_not_steered(part: str) -> None:
    model = tiny("llama")
    model.get_submodule(part).compile(backend="eager")
    model(input_ids=torch.arange(3, 9)[None])
    line = r"^model: it.* compiled, so hooks would not run; give the model as it was before$"
    with pytest.raises(InputError, match=line), random_vector(tiny("llama")).apply(model):
        pass
    with pytest.raises(InputError, match=line), capturing(model, "block"):
        pass


@torch.no_grad()
def test_a_pass_that_leaves_out_a_steered_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another library runs a block by its forward alone, which no hook sees."""
    model = tiny("llama")
    vector, skipped, ids = random_vector(model), blocks_of(model)[2], torch.arange(3, 9)[None]
    call = type(skipped).__call__

    def past_hooks(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return block.forward(*args, **kwargs) if block is skipped else call(block, *args, **kwargs)

    monkeypatch.setattr(type(skipped), "__call__", past_hooks)
    with pytest.raises(InputError, match=r"^model: 1 of 2 steered layers did not run"), vector.apply(model):
        model(input_ids=ids)
    with pytest.raises(InputError, match=r"^model: 1 of 3 captured layers did not run"), capturing(model, "block"):
        model(input_ids=ids)
