"""Models and tokenizers: plain Hugging Face folders, one definition of layer, site and position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import tiny
from helpers import mini_examples
from mnemoscope.behaviour import Asking
from mnemoscope.models import blocks_of, cache_argument, cache_of, select_rows, site_module
from mnemoscope.models.caches import make_room
from mnemoscope.models.passes import position_ids
from mnemoscope.runs.errors import InputError


def test_what_was_trained_opens_with_plain_transformers(mini: Callable[[str], Asking], tmp_path: Path) -> None:
    ours = mini("addition")
    ours.model.save_pretrained(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompts = [e.prompt for e in mini_examples("addition", 8)]
    assert tokenizer(prompts).input_ids == ours.tokenizer(prompts).input_ids
    ids = torch.tensor([tokenizer(prompts[0]).input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours.model(ids).logits)


def test_positions_of_left_padding_start_at_the_first_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_unknown_layers_sites_and_layouts_are_refused() -> None:
    model = tiny("gpt2")
    assert site_module(model, -1, "block") == site_module(model, 2, "block")
    with pytest.raises(InputError, match="layer: 3"):
        site_module(model, 3, "block")
    with pytest.raises(InputError, match="site: 'expert'"):
        site_module(model, 0, "expert")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no known block layout"):
        blocks_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_cache_with_room_is_read_like_the_librarys_and_stays_as_it_is(family: str) -> None:
    model = tiny(family)
    ids = torch.arange(21).reshape(3, 7) % 40

    def after(cache: object, ids: torch.Tensor) -> dict[str, object]:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})

    prefix, rows = cache_of(after(None, ids[:, :5])), torch.tensor([2, 0])
    some, every = (after(select_rows(prefix, x), ids[y, 5:]).logits for x, y in ((rows, rows), (None, slice(None))))
    assert make_room(prefix, 2)
    held = [layer.keys.clone() for layer in prefix.layers]
    for _ in range(2):
        first = cache_of(after(select_rows(prefix, None), ids[:, 5:6]))
        assert first.get_seq_length() == 6
        torch.testing.assert_close(after(first, ids[:, 6:]).logits, every[:, 1:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after(select_rows(prefix, rows), ids[rows, 5:]).logits, some, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after(select_rows(prefix, None), ids[:, 5:]).logits, every, rtol=1e-5, atol=1e-5)
    beyond = cache_of(after(select_rows(prefix, None), ids))
    assert beyond.get_seq_length() == 12, "more columns than there is room for"
    assert prefix.get_seq_length() == 5
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefix.layers, held, strict=True))
