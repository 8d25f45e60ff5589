"""The self-check on every family, and on models that are ill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from families import FAMILIES, MORE, prompts, tiny, tokenizer
from helpers import hook_count
from mnemoscope.face.doctor import Check, examine
from mnemoscope.models import Layout, blocks_of, layout_of, site_module, use_layout
from mnemoscope.runs.errors import InputError


def checks(model: PreTrainedModel) -> dict[str, Check]:
    return {check.name: check for check in examine(model, tokenizer(), prompts())}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_is_well(family: str) -> None:
    found = checks(tiny(family))
    assert len(found) == 28
    assert [check for check in found.values() if not check.passed] == []


def wrong_layouts(model: PreTrainedModel) -> dict[str, Layout]:
    """Layouts whose parts exist: a norm in the place of attention, another end of the MLP as its down projection."""
    right, block = layout_of(model), blocks_of(model)[0]
    norms = [name for name, module in block.named_modules() if "norm" in type(module).__name__.lower()]
    # Families that norm only what they add have no other norm; there, attention before its norm is wrong.
    norm = next((n for n in norms if "." not in n and n not in (right.attention, right.mlp)), "self_attn")
    inside = [name for name, module in block.named_modules() if hasattr(module, "weight") and "mlp" in name]
    ups = [name for name in inside if name not in (right.down, right.mlp) and "norm" not in name]
    wrong = {"block output = input + attention + MLP": replace(right, attention=norm)}
    return wrong | ({"the down projection ends the MLP": replace(right, down=ups[0])} if ups and right.down else {})


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "phi3"])
def test_a_wrong_layout_does_not_pass(family: str) -> None:
    for name, layout in wrong_layouts(tiny(family)).items():
        model = tiny(family)
        use_layout(model, layout)
        assert not next(check for check in examine(model, tokenizer(), prompts()) if check.name == name).passed


def test_a_layer_without_attention_is_one_line() -> None:
    """As in hybrid models, some of whose layers mix tokens in another way."""
    model = tiny("llama")
    layout_of(model)
    blocks_of(model)[1].mixer = blocks_of(model)[1].self_attn
    del blocks_of(model)[1].self_attn
    with pytest.raises(InputError, match=r"^site: 'attention' does not exist in layer 1 of LlamaForCausalLM$"):
        site_module(model, 1, "attention")


def test_what_is_wrong_with_a_model_is_found_out() -> None:
    """Padding that counts, a cache that is forgotten, dropout left on."""

    def failed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> set[str]:
        model = tiny("llama")
        healthy = model.forward
        model.forward = lambda **kwargs: healthy(**change(kwargs))  # type: ignore[method-assign]
        return {name for name, check in checks(model).items() if not check.passed}

    padding = failed(lambda kwargs: kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])})
    assert "batched and padded = single" in padding
    uncached = failed(lambda kwargs: {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")})
    assert "cached = uncached" in uncached
    assert "batched and padded = single" not in uncached
    found = checks(tiny("gpt2").train())
    assert not found["afterwards = before"].passed
    assert not found["block: alpha 0 = untouched"].passed


def test_what_is_no_number_does_not_pass() -> None:
    """Also where it is no number for one prompt only."""
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[tokenizer().convert_tokens_to_ids(prompts()[1].split()[0])] = torch.nan
    for check in islice(examine(model, tokenizer(), prompts()), 2):
        assert np.isnan(check.difference)
        assert not check.passed


def test_half_precision_has_a_tolerance_of_its_own() -> None:
    model = tiny("llama").to(torch.bfloat16)
    found = checks(model)
    assert all(check.passed for check in found.values())
    assert found["cached = uncached"].allowed > 0.01
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("w1 w2", "all have one length"), ("", ".* has 0 tokens; allowed are 1 to"), ("w1 " * 80, ".* has 80 tokens")],
)
def test_prompts_that_show_nothing_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^prompts: {message}"):
        list(examine(tiny("gpt2"), tokenizer(), [prompt, "w3 w4"]))
