"""Passes in bfloat16 over weights that stay float32, where the hardware multiplies it natively.

Shapes: N prompts, H heads, T tokens, K numbers of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mnemoscope.models.adapters import is_adapted
from mnemoscope.models.layout import core_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["float32", "bfloat16"]

_ATTENTION = "sdpa_in_float32"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them it is emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)


def quick_precision(model: PreTrainedModel) -> Precision:
    """What passes that teach something are in, where nobody said; of adapters float32.

    A pass in another precision would hold all weights of an adapted model once more.
    """
    lower = model.dtype == torch.float32 and not is_adapted(model) and multiplies_bfloat16(model.device)
    return "bfloat16" if lower else "float32"


def in_precision(model: PreTrainedModel, precision: Precision) -> AbstractContextManager[None]:
    """Matrix products of a model's passes as ``quick_precision`` names it, while this is open."""
    return in_bfloat16(model) if precision == "bfloat16" else nullcontext()


@contextmanager
def in_bfloat16(model: PreTrainedModel) -> Iterator[None]:
    """Matrix products of a model's passes in bfloat16 while this is open, and of gradients that begin in it.

    On a CPU attention itself stays in float32: torch's fused kernel for bfloat16 takes several times as long there
    unless the processor multiplies tiles (docs/LOG.md).
    """
    config = core_of(model).config
    before = config._attn_implementation
    device = model.device.type
    alone = device == "cpu" and before == "sdpa"
    if alone:
        _register()
        core_of(model).set_attn_implementation(_ATTENTION)
    try:
        with torch.autocast(device, torch.bfloat16):
            yield
    finally:
        if alone:
            core_of(model).set_attn_implementation(before)


def _register() -> None:
    """Tell the library of attention in float32; its masks are those of the kernel that it calls."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _in_float32)
    AttentionMaskInterface.register(_ATTENTION, AttentionMaskInterface()["sdpa"])


def _in_float32(
    module: torch.nn.Module,
    query_NHTK: Tensor,
    key_NHTK: Tensor,
    value_NHTK: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    from transformers import AttentionInterface

    plain = AttentionInterface()["sdpa"]
    with torch.autocast("cpu", enabled=False):
        found, _ = plain(module, query_NHTK.float(), key_NHTK.float(), value_NHTK.float(), mask, **options)
    return found.to(query_NHTK.dtype), None
