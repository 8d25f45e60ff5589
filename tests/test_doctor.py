"""The self-check on every family, and on models that are ill."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from families import FAMILIES, prompts, tiny, tokenizer
from helpers import hook_count
from mnemoscope.behaviour import capturing
from mnemoscope.doctor import Check, examine
from mnemoscope.errors import InputError
from mnemoscope.models import SITES, layout_of, site_module


def checks(model: PreTrainedModel) -> dict[str, Check]:
    return {check.name: check for check in examine(model, tokenizer(), prompts())}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_well(family: str) -> None:
    found = checks(tiny(family))
    assert len(found) == 24
    assert [check for check in found.values() if not check.passed] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_block_adds_is_attention_and_mlp(family: str) -> None:
    """Block output = block input + attention + MLP, wherever norms stand; the MLP comes of its activations."""
    model = tiny(family)
    ids = torch.arange(12).reshape(2, 6) + 3
    read = {}
    for site in SITES:
        with torch.no_grad(), capturing(model, site) as states:
            model(input_ids=ids)
        read[site] = states
    for layer in (1, 2):
        total = read["block"][layer - 1] + read["attention"][layer] + read["mlp"][layer]
        torch.testing.assert_close(total, read["block"][layer], rtol=1e-5, atol=1e-5)
        down, is_input = site_module(model, layer, "neuron")
        assert is_input
        if "norm" not in layout_of(model).mlp:
            torch.testing.assert_close(down(read["neuron"][layer]), read["mlp"][layer], rtol=1e-5, atol=1e-6)


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
