"""Low-rank edit of the state: ``h + R' (W h + b - R h)``, R with orthonormal rows.

Wu et al. (2024), "ReFT: representation finetuning for language models", arXiv 2404.03592 (LoReFT); rank 1 as in
AxBench, arXiv 2501.17148. It acts from the decision position on, and is fitted as a learned shift is.

Shapes: N prompts, T tokens, D neurons, K ranks.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from mnemoscope.interventions import Intervention, LowRank, SteeringVector, Toward, edited
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.learning import Asked, descend, log_p, wanted_batches
from mnemoscope.interventions.shifts import spread_layers

ABOUT = "low-rank edit of the state (arXiv 2404.03592)"
LAYERS = 3
RANKS = (1, 4)
STRENGTHS = (0.5, 1.0)  # of the edit once it is learned
RATE = 0.01


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer, rank and strength; InputError with too few pairs."""
    found = list[Intervention]()
    for layer, rank in product(spread_layers(bench, LAYERS), RANKS):
        edit = learned(bench, toward, layer, rank)
        for strength in STRENGTHS:
            setting = {"layer": layer, "rank": rank, "strength": strength}
            found.append(SteeringVector(toward, {layer: edit * strength}, method="reft", setting=setting))
    return found


def learned(bench: Bench, toward: Toward, layer: int, rank: int) -> LowRank:
    """The edit with R (K, D), W (K, D) and b (K,), fitted for the wanted answer, from W = R and b = 0 on.

    The bias is learned in units of the state's norm, so that one rate fits every model.
    """
    lists, norm = bench.lists, float(bench.sources("block").norm_L[layer])
    width = bench.sources("block").shape_LD[1]
    generator = torch.Generator().manual_seed(37 + 1000 * layer + rank + 10**6 * bench.seed)
    first_KD = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0].T.contiguous()
    parts = [first_KD.clone(), torch.zeros(rank, width), torch.zeros(rank)]
    for part in parts:
        part.requires_grad_()

    def edit() -> LowRank:
        raw_KD, change_KD, bias_K = parts
        return LowRank(change_KD, norm * bias_K, orthonormal(raw_KD))

    def loss(asked: Asked, now: LowRank) -> Tensor:
        applied = partial(edited, lists.asking.model, {layer: now}, "block", "decision")
        return -log_p(lists.asking, [asked], applied, everywhere=False).mean()

    wanted = [partial(loss, asked) for asked in wanted_batches(lists, toward)]
    kept = [partial(loss, Asked.first(batch)) for batch in lists.kept[toward]]
    descend(parts, RATE, edit, (wanted, kept), lists.steps)
    return LowRank(*(part.detach() for part in edit().tensors))


def orthonormal(raw_KD: Tensor) -> Tensor:
    """Orthonormal rows that span the same space, with the signs of the rows; gradients flow."""
    rotation_DK, upper_KK = torch.linalg.qr(raw_KD.T)
    return (rotation_DK * upper_KK.diagonal().sign()).T
