"""Inference-time intervention: heads that a probe reads best are shifted along their mean difference.

Li et al. (2023), "Inference-time intervention: eliciting truthful answers from a language model", arXiv 2306.03341.
Each chosen head gets ``a * sigma * direction``: the direction has norm 1, sigma is the spread of its output along it.

Shapes: P pairs, N states, L layers, H heads, W numbers of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from mnemoscope.interventions import Intervention, SteeringVector, Toward
from mnemoscope.interventions.contract import Bench
from mnemoscope.models import heads_of
from mnemoscope.statistics import half_of_groups
from mnemoscope.statistics.probes import LayerProbe, share_right

HEADS = (8, 16, 32)  # K
FACTORS = (0.5, 1.0, 2.0, 5.0, 10.0)  # a
C = 0.1  # inverse strength of the probes' penalty


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of heads and factor; InputError with too few pairs, or for a model whose heads are not found."""
    heads, width = heads_of(bench.asking.model, 0)
    states = bench.sources("head").states_P2LD
    states_P2LHW = states.reshape(len(states), 2, -1, heads, width)
    rank_LH = accuracies(states_P2LHW, [one.group for one, _ in bench.pairs], bench.seed)
    unit_LHW = toward.sign * spread_direction(states_P2LHW)
    order, found = np.argsort(-rank_LH.ravel(), kind="stable"), list[Intervention]()
    counts = dict.fromkeys(min(count, rank_LH.size // 2) for count in HEADS)
    for count, factor in product(counts, FACTORS):
        chosen_LH1 = np.isin(np.arange(rank_LH.size), order[:count]).reshape(*rank_LH.shape, 1)
        shift_LD = np.where(chosen_LH1, factor * unit_LHW, 0.0).reshape(len(rank_LH), -1).astype(np.float32)
        setting, edits = {"heads": count, "factor": factor}, dict(enumerate(torch.from_numpy(shift_LD)))
        found.append(SteeringVector(toward, edits, site="head", method="iti", setting=setting))
    return found


def accuracies(states_P2LHW: np.ndarray, groups: Sequence[str], seed: int = 0) -> np.ndarray:
    """How well a probe of each head tells the sides of pairs of other groups apart, mean of two halves; (L, H)."""
    half_P = half_of_groups(groups, np.random.default_rng([seed, 37]))
    _, _, layers, heads, width = states_P2LHW.shape
    found_LH = np.zeros((layers, heads))
    for fitted_P in (half_P, ~half_P):
        fit_P2LHW, other_P2LHW = states_P2LHW[fitted_P], states_P2LHW[~fitted_P]
        labels_N, truth_N = (np.tile([1, 0], len(part)) for part in (fit_P2LHW, other_P2LHW))
        for layer, head in product(range(layers), range(heads)):
            probe = LayerProbe(C).fit(fit_P2LHW[:, :, layer, head].reshape(-1, width), labels_N)
            scores_N = probe.decision_function(other_P2LHW[:, :, layer, head].reshape(-1, width))
            found_LH[layer, head] += share_right(scores_N, truth_N) / 2
    return found_LH


def spread_direction(states_P2LHW: np.ndarray) -> np.ndarray:
    """Of each head the unit vector of its mean difference, times the spread of its output along it; float64."""
    states_P2LHW = states_P2LHW.astype(np.float64)
    difference_LHW = (states_P2LHW[:, 0] - states_P2LHW[:, 1]).mean(0)
    norm_LH1 = np.linalg.norm(difference_LHW, axis=-1, keepdims=True)
    unit_LHW = np.divide(difference_LHW, norm_LH1, out=np.zeros_like(difference_LHW), where=norm_LH1 > 0)
    along_P2LH = (states_P2LHW * unit_LHW).sum(-1)
    return unit_LHW * along_P2LH.reshape(-1, *along_P2LH.shape[2:]).std(0)[..., None]
