"""Matrix products of linear layers by the quicker of the two libraries that torch has for them on a processor.

Shapes: D neurons in, E neurons out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

# Weights, below which a call of the other library may cost what it saves. Not a matter of the number of rows: a pass
# over few prompts has to give the bits that one over many gives.
LEAST = 2**14
UNWRAPPED = (Tensor, nn.Parameter)


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside the context linear layers of float32 that are not trained are multiplied by oneDNN where that is quicker.

    torch takes MKL, which leaves AVX-512 of AMD processors unused (`benchmarks/products.py`). Results differ from those
    of MKL as any two orders of summation do. Passes in other precisions, layers that are trained and other devices are
    left alone.
    """
    if not _is_quicker():
        yield
        return
    with _ByOneDNN():
        yield


@cache
def _is_quicker() -> bool:
    """Whether oneDNN uses instructions that MKL does not."""
    has_it = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not (has_it and torch.backends.mkl.is_available() and sys.platform == "linux"):
        return False
    try:
        described = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and "AuthenticAMD" in described


class _ByOneDNN(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if kwargs or func not in (nn.functional.linear, torch.addmm):
            return func(*args, **(kwargs or {}))
        states, weight_ED, bias_E = (*args, None)[:3] if func is nn.functional.linear else _turned(*args)
        if not _is_for_onednn(states, weight_ED, bias_E):
            return func(*args)
        if torch.is_grad_enabled() and states.requires_grad:
            return _Product.apply(states, weight_ED, bias_E)
        return _product(states, weight_ED, bias_E)


def _turned(bias_E: Any, states_ND: Any, weight_DE: Any) -> tuple[Any, Any, Any]:
    """What `addmm` is given by layers whose weight lies the other way round (GPT-2's `Conv1D`), as `linear` has it."""
    is_layer = all(type(part) in UNWRAPPED for part in (bias_E, states_ND, weight_DE)) and bias_E.dim() == 1
    return states_ND, weight_DE.t() if is_layer else None, bias_E


def _is_for_onednn(states: Any, weight_ED: Any, bias_E: Any = None) -> bool:
    return (
        type(states) is Tensor
        and type(weight_ED) in UNWRAPPED
        and states.dtype == weight_ED.dtype == torch.float32
        and states.device.type == weight_ED.device.type == "cpu"
        and weight_ED.numel() >= LEAST
        and not (torch.is_grad_enabled() and (weight_ED.requires_grad or (bias_E is not None and bias_E.requires_grad)))
        and not torch.is_autocast_enabled("cpu")
    )


def _product(states: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Of states (..., D), the product (..., E)."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight_ED, bias_E, "none", [], "")
    return found


class _Product(torch.autograd.Function):
    """The same with the gradient of the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_ED)
        return _product(states, weight_ED, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight_ED,) = ctx.saved_tensors
        return _product(gradient.contiguous(), weight_ED.t()), None, None
