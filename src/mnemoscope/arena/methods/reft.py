"""Low-rank edit of the state: ``h + R' (W h + b - R h)``, R with orthonormal rows.

Wu et al. (2024), "ReFT: representation finetuning for language models", arXiv 2404.03592 (LoReFT); rank 1 as in
AxBench, arXiv 2501.17148. It acts from the decision position on, and is fitted as a learned shift is.

Shapes: N prompts, T tokens, D neurons, K ranks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import product

import torch
from torch import Tensor

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.fitting import descend, surprise
from mnemoscope.arena.lists import Bench
from mnemoscope.arena.vectors import at_block, by_edit, spread_layers
from mnemoscope.steering import Edit, Toward

LAYERS = 3
RANKS = (1, 4)
STRENGTHS = (0.5, 1.0)  # of the edit once it is learned
RATE = 0.01


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer, rank and strength; InputError with too few pairs."""
    found = []
    for layer, rank in product(spread_layers(bench, LAYERS), RANKS):
        parts = learned(bench, toward, layer, rank)
        for strength in STRENGTHS:
            setting: dict[str, object] = {"layer": layer, "rank": rank, "strength": strength}
            found.append(by_edit(bench, "reft", toward, setting, layer, low_rank(*parts, strength)))
    return found


def low_rank(rotation_KD: Tensor, weight_KD: Tensor, bias_K: Tensor, strength: float = 1.0) -> Edit:
    """``h + strength * R' (W h + b - R h)``."""

    def edit(states_NTD: Tensor) -> Tensor:
        rotation, weight, bias = (part.to(states_NTD) for part in (rotation_KD, weight_KD, bias_K))
        source_NTK = states_NTD @ weight.T + bias - states_NTD @ rotation.T
        return states_NTD + strength * (source_NTK @ rotation)

    return edit


def learned(bench: Bench, toward: Toward, layer: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """R (K, D), W (K, D) and b (K,), fitted for the wanted answer, from W = R and b = 0 on, where nothing changes.

    The bias is learned in units of the state's norm, so that one rate fits every model.
    """
    lists, norm = bench.lists, float(bench.sources("block").norm_L[layer])
    width = bench.sources("block").shape_LD[1]
    generator = torch.Generator().manual_seed(37 + 1000 * layer + rank + 10**6 * bench.config.seed)
    first_KD = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0].T.contiguous()
    raw_KD, change_KD, bias_K = first_KD.clone(), torch.zeros(rank, width), torch.zeros(rank)
    for part in (raw_KD, change_KD, bias_K):
        part.requires_grad_()

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        rotation_KD = orthonormal(raw_KD)
        return rotation_KD, rotation_KD + change_KD, norm * bias_K

    def applied(start: int | None) -> AbstractContextManager[None]:
        return at_block(bench.asking.model, layer, low_rank(*parts()))(start)

    descend(lists, toward, [raw_KD, change_KD, bias_K], surprise(lists.asking, applied), RATE)
    rotation_KD, weight_KD, shift_K = (part.detach() for part in parts())
    return rotation_KD, weight_KD, shift_K


def orthonormal(raw_KD: Tensor) -> Tensor:
    """Orthonormal rows that span the same space, with the signs of the rows; gradients flow."""
    rotation_DK, upper_KK = torch.linalg.qr(raw_KD.T)
    return (rotation_DK * upper_KK.diagonal().sign()).T
