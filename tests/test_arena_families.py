"""Heads of every family: where they are, and two passes with and without a cache, against hooks of plain torch."""

from __future__ import annotations

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
    **dict.fromkeys(("gpt2", "falcon", "bloom", "gptj", "gpt_neo", "gpt_neox", "opt", "phi"), ""),
    **{"gpt2": "attn.c_proj", "gpt_neo": "attn.attention.out_proj", "gptj": "attn.out_proj"},
    **{"gpt_neox": "attention.dense", "opt": "self_attn.out_proj", "phi": "self_attn.dense"},
    **{"falcon": "self_attention.dense", "bloom": "self_attention.dense"},
}


def projections(family: str, model: Any) -> list[Any]:
    return [block.get_submodule(PATHS.get(family, "self_attn.o_proj")) for block in blocks_of(model)]


def left_padded(asking: Asking) -> dict[str, Any]:
    inputs = asking.padded(prompts())
    return pass_inputs(asking.model, inputs.input_ids, inputs.attention_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_what_the_output_projection_reads(family: str) -> None:
    model = tiny(family)
    asking, given = Asking(model, tokenizer()), dict[int, Tensor]()
    inputs = left_padded(asking)

    def keep(layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        given[layer] = args[0].detach().clone()

    handles = [m.register_forward_pre_hook(partial(keep, n)) for n, m in enumerate(projections(family, model))]
    with torch.no_grad(), capturing(model, "head", offsets=None) as states:
        model(**inputs)
    for handle in handles:
        handle.remove()
    heads, width = heads_of(model, 0)
    assert heads == 4
    for layer, state in enumerate(states):
        assert state.shape == (*inputs["input_ids"].shape, heads * width)
        assert torch.equal(state.flatten(), given[layer].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_are_the_same_with_and_without_a_cache(family: str) -> None:
    model = tiny(family)
    asking = Asking(model, tokenizer())
    heads, width = heads_of(model, 1)
    torch.manual_seed(1)
    factors = {layer: 100 * torch.randn(heads * width) for layer in (0, 2)}  # weights of such models are small
    inputs = asking.padded(prompts())
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts, two = [], TwoRuns(toward="memorized", factors=factors)
    one = SteeringVector("memorized", {layer: Scale(factor) for layer, factor in factors.items()}, "head")
    for cached in (True, False):
        with torch.no_grad(), two.apply(model):
            texts.append(model.generate(**inputs, use_cache=cached, **options).tolist())
    assert texts[0] == texts[1]
    # By hand: both passes over the whole text each time, the first one plain.
    start, ids, mask = inputs.input_ids.shape[1] - 1, inputs.input_ids, inputs.attention_mask
    for _ in range(6):
        logits = _second_pass(family, model, ids, mask, (factors, start))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert ids.tolist() == texts[0]
    # One pass scales what the changed layers below have made of it, which is something else.
    with torch.no_grad(), one.apply(model, start=start):
        found = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    assert not torch.allclose(found, _second_pass(family, model, ids, mask, (factors, start))[:, -1], atol=1e-3)
    with torch.no_grad(), one.scaled(0.0).apply(model), two.scaled(0.0).apply(model):
        plain = model.generate(**inputs, **options).tolist()
    assert plain == model.generate(**inputs, **options).tolist()
    with torch.no_grad():
        own = model(**pass_inputs(model, ids, mask)).logits
    assert not torch.allclose(own, _second_pass(family, model, ids, mask, (factors, start)), atol=1e-2)


def _second_pass(family: str, model: Any, ids: Tensor, mask: Tensor, added: tuple[dict[int, Tensor], int]) -> Tensor:
    factors, start = added
    given, found = dict[int, Tensor](), projections(family, model)

    def keep(layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        given[layer] = args[0].detach().clone()

    def add(layer: int, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape = (len(ids), -1, args[0].shape[-1])
        states, first = args[0].clone().view(shape), given[layer].view(shape)
        states[:, start:] += factors[layer] * first[:, start:]
        return (states.view(args[0].shape), *args[1:])

    for hook in (keep, add):
        handles = [found[layer].register_forward_pre_hook(partial(hook, layer)) for layer in factors]
        with torch.no_grad():
            logits = model(**pass_inputs(model, ids, mask)).logits
        for handle in handles:
            handle.remove()
    return logits


def test_a_model_whose_heads_are_not_found_is_refused_in_one_line() -> None:
    model = tiny("llama")
    for block in blocks_of(model):
        block.self_attn.final = block.self_attn.o_proj
        del block.self_attn.o_proj
    with pytest.raises(InputError, match="site: 'head' does not exist in layer 0 of LlamaForCausalLM"):
        heads_of(model, 0)
