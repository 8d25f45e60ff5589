"""Low-rank edit of the state: ``h + R' (W h + b - R h)``, R with orthonormal rows.

Wu et al. (2024), "ReFT: representation finetuning for language models", arXiv 2404.03592 (LoReFT); rank 1 as in
AxBench, arXiv 2501.17148. It acts where our low-rank shifts do, and has their teacher.

Shapes: L layers, D neurons, K ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from mnemoscope.interventions import Intervention, LowRank, SteeringVector, Toward, edited
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.learning import descend, held, taught
from mnemoscope.interventions.methods.low_rank import How, ways_of
from mnemoscope.interventions.shifts import once
from mnemoscope.interventions.sources import ANSWERED, PERMUTED, Labels
from mnemoscope.models import in_precision, quick_precision

NULLS = (PERMUTED,)
STRENGTHS = (0.5, 1.0)  # of the edit once it is learned
RATES = (0.01, 0.003)


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every teacher, rate and strength; InputError with too few pairs."""
    found = list[Intervention]()
    for how, strength in product(ways_of(bench, toward, RATES), STRENGTHS):
        one = _vector(bench, toward, how, ANSWERED) * strength
        found.append(replace(one, setting=how.setting | {"strength": strength}))
    return found


def again(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """The same learned from other answers, one by one."""
    found = {name: one.setting[name] for name in How._fields}
    how = How(**found | {"layers": tuple(found["layers"])})
    return [_vector(bench, one.toward, how, labels) * one.strength for labels in several]


@once
def _vector(bench: Bench, toward: Toward, how: How, labels: Labels) -> SteeringVector:
    with in_precision(bench.asking.model, quick_precision(bench.asking.model)):
        edits = learned(bench, toward, how, labels)
    return SteeringVector(toward, edits, positions="all", method="reft", setting=how.setting)


def learned(bench: Bench, toward: Toward, how: How, labels: Labels = ANSWERED) -> dict[int, LowRank]:
    """By layer, the edit with R (K, D), W (K, D) and b (K,), from W = R and b = 0 on.

    The bias is learned in units of the state's norm, so that one rate fits every model.
    """
    lists, sources, (layers, rank, rate, teacher) = bench.lists, bench.sources("block"), how
    generator = torch.Generator().manual_seed(37 + rank + 10**6 * bench.seed)
    width, norms = sources.shape_LD[1], sources.norm_L[list(layers)]
    first_LDK = torch.linalg.qr(torch.randn(len(layers), width, rank, generator=generator))[0]
    parts = [first_LDK.mT.contiguous(), torch.zeros(len(layers), rank, width), torch.zeros(len(layers), rank)]
    for part in parts:
        part.requires_grad_()

    def edits() -> dict[int, LowRank]:
        every = zip(layers, norms.tolist(), *parts, strict=True)
        return {
            layer: LowRank(change_KD, norm * bias_K, orthonormal(raw_KD))
            for layer, norm, raw_KD, change_KD, bias_K in every
        }

    applied = partial(edited, lists.asking.model, site="block", positions="all")
    lessons = taught(lists, toward, labels, applied, teacher), held(lists, toward, applied)
    descend(parts, rate, edits, lessons, lists.steps)
    return {layer: LowRank(*(part.detach() for part in edit.tensors)) for layer, edit in edits().items()}


def orthonormal(raw_KD: Tensor) -> Tensor:
    """Orthonormal rows that span the same space, with the signs of the rows; gradients flow."""
    rotation_DK, upper_KK = torch.linalg.qr(raw_KD.T)
    return (rotation_DK * upper_KK.diagonal().sign()).T
