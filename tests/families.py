"""Tiny models with random weights of the families that people use, and a tokenizer for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mnemoscope.behaviour import continued
from mnemoscope.models import word_tokenizer

WORDS = [f"w{i}" for i in range(61)]
_SHARED = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
_GROUPED = {**_SHARED, "num_key_value_heads": 2}
_HEADED = {**_GROUPED, "head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt_neo": {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64, "window_size": 4}
    | {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": _SHARED,
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 4},  # shorter than the prompts of the tests
    "qwen2": _GROUPED,
    "qwen3": _HEADED,
    "gemma": _HEADED,
    "gemma2": {**_HEADED, "sliding_window": 4},
    "gemma3_text": {**_HEADED, "sliding_window": 4},
    "opt": {**_SHARED, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "phi": _SHARED,
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "falcon": {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "cohere": _GROUPED,
    "nanochat": _GROUPED,  # its last norm comes before its blocks too
}

MORE = ("smollm3", "olmo", "olmo3", "granite", "glm4", "gpt_bigcode", "exaone4")  # that only the doctor sees


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A model of a family with three blocks, float32 weights drawn from one seed."""
    special = {"vocab_size": 64, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **special | FAMILIES.get(family, _GROUPED) | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    return word_tokenizer(WORDS, 64)


def prompts() -> list[str]:
    """Prompts of different lengths."""
    return [" ".join(WORDS[(7 * row + 3 * i) % 61] for i in range(n)) for row, n in enumerate((5, 9, 2, 12))]


def complete(model: PreTrainedModel, words: PreTrainedTokenizerFast, inputs: Any, tokens: int) -> list[str]:
    ids_NT, _, width = continued(model, words, inputs, tokens)
    return words.batch_decode(ids_NT[:, width:], skip_special_tokens=True)
