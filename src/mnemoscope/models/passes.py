"""Inputs and precision of passes, and passes that replay recorded outputs of the blocks below the first hook.

Shapes: N examples, T tokens (columns) of a left-padded batch, H heads, K numbers of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mnemoscope.models.caches import arguments_of, cache_argument
from mnemoscope.models.layout import backbone_of, blocks_of, core_of
from mnemoscope.models.trainable import is_adapted
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["float32", "bfloat16"]
_ATTENTION = "sdpa_in_float32"
# Settings of ``generate`` that override a model's defaults, so that its logits alone decide a text.
PLAINLY: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}

_PROMPTS: ContextVar[Tensor | None] = ContextVar("prompts", default=None)


@contextmanager
def rows_of_prompts(prompt_R: Tensor) -> Iterator[None]:
    """Inside the context row r of a pass belongs to prompt ``prompt_R[r]``, for factors that differ by prompt."""
    token = _PROMPTS.set(prompt_R)
    try:
        yield
    finally:
        _PROMPTS.reset(token)


def has_known_rows(rows: int) -> bool:
    """Whether ``rows_of_prompts`` says of which prompt each row of a pass is."""
    prompt_R = _PROMPTS.get()
    return prompt_R is not None and len(prompt_R) == rows


def prompts_of_rows(rows: int, prompts: int) -> Tensor:
    """The prompt of each row of a pass, int64 (rows,): that of ``rows_of_prompts``, else consecutive equal shares.

    Raises InputError where there is no context, and the rows are no multiple of the prompts.
    """
    prompt_R = _PROMPTS.get()
    if prompt_R is not None and len(prompt_R) == rows:
        return prompt_R
    copies, rest = divmod(rows, prompts)
    if rest:
        raise InputError(f"alpha, gate: {prompts} factors for a batch of {rows} rows")
    return torch.arange(prompts).repeat_interleave(copies)


def position_ids(mask_NT: Tensor) -> Tensor:
    """Positions of a left-padded batch: the first real token is at 0, pads are filled with 1. Shape (N, T), int64."""
    return (mask_NT.long().cumsum(-1) - 1).masked_fill(mask_NT == 0, 1)


def pass_inputs(model: nn.Module, ids_NT: Tensor, mask_NT: Tensor, cache: Any = None) -> dict[str, Any]:
    """Arguments of a pass over the columns ``ids_NT`` behind a cache; ``mask_NT`` covers the cached columns too."""
    inputs = {"input_ids": ids_NT, "attention_mask": mask_NT, "use_cache": True}
    if "position_ids" in arguments_of(model):  # other models derive them from the mask
        inputs["position_ids"] = position_ids(mask_NT)[:, -ids_NT.shape[1] :]
    return inputs if cache is None else inputs | {cache_argument(model): cache}


def with_last_logits(model: PreTrainedModel, inputs: dict[str, Any], columns: int = 1) -> Any:
    """The output of a pass, with logits of its last columns (N, columns, V).

    The head is given these states in one piece: of a part of a tensor torch multiplies row by row, eight times as long.
    """
    with _head_given(model, Tensor.contiguous):
        return model(**inputs, logits_to_keep=columns)


@contextmanager
def _head_given(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the context the head of the vocabulary, where a model has one, is given changed states."""

    def changing(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda states, *others, **named: forward(change(states), *others, **named)

    head = model.get_output_embeddings()
    with replaced_forward([head] if isinstance(head, nn.Module) else [], changing):
        yield


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], read_NT: Tensor) -> Tensor:
    """Logits (K, V) of a pass at some tokens, in order: the head of a large vocabulary costs more than the blocks."""
    shape = (*read_NT.shape,)

    def chosen(states: Tensor) -> Tensor:
        return states[read_NT.to(states.device)][None] if states.shape[:2] == shape else states

    with _head_given(model, chosen):
        logits = model(**inputs).logits
    whole = logits.shape[:2] == shape and shape != (1, int(read_NT.sum()))
    return logits[read_NT.to(logits.device)] if whole else logits[0]


