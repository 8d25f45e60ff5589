"""Contrastive activation addition: the mean difference of states at the answer, at one layer, times a factor.

Panickssery et al. (2023), "Steering Llama 2 via contrastive activation addition", arXiv 2312.06681. Each prompt is read
twice, with either answer behind it, and the states at the last token of the answer are compared. The difference is
added at every token from the decision on.

Shapes: N prompts, T tokens, L layers, D neurons.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from mnemoscope.behaviour import capturing, read_only_options, with_options, without_prefix
from mnemoscope.interventions import Intervention, SteeringVector, Toward
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.methods.nmd import FACTORS
from mnemoscope.interventions.shifts import once, spread_layers

LAYERS = 8


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every layer and factor."""
    shift_LD = torch.from_numpy(toward.sign * differences(bench))
    return [
        SteeringVector(
            toward, {layer: factor * shift_LD[layer]}, method="caa", setting={"layer": layer, "factor": factor}
        )
        for layer, factor in product(spread_layers(bench, LAYERS), FACTORS)
    ]


@once
def differences(bench: Bench) -> np.ndarray:
    """Mean state behind the generalized less that behind the memorized answer of fit conflicts, float64 (L, D)."""
    return _at_answers(bench, 1) - _at_answers(bench, 0)


@torch.no_grad()
def _at_answers(bench: Bench, option: int) -> np.ndarray:
    """Mean state at the last token of one option, behind each fit conflict, float64 (L, D)."""
    model, sums, count = bench.asking.model, np.zeros(()), 0
    for batch in map(without_prefix, bench.fit_conflicts.batches):
        n = len(batch.examples_N)
        one = with_options(batch, torch.full((1, n), option, device=batch.ids_NT.device))
        with capturing(model, "block", offsets=None) as states:
            read_only_options(model, one, closed=True)
        last_N = batch.ids_NT.shape[1] - 1 + one.length_R.cpu()
        rows_N = torch.arange(n)
        sums = sums + np.stack([state_NTD.cpu()[rows_N, last_N].double().sum(0).numpy() for state_NTD in states])
        count += n
    return sums / count
