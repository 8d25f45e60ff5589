"""Models: build a small GPT-2, load any causal LM, and the only definition of layer, site and position.

Shapes: N examples, T tokens (columns of a left-padded batch), L layers, D neurons.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from mnemoscope.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.config import ModelConfig

Site = Literal["block", "attention", "mlp", "neuron"]
SITES: tuple[Site, ...] = ("block", "attention", "mlp", "neuron")

END, PAD, UNKNOWN = "<end>", "<pad>", "<unk>"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an architecture keeps its parts, as attribute paths.

    Attributes:
        blocks: path of the list of blocks from the model's root.
        attention, mlp: names inside a block.
        down: name of the down projection inside the MLP; its input are the MLP activations.
    """

    blocks: str
    attention: str
    mlp: str
    down: str


LAYOUTS = (
    Layout("transformer.h", "attn", "mlp", "c_proj"),  # GPT-2
    Layout("gpt_neox.layers", "attention", "mlp", "dense_4h_to_h"),
    Layout("model.layers", "self_attn", "mlp", "down_proj"),  # Llama, Mistral, Qwen, Gemma
)


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model.

    Raises:
        InputError: no known layout fits.
    """
    for layout in LAYOUTS:
        try:
            block = model.get_submodule(layout.blocks)[0]  # type: ignore[index]
            block.get_submodule(layout.attention)
            block.get_submodule(f"{layout.mlp}.{layout.down}")
        except (AttributeError, TypeError):
            continue
        return layout
    raise InputError(f"model: {type(model).__name__} has no known block layout")


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The L blocks of a model, first to last."""
    return model.get_submodule(layout_of(model).blocks)  # type: ignore[return-value]


def site_module(model: nn.Module, layer: int, site: Site) -> tuple[nn.Module, bool]:
    """The module whose output is the site in a layer, and whether it is its *input* instead (site ``neuron``).

    Args:
        layer: 0-based; negative values count from the last.

    Raises:
        InputError: the layer or site does not exist.
    """
    layout, blocks = layout_of(model), blocks_of(model)
    if not -len(blocks) <= layer < len(blocks):
        raise InputError(f"layer: {layer} is not in {-len(blocks)} .. {len(blocks) - 1}")
    block = blocks[layer]
    if site == "block":
        return block, False
    if site == "attention":
        return block.get_submodule(layout.attention), False
    if site == "mlp":
        return block.get_submodule(layout.mlp), False
    if site == "neuron":
        return block.get_submodule(f"{layout.mlp}.{layout.down}"), True
    raise InputError(f"site: {site!r} is not one of {', '.join(SITES)}")


def states_of(value: Any) -> Tensor:
    """The (N, T, D) states in what a module returned: a tensor, or the first entry of a tuple."""
    return value[0] if isinstance(value, tuple) else value


