"""Matrix products of linear layers by the quicker of the two libraries that torch has for them on a processor.

Shapes: D neurons in, E neurons out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock, local
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

# Weights, below which a call of the other library may cost what it saves. Not a matter of the number of rows: a pass
# over few prompts has to give the bits that one over many gives.
LEAST = 2**14
UNWRAPPED = (Tensor, nn.Parameter)


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside the context linear layers of float32 that are not trained are multiplied by oneDNN where that is quicker.

    torch takes MKL, which leaves AVX-512 of AMD processors unused (`benchmarks/products.py`). Results differ from those
    of MKL as any two orders of summation do. Passes in other precisions, layers that are trained, other devices and
    other threads are left alone.
    """
    if not _is_quicker():
        yield
        return
    before, _here.wanted = _is_wanted(), True
    _replace(1)
    try:
        yield
    finally:
        _here.wanted = before
        _replace(-1)


@cache
def _is_quicker() -> bool:
    """Whether oneDNN uses instructions that MKL does not."""
    has_it = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_both = has_it and torch.backends.mkl.is_available()
    return has_both and "AVX512" in torch.backends.cpu.get_cpu_capability() and is_amd()


@cache
def is_amd() -> bool:
    """Whether this is a processor of AMD's, on Linux: of its AVX-512, MKL uses nothing for float32."""
    try:
        return sys.platform == "linux" and "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


# What layers compute is replaced in their classes: to look at every call of torch costs a tenth of a short pass.
_here, _lock, _contexts = local(), RLock(), 0
PLAIN: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}


def _is_wanted() -> bool:
    """Whether this thread is inside the context."""
    return getattr(_here, "wanted", False)


def _replace(contexts: int) -> None:
    """Count contexts of all threads that begin or end; the layers are the library's own again after the last."""
    global _contexts
    with _lock:
        _contexts += contexts
        for kind, forward in (PLAIN if not _contexts else {nn.Linear: _linear, Conv1D: _turned}).items():
            kind.forward = forward


def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    if not _is_for_onednn(input, self.weight, self.bias):
        return PLAIN[nn.Linear](self, input)
    return _multiplied(input, self.weight, self.bias)


def _turned(self: Conv1D, x: Tensor) -> Tensor:
    """GPT-2's layer, whose weight lies the other way round."""
    if not _is_for_onednn(x, self.weight, self.bias):
        return PLAIN[Conv1D](self, x)
    return _multiplied(x.view(-1, x.shape[-1]), self.weight.t(), self.bias).view(*x.shape[:-1], self.nf)


def _is_for_onednn(states: Any, weight: Any, bias_E: Any) -> bool:
    return (
        _is_wanted()
        and type(states) is Tensor
        and type(weight) in UNWRAPPED
        and states.dtype == weight.dtype == torch.float32
        and states.device.type == weight.device.type == "cpu"
        and weight.numel() >= LEAST
        and not (torch.is_grad_enabled() and (weight.requires_grad or (bias_E is not None and bias_E.requires_grad)))
        and not torch.is_autocast_enabled("cpu")
    )


def _multiplied(states: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and states.requires_grad:
        return _Product.apply(states, weight_ED, bias_E)
    return _product(states, weight_ED, bias_E)


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
