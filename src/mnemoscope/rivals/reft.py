"""Low-rank edit of the state: ``h + R' (W h + b - R h)``, R with orthonormal rows.

Wu et al. (2024), "ReFT: representation finetuning for language models", arXiv 2404.03592 (LoReFT); rank 1 as in
AxBench, arXiv 2501.17148. It acts from the decision position on, and is fitted as a learned shift is.

Shapes: N prompts, T tokens, D neurons, K ranks.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemoscope.interventions import Intervention, LowRank, SteeringVector, Toward, shifted
from mnemoscope.interventions.descent import descend, surprise
from mnemoscope.interventions.shifts import spread_layers

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "low-rank edit of the state (arXiv 2404.03592)"
LAYERS = 3
RANKS = (1, 4)
STRENGTHS = (0.5, 1.0)  # of the edit once it is learned
RATE = 0.01


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer, rank and strength; InputError with too few pairs."""
    found = list[Intervention]()
    for layer, rank in product(spread_layers(bench, LAYERS), RANKS):
        edit = low_rank(*learned(bench, toward, layer, rank))
        for strength in STRENGTHS:
            setting = {"layer": layer, "rank": rank, "strength": strength}
            found.append(SteeringVector(toward, {layer: edit * strength}, method="reft", setting=setting))
    return found


def low_rank(rotation_KD: Tensor, weight_KD: Tensor, bias_K: Tensor) -> LowRank:
    """``R' (W h + b - R h)``, which is added to a state h."""
    return LowRank(weight_KD - rotation_KD, bias_K, rotation_KD)


def learned(bench: Bench, toward: Toward, layer: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """R (K, D), W (K, D) and b (K,), fitted for the wanted answer, from W = R and b = 0 on, where nothing changes.

    The bias is learned in units of the state's norm, so that one rate fits every model.
    """
    lists, norm = bench.lists, float(bench.sources("block").norm_L[layer])
    width = bench.sources("block").shape_LD[1]
    generator = torch.Generator().manual_seed(37 + 1000 * layer + rank + 10**6 * bench.seed)
    first_KD = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0].T.contiguous()
    raw_KD, change_KD, bias_K = first_KD.clone(), torch.zeros(rank, width), torch.zeros(rank)
    for part in (raw_KD, change_KD, bias_K):
        part.requires_grad_()

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        rotation_KD = orthonormal(raw_KD)
        return rotation_KD, rotation_KD + change_KD, norm * bias_K

    def applied(start: int | None) -> Any:
        return shifted(bench.asking.model, {layer: low_rank(*parts())}, "block", "decision", start)

    descend(lists, toward, [raw_KD, change_KD, bias_K], surprise(lists.asking, applied), RATE)
    rotation_KD, weight_KD, shift_K = (part.detach() for part in parts())
    return rotation_KD, weight_KD, shift_K


def orthonormal(raw_KD: Tensor) -> Tensor:
    """Orthonormal rows that span the same space, with the signs of the rows; gradients flow."""
    rotation_DK, upper_KK = torch.linalg.qr(raw_KD.T)
    return (rotation_DK * upper_KK.diagonal().sign()).T
