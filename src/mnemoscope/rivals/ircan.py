"""Neurons that carry the context, found by integrated gradients, are scaled.

Shi et al. (2024), "IRCAN: mitigating knowledge conflicts in LLM generation via identifying and reweighting
context-aware neurons", arXiv 2406.18406 (NeurIPS 2024). A neuron that is multiplied is a column of the down projection
that is multiplied: other weights, so it acts at all positions.

Shapes: N examples, S steps of the integral, L layers, D neurons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import read_states
from mnemoscope.interventions import Held, Intervention, Scale, SteeringVector, Toward, edited
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.decoding import check_bares
from mnemoscope.interventions.learning import Asked, log_p
from mnemoscope.interventions.shifts import once
from mnemoscope.interventions.sources import spread_groups, with_prefixes
from mnemoscope.models import blocks_of, site_width

COUNTS = (2, 4, 8, 16)  # neurons that are scaled
FACTORS = {"generalized": (2.0, 4.0, 8.0), "memorized": (0.0, 2.0, 4.0, 8.0)}  # 0: what carries the context is erased
STEPS = 8  # of the integral
EXAMPLES = 48
TOP = 20  # neurons of each example that count as its top


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of neurons and factor; InputError where the task has no bare questions."""
    check_bares(bench, "ircan")
    found, width = list[Intervention](), site_width(bench.asking.model, 0, "neuron")
    for factor, count in product(FACTORS[toward], COUNTS):
        # Towards memory the text's own neurons are erased, or those of the bare question enlarged.
        order = common_neurons(bench, "generalized" if factor == 0 else toward)
        found.append(scaled(order[:count], factor, width, toward, {"neurons": count, "factor": factor}))
    return found


def scaled(
    neurons: Sequence[tuple[int, int]], factor: float, width: int, toward: Toward, setting: Mapping[str, Any]
) -> SteeringVector:
    """Some neurons multiplied at every token, as if their columns of weights were."""
    by_layer: dict[int, Tensor] = {}
    for layer, neuron in neurons:
        by_layer.setdefault(layer, torch.zeros(width))[neuron] = factor - 1
    edits = {layer: Scale(factor_D) for layer, factor_D in by_layer.items()}
    return SteeringVector(toward, edits, "neuron", "all", method="ircan", setting=setting)


@once
def common_neurons(bench: Bench, toward: Toward) -> list[tuple[int, int]]:
    """(layer, neuron) in the top of the most examples, most first, ties by their mean attribution."""
    score_NLD = attributions(bench, toward)
    flat_NM = score_NLD.reshape(len(score_NLD), -1)
    counts: Counter[int] = Counter()
    for row_M in flat_NM:
        counts.update(np.argsort(-row_M, kind="stable")[:TOP].tolist())
    mean_M = flat_NM.mean(0)
    order = sorted(counts, key=lambda place: (-counts[place], -mean_M[place]))
    return [divmod(place, score_NLD.shape[2]) for place in order]


def attributions(bench: Bench, toward: Toward) -> np.ndarray:
    """Integrated gradients of p(wanted) along each layer's MLP activations, float64 (N, L, D).

    The activations at the decision position go from those of the bare question to those with the text; towards memory
    the other way, as the two change roles. Each layer's path is taken alone.
    """
    asking, prompts, option = bench.asking, bench.fit_conflicts, int(toward == "generalized")
    bare_of = {e.prompt: bare for e, bare in zip(prompts.examples, prompts.bares, strict=True) if bare}
    examples = spread_groups([e for e in prompts.examples if e.prompt in bare_of])[:EXAMPLES]
    sides = ([bare_of[e.prompt] for e in examples], examples)
    ends = [read_states(asking, side, "neuron").at_decision_NLD for side in (sides if option else sides[::-1])]
    found_NLD = np.zeros(ends[0].shape)
    for batch in with_prefixes(asking, examples):
        first_NLD, last_NLD = (torch.from_numpy(end[batch.examples_N]).to(asking.model.device) for end in ends)
        n = len(batch.examples_N)
        share_S11 = ((torch.arange(STEPS) + 0.5) / STEPS)[:, None, None].to(first_NLD)
        asked = [Asked(batch, torch.full((n,), option))] * STEPS
        for layer in range(len(blocks_of(asking.model))):
            step_ND = (last_NLD - first_NLD)[:, layer]
            # The path of every example, step by step.
            path_RD = (first_NLD[:, layer] + share_S11 * step_ND).flatten(0, 1).requires_grad_()
            held = Held(path_RD[:, None], torch.ones(1))
            applied = partial(edited, asking.model, {layer: held}, "neuron", "once")
            p = log_p(asking, asked, applied, everywhere=False).exp().sum()
            (gradient_RD,) = torch.autograd.grad(p, path_RD)
            attribution_ND = step_ND * gradient_RD.view(STEPS, n, -1).mean(0)
            found_NLD[batch.examples_N, layer] = attribution_ND.double().cpu().numpy()
    return found_NLD
