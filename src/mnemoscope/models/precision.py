"""Passes in bfloat16 over weights that stay float32, where the hardware multiplies it natively.

Shapes: N prompts, H heads, T tokens, K numbers of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mnemoscope.models.adapters import is_adapted
from mnemoscope.models.layout import core_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["float32", "bfloat16"]

_ATTENTION = "sdpa_in_float32"


def quick_precision(model: PreTrainedModel) -> Precision:
    """The default precision of training passes: bfloat16 where the device has instructions for it, else float32.

    Adapters take float32: passes in another precision would hold a copy of all weights.
    """
    if model.device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
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
