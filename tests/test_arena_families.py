"""Heads of every family: where they are, and two passes with and without a cache, against hooks of plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, prompts, tiny, tokenizer
from mnemoscope.behaviour import Asking, capturing
from mnemoscope.interventions import Scale, SteeringVector
from mnemoscope.models import blocks_of, heads_of, pass_inputs
from mnemoscope.rivals.juice import TwoRuns
from mnemoscope.runs.errors import InputError

# Where each family has the output projection of its attention, by its own source.
PATHS = {
    **{"gpt2": "attn.c_proj", "gpt_neo": "attn.attention.out_proj", "gptj": "attn.out_proj"},
    **{"gpt_neox": "attention.dense", "opt": "self_attn.out_proj", "phi": "self_attn.dense"},
    **{"falcon": "self_attention.dense", "bloom": "self_attention.dense"},
}
Hook = Callable[[int, Any, tuple[Tensor, ...]], Any]


@contextmanager
def hooked(family: str, model: Any, hook: Hook, layers: tuple[int, ...] = (0, 1, 2)) -> Iterator[None]:
    """A hook of plain torch, given the layer, on what output projections read."""
    path = PATHS.get(family, "self_attn.o_proj")
    found = [(layer, blocks_of(model)[layer].get_submodule(path)) for layer in layers]
    handles = [module.register_forward_pre_hook(partial(hook, layer)) for layer, module in found]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_what_the_output_projection_reads(family: str) -> None:
    model, given = tiny(family), dict[int, Tensor]()
    inputs = Asking(model, tokenizer()).padded(prompts())
    heads, width = heads_of(model, 0)
    keep: Hook = lambda layer, module, args: given.update({layer: args[0].detach().clone()})  # noqa: E731
    with torch.no_grad(), hooked(family, model, keep), capturing(model, "head", offsets=None) as states:
        model(**pass_inputs(model, inputs.input_ids, inputs.attention_mask))
    assert heads == 4
    for layer, state in enumerate(states):
        assert state.shape == (*inputs["input_ids"].shape, heads * width)
        assert torch.equal(state.flatten(), given[layer].flatten())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "falcon", "gemma2", "bloom"])
def test_two_passes_are_the_same_with_and_without_a_cache(family: str) -> None:
    model = tiny(family)
    heads, width = heads_of(model, 1)
    torch.manual_seed(1)
    factors = {layer: 100 * torch.randn(heads * width) for layer in (0, 2)}  # weights of such models are small
    inputs = Asking(model, tokenizer()).padded(prompts())
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    edits, texts = {layer: Scale(factor) for layer, factor in factors.items()}, []
    two, one = TwoRuns("memorized", edits, "head"), SteeringVector("memorized", edits, "head")
    for cached in (True, False):
        with torch.no_grad(), two.apply(model):
            texts.append(model.generate(**inputs, use_cache=cached, **options).tolist())
    assert texts[0] == texts[1]
    # By hand: both passes over the whole text each time, the first one plain.
    start, ids, mask = inputs.input_ids.shape[1] - 1, inputs.input_ids, inputs.attention_mask
    given = dict[int, Tensor]()

    def add(layer: int, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape = (len(ids), -1, args[0].shape[-1])
        states, first = args[0].clone().view(shape), given[layer].view(shape)
        states[:, start:] += factors[layer] * first[:, start:]
        return (states.view(args[0].shape), *args[1:])

    def second_pass() -> Tensor:
        keep: Hook = lambda layer, module, args: given.update({layer: args[0].clone()})  # noqa: E731
        for hook in (keep, add):
            with torch.no_grad(), hooked(family, model, hook, (0, 2)):
                logits = model(**pass_inputs(model, ids, mask)).logits
        return logits

    for _ in range(6):
        ids = torch.cat([ids, second_pass()[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert ids.tolist() == texts[0]
    # One pass scales what the changed layers below have made of it, which is something else.
    with torch.no_grad(), one.apply(model, start=start):
        found = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    assert not torch.allclose(found, second_pass()[:, -1], atol=1e-3)
    with torch.no_grad(), two.apply(model, alpha=[1.0, 0.0] * (len(ids) // 2)):
        mixed = model.generate(**inputs, **options).tolist()
    plain = model.generate(**inputs, **options).tolist()
    assert mixed == [(plain if row % 2 else texts[0])[row] for row in range(len(ids))]


def test_a_model_whose_heads_are_not_found_is_refused_in_one_line() -> None:
    model = tiny("llama")
    for block in blocks_of(model):
        block.self_attn.final = block.self_attn.o_proj
        del block.self_attn.o_proj
    with pytest.raises(InputError, match="site: 'head' does not exist in layer 0 of LlamaForCausalLM"):
        heads_of(model, 0)
