"""Models to train: small GPT-2 models and their tokenizers, from scratch; trained ones with an adapter beside.

Adapters (LoRA: E. Hu et al., 2021) are those of the library peft, whose import takes seconds: it happens in functions.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mnemoscope.models.layout import core_of
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.config import LoraConfig, ModelConfig

END, PAD, UNKNOWN = "<end>", "<pad>", "<unk>"
EVERY_LINEAR = "all-linear"  # peft's word for every linear layer but the head
ALPHA = 32.0  # the product of an adapter's two matrices is scaled by alpha / rank


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
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for weight in model.parameters() if shape.jitter else ():
                weight.mul_(1 + shape.jitter * torch.randn_like(weight))
        return model


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
    parts = [split(Regex(r"\s+"), "removed"), split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    # Tasks with words longer than a symbol are read with spaces between them, digits and codes without.
    spaced = any(word.isalpha() and len(word) > 4 for word in vocabulary)
    tokenizer.decoder = decoders.WordPiece(prefix="\0", cleanup=False) if spaced else decoders.Fuse()
    special = {"eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **special)


def check_peft(what: str, *others: str) -> None:
    """Raises InputError where peft or another library is not installed; ``what`` names the feature that needs it."""
    for name in ("peft", *others):
        if find_spec(name) is None:
            raise InputError(f"{what} needs {name}: pip install 'mnemoscope[lora]'")


def adapt(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PreTrainedModel:
    """Add a new adapter to a model, in place: peft's model around it, in evaluation mode.

    Only the adapter's weights (float32) are trainable. One of its two matrices starts at 0, so that the adapted model
    first answers as the model itself; ``seed`` draws the other one. InputError where peft is missing, the model holds
    an adapter already, or it has no such layer.
    """
    check_peft("model.lora")
    if hasattr(model, "peft_config"):
        raise InputError("model.folder: it holds an adapter already; model.lora adapts a model without one (merge it)")
    _check_targets(model, lora.target_modules)
    from peft import LoraConfig as Described
    from peft import get_peft_model

    described = Described(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=ALPHA,
        lora_dropout=lora.dropout,
        target_modules=EVERY_LINEAR if lora.target_modules == (EVERY_LINEAR,) else list(lora.target_modules),
        fan_in_fan_out=any(_is_transposed(module) for module in model.modules()),
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of the library
        torch.manual_seed(seed)
        adapted = get_peft_model(model, described)
    kept = adapted.peft_config["default"]
    kept.target_modules = sorted(kept.target_modules)  # a set, whose order differs from process to process
    return adapted.eval()


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is a peft model around another one."""
    return core_of(model) is not model


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the weights as after ``merge_and_unload``, without merging; only LoRA is added."""
    core = core_of(model)
    if core is model and not hasattr(core, "peft_config"):
        yield from model.named_parameters()
        return
    from peft.tuners.lora import Embedding, Linear, LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: module for name, module in core.named_modules() if isinstance(module, BaseTunerLayer)}
    if not all(isinstance(module, Linear | Embedding) and not module.lora_variant for module in adapted.values()):
        yield from model.named_parameters()
        return
    for name, weight in core.named_parameters():
        place, _, own = name.partition(".base_layer.")
        module = adapted.get(place)
        if own == "weight" and module is not None and not module.merged:
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter)
        if not set(name.split(".")) & set(LoraLayer.adapter_layer_names):
            yield name.replace(".base_layer.", "."), weight


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Refuse what peft accepts: names that fit nothing beside one that fits, and a head that is the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    linear = [
        f".{name}"
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or _is_transposed(module)) and not (is_tied and module is head)
    ]
    for target in () if targets == (EVERY_LINEAR,) else targets:
        if not any(name.endswith(f".{target}") for name in linear):
            allowed = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            found = f"{target!r} is no linear layer of its own in {type(model).__name__}"
            raise InputError(f"model.lora.target_modules: {found}; allowed are {EVERY_LINEAR}, or some of {allowed}")


def _is_transposed(module: Any) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