def untouched_blocks(model: PreTrainedModel) -> int:
    """Number of first blocks whose own output no hook changes; hooks on the whole model are taken to only read.

    A hook on a block's output counts for the blocks after it.
    """
    blocks = blocks_of(model)
    beside = (child for child in backbone_of(model).children() if child is not blocks)
    if any(_hooked(module) for child in beside for module in child.modules()):
        return 0
    for number, block in enumerate(blocks):
        if block._forward_pre_hooks or any(_hooked(part) for part in list(block.modules())[1:]):
            return number
        if block._forward_hooks:
            return number + 1
    return len(blocks)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def recorded_blocks(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Inside the context a pass appends the output of each untouched first block, before any hook on it."""
    returned: list[Any] = []

    def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            returned.append(forward(*args, **kwargs))
            return returned[-1]

        return recorded

    with replaced_forward(blocks_of(model)[: untouched_blocks(model)], recording):
        yield returned


@contextmanager
def replayed_blocks(model: PreTrainedModel, count: int, returned: Any) -> Iterator[None]:
    """Inside the context a pass skips the first ``count`` blocks and starts from what the last of them ``returned``.

    Hooks on that block run as usual. The skipped blocks add no keys and values to a cache.
    """
    with replaced_forward(blocks_of(model)[:count], lambda forward: lambda *args, **kwargs: returned):
        yield


@contextmanager
def replaced_forward(
    modules: Sequence[nn.Module], by: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside the context the forward of modules is replaced by what a function makes of it."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = by(module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


@cache
def is_amd() -> bool:
    """Whether this is a processor of AMD's, on Linux: of its AVX-512, MKL uses nothing for float32."""
    try:
        return sys.platform == "linux" and "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


def quick_precision(model: PreTrainedModel) -> Precision:
    """The default precision of training passes: bfloat16 where the device multiplies it faster, else float32.

    Processors with tiles do; of those that have no more than AVX-512's instructions for it, AMD's do, where float32 is
    multiplied without AVX-512, and Intel's take twice as long (docs/LOG.md). Looked up, not measured: it changes the
    weights that are learned. Adapters take float32: passes in another precision would hold a copy of all weights.
    """
    if model.device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = ["_is_amx_tile_supported", *(["_is_avx512_bf16_supported"] if is_amd() else [])]
        is_native = model.device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)
    return "bfloat16" if is_native and model.dtype == torch.float32 and not is_adapted(model) else "float32"


@contextmanager
def in_precision(model: PreTrainedModel, precision: Precision) -> Iterator[None]:
    """Matrix products of a model's passes, and of gradients that begin here, in a precision.

    On a CPU attention stays in float32: torch's fused kernel for bfloat16 takes several times as long there unless the
    processor multiplies tiles (docs/LOG.md).
    """
    if precision == "float32":
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    core, device = core_of(model), model.device.type
    before = core.config._attn_implementation
    replaces = device == "cpu" and before == "sdpa"
    if replaces:
        AttentionInterface.register(_ATTENTION, _in_float32)
        AttentionMaskInterface.register(_ATTENTION, AttentionMaskInterface()["sdpa"])
        core.set_attn_implementation(_ATTENTION)
    try:
        with torch.autocast(device, torch.bfloat16):
            yield
    finally:
        if replaces:
            core.set_attn_implementation(before)


def _in_float32(module: nn.Module, query_NHTK: Tensor, *given: Any, **options: Any) -> tuple[Tensor, None]:
    from transformers import AttentionInterface

    key_NHTK, value_NHTK, mask = given
    with torch.autocast("cpu", enabled=False):
        found, _ = AttentionInterface()["sdpa"](
            module, query_NHTK.float(), key_NHTK.float(), value_NHTK.float(), mask, **options
        )
    return found.to(query_NHTK.dtype), None
