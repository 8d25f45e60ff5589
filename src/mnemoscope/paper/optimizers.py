"""Optimizers and their learning rate: Muon for matrices in blocks, AdamW for the rest.

Shapes: K matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnemoscope.config import TrainingConfig


def optimizers_for(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, biases and norms.

    Muon (K. Jordan et al., 2024) learned sums in a quarter of AdamW's steps here (300 for 1,300, in 0.1.0); its step
    is scaled to AdamW's root mean square, so that both share one learning rate.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in embeddings]
    rest = [p for p in trainable if p.ndim != 2 or id(p) in embeddings]
    return [
        Float32Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, config: TrainingConfig) -> float:
    """Factor on the learning rate: warm-up, constant, linear decay at the end."""
    factor = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay_steps:
        factor *= max(0.02, min(1.0, (config.steps - step) / config.decay_steps))
    return factor


class Float32Muon(torch.optim.Muon):
    """``torch.optim.Muon`` scaled by ``match_rms_adamw``, with Newton-Schulz steps in float32, batched by shape.

    The library computes them in bfloat16, which processors without such instructions emulate: more than half a step.
    """

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(params, **options, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                by_shape[tuple(weight.shape)].append((weight, update))
            for shape, found in by_shape.items():
                updates_KMN = torch.stack([update for _, update in found]).float()
                updates_KMN = orthogonalized(updates_KMN, group["ns_coefficients"], group["ns_steps"], group["eps"])
                # AdamW's root mean square (J. Liu et al., 2025, "Muon is Scalable for LLM Training").
                scaled = 0.2 * rate * max(shape) ** 0.5
                for (weight, _), update in zip(found, updates_KMN, strict=True):
                    weight.mul_(1 - rate * group["weight_decay"]).add_(update.to(weight.dtype), alpha=-scaled)


def orthogonalized(matrices_KMN: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Matrices with all singular values near 1, by a quintic Newton-Schulz iteration (K. Jordan et al., 2024).

    Each step multiplies X by a polynomial of X X^T, so the iteration runs on X X^T (cheaper for wide matrices), and the
    product of the polynomials is applied to X at the end. Float32 only: the smallest singular values enter squared.
    """
    a, b, c = coefficients
    tall = matrices_KMN.shape[1] > matrices_KMN.shape[2]
    x_KMN = matrices_KMN.mT if tall else matrices_KMN
    x_KMN = x_KMN / x_KMN.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    gram_KMM, product_KMM = x_KMN @ x_KMN.mT, None
    for step in range(steps):
        factor_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        factor_KMM.diagonal(dim1=1, dim2=2).add_(a)
        product_KMM = factor_KMM if product_KMM is None else factor_KMM @ product_KMM
        if step + 1 < steps:
            gram_KMM = factor_KMM @ gram_KMM @ factor_KMM
    x_KMN = x_KMN if product_KMM is None else product_KMM @ x_KMN
    return x_KMN.mT if tall else x_KMN