def with_states(value: Any, states_NTD: Tensor) -> Any:
    """What a module returned, with other states."""
    return (states_NTD, *value[1:]) if isinstance(value, tuple) else states_NTD


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its key-value cache; the library renamed it."""
    return "cache" if "cache" in _arguments(type(model).forward) else "past_key_values"


@functools.cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def cache_of(output: Any) -> Any:
    """The key-value cache in a model's output."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def cached_columns(kwargs: dict[str, Any]) -> int:
    """How many columns of the sequence came before a pass, from the keyword arguments of the pass."""
    cache = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, in storage with room for columns to come.

    The library's layer copies all it holds to add a column. This one writes the column behind the others, into storage
    that shallow copies of the layer share: each copy of a prefix starts again where the prefix ends. One copy can be in
    use at a time. Under autograd it copies like the library's, since a graph may still need what it holds.
    """

    def __init__(self, layer: DynamicLayer, columns: int) -> None:
        super().__init__()
        self.device, self.is_initialized = layer.keys.device, True
        self.room: tuple[Tensor, Tensor] | None = (_roomy(layer.keys, columns), _roomy(layer.values, columns))
        self._hold(layer.get_seq_length())

    def _hold(self, columns: int) -> None:
        assert self.room is not None
        self.keys, self.values = self.room[0].narrow(2, 0, columns), self.room[1].narrow(2, 0, columns)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns; see the library's ``DynamicLayer.update``."""
        past = self.get_seq_length()
        columns = past + key_states.shape[-2]
        if self.room is None or torch.is_grad_enabled() or columns > self.room[0].shape[-2]:
            self.room = None  # what is held from now on is no part of it
            return super().update(key_states, value_states, *args, **kwargs)
        self._hold(columns)
        self.keys.narrow(2, past, columns - past).copy_(key_states)
        self.values.narrow(2, past, columns - past).copy_(value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the chosen rows, in storage of their own with as much room."""
        if self.room is None:
            super().batch_select_indices(indices)
            return
        past = self.get_seq_length()
        self.room = (self.room[0].index_select(0, indices), self.room[1].index_select(0, indices))
        self._hold(past)


def _roomy(states_NHTW: Tensor, columns: int) -> Tensor:
    """The same states, followed by columns that hold nothing yet."""
    rows, heads, past, width = states_NHTW.shape
    storage = states_NHTW.new_empty((rows, heads, past + columns, width))
    storage[:, :, :past] = states_NHTW
    return storage


def make_room(cache: Any, columns: int) -> bool:
    """Give a cache, in place, room for columns to come.

    Returns:
        Whether every layer has room now; layers of special kinds, sliding windows for example, stay as they are.
    """
    cache.layers = [RoomyLayer(layer, columns) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def select_rows(cache: Any, rows_R: Tensor | None) -> Any:
    """A cache of the chosen rows (None: all) that later passes can extend; what this one holds stays as it is.

    With all rows the two may share storage, so only the one taken last may be extended (see ``RoomyLayer``).
    """
    copied = copy.copy(cache)
    # A pass replaces a layer's tensors or writes behind them, so copies of the layers can share them.
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    if rows_R is not None:
        copied.batch_select_indices(rows_R)
    return copied


def untouched_blocks(model: PreTrainedModel) -> int:
    """How many of the first blocks return, for one input, what they return without any hook.

    A hook on a block's output changes only what comes after it. Hooks on the whole model are taken to look on.
    """
    parent, _, _ = layout_of(model).blocks.rpartition(".")
    blocks = blocks_of(model)
    beside = (child for child in model.get_submodule(parent).children() if child is not blocks)
    if any(_hooked(module) for child in beside for module in child.modules()):
        return 0
    for number, block in enumerate(blocks):
        if block._forward_pre_hooks or any(_hooked(module) for child in block.children() for module in child.modules()):
            return number
        if block._forward_hooks:
            return number + 1
    return len(blocks)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def recorded_blocks(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Inside the context a pass appends what each untouched first block returns, before any hook on its output."""
    returned: list[Any] = []

    def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            returned.append(forward(*args, **kwargs))
            return returned[-1]

        return recorded

    with _replaced(blocks_of(model)[: untouched_blocks(model)], recording):
        yield returned


@contextmanager
def replayed_blocks(model: PreTrainedModel, count: int, returned: Any) -> Iterator[None]:
    """Inside the context the first ``count`` blocks are not run: a pass goes on from what the last of them returned.

    Hooks on that block see it as usual. Keys and values of the blocks that are not run are not added to a cache.
    """
    with _replaced(blocks_of(model)[:count], lambda forward: lambda *args, **kwargs: returned):
        yield


@contextmanager
def _replaced(blocks: Sequence[nn.Module], by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of blocks; that of their class, or what stood in its place, is back when the context ends."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = by(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def position_ids(mask_NT: Tensor) -> Tensor:
    """Positions of a left-padded batch: the first real token is at 0, pads are filled with 1. Shape (N, T), int64."""
    return (mask_NT.long().cumsum(-1) - 1).masked_fill(mask_NT == 0, 1)


def build_gpt2(tokenizer: PreTrainedTokenizerFast, shape: ModelConfig, seed: int) -> PreTrainedModel:
    """A GPT-2 with random weights for a tokenizer's vocabulary; float32, in evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        # The same function as GPT-2's "gelu_new" in one fused kernel, several times faster on a CPU.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(pattern), "isolated"),
        ]
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


def load_model(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Open a Hugging Face causal language model and its tokenizer, from safetensors only and without remote code.

    Raises:
        InputError: the folder is missing, corrupted, or holds no causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    except Exception as error:  # the library raises many kinds for a broken folder
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"model: {folder} cannot be opened as a causal language model ({reason[0]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that a model can read."""
    return int(getattr(model.config, "max_position_embeddings", 2**31))
