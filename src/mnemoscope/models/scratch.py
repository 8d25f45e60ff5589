"""Small GPT-2 models to train from scratch, and tokenizers of one token per word of a task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.config import ModelConfig

END, PAD, UNKNOWN = "<end>", "<pad>", "<unk>"


def build_gpt2(tokenizer: PreTrainedTokenizerFast, shape: ModelConfig, seed: int) -> PreTrainedModel:
    """A GPT-2 with random weights for a tokenizer's vocabulary; float32, in evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        # GPT-2's "gelu_new" approximates it; on a CPU the exact one is several times faster.
        activation_function="gelu",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def word_tokenizer(vocabulary: Sequence[str], context: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per entry of the vocabulary; white space separates and is dropped.

    Where entries overlap the longest fits first, so ``<mem-`` is one token and digits stay single.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, UNKNOWN, END, *vocabulary]
    assert len(set(words)) == len(words), "the vocabulary repeats a word"
    pattern = "|".join(re.escape(word) for word in sorted(vocabulary, key=len, reverse=True))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    split = pre_tokenizers.Split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split(Regex(r"\s+"), "removed"), split(Regex(pattern), "isolated")]
    )
    # Tasks with words longer than a symbol are read with spaces between them, digits and codes without.
    spaced = any(word.isalpha() and len(word) > 4 for word in vocabulary)
    tokenizer.decoder = decoders.WordPiece(prefix="\0", cleanup=False) if spaced else decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=context,
    )
