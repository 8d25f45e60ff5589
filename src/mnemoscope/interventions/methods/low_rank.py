"""Low-rank shifts of every token at several blocks, which change how a text is read; taught by the model itself.

No cached prefix serves.

Shapes: L layers, D neurons, K rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.edits import LowRank
from mnemoscope.interventions.hooks import edited
from mnemoscope.interventions.learning import gradients, held, taught
from mnemoscope.interventions.shifts import once, spread_layers
from mnemoscope.interventions.sources import ANSWERED, TAUGHT, Labels, Sources
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import in_precision, quick_precision

ABOUT = "low-rank shifts of every token at several blocks, taught by the model's own answers"
NULLS = TAUGHT
LAYERS, FACTORS = 5, (0.5, 0.75, 1.0)  # blocks, and factors on what was learned
RANK = 4
RATES, WARM_UP, LAST_RATE = (0.004, 0.002), 5, 0.1  # of Adam, for states in units of their spread; it falls to a tenth
Edits = dict[int, LowRank]


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every factor of what is learned at each rate, or what the bench tries; InputError with too few pairs."""
    tried = bench.tried.low_rank
    layers = tuple(spread_layers(bench, tried.layers if tried else LAYERS))
    factors, rates = (tried.factors, RATES[:1]) if tried else (FACTORS, RATES)
    return [
        replace(_vector(bench, toward, layers, rate, ANSWERED) * factor, setting=_setting(layers, rate, factor))
        for rate, factor in product(rates, factors)
    ]


def _setting(layers: Sequence[int], rate: float, factor: float) -> dict[str, Any]:
    return {"layers": list(layers), "rate": rate, "factor": factor}


def again(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """The same learned from other answers, one by one."""
    layers, rate = tuple(one.setting["layers"]), one.setting.get("rate", RATES[0])
    return [_vector(bench, one.toward, layers, rate, labels) * one.strength for labels in several]


@once
def _vector(bench: Bench, toward: Toward, layers: tuple[int, ...], rate: float, labels: Labels) -> SteeringVector:
    sources = bench.sources("block")
    model = sources.lists.asking.model
    with in_precision(model, quick_precision(model)):
        edits = _learned(sources, toward, layers, rate, labels, bench.seed)
    return SteeringVector(toward, edits, positions="all", unit="spread", method="low-rank")


def _learned(sources: Sources, toward: Toward, layers: Sequence[int], rate: float, labels: Labels, seed: int) -> Edits:
    """A low-rank shift of every token at some layers.

    Adam on what is ``taught`` and ``held``. States are read about their
    mean, and shifts written, in units of each neuron's spread. Passes are in bfloat16 where that is quicker (three
    times on a processor that has it); the shift is applied and judged in float32.
    """
    lists = sources.lists
    drawn = np.random.default_rng(seed).normal(size=(len(layers), RANK, sources.shape_LD[1]))
    reads_LKD = torch.tensor(drawn / np.sqrt(drawn.shape[2]), dtype=torch.float32)
    learned = [reads_LKD, torch.zeros_like(reads_LKD), torch.zeros_like(reads_LKD[:, 0])]
    for part in learned:
        part.requires_grad_()
    adam = torch.optim.Adam(learned, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - (1 - LAST_RATE) * step / lists.low_rank_steps)
    )
    mean_LD = sources.states_P2LD.mean(axis=(0, 1), dtype=np.float64)
    means_LD, spreads_LD = (torch.from_numpy(part_LD).float() for part_LD in (mean_LD, sources.spread_LD))
    made = partial(_edits, {layer: (means_LD[layer], spreads_LD[layer]) for layer in layers}, *learned)
    applied = partial(edited, lists.asking.model, site="block", positions="all")
    lessons = taught(lists, toward, labels, applied), held(lists, toward, applied)
    for _ in gradients(learned, made, lessons, lists.low_rank_steps):
        adam.step()
        schedule.step()
    return {layer: LowRank(*(part.detach() for part in edit.tensors)) for layer, edit in made().items()}


def _edits(scales: Mapping[int, Any], reads_LKD: Tensor, writes_LKD: Tensor, shifts_LD: Tensor) -> Edits:
    """By layer, the shift in units of the state; the constant part is one more row, which reads nothing.

    ``scales``: mean and spread of each layer's neurons, (D,) each.
    """
    found = {}
    for number, (layer, (mean_D, spread_D)) in enumerate(scales.items()):
        read_KD = reads_LKD[number] / spread_D
        read_KD, bias_K = torch.cat([read_KD, torch.zeros_like(read_KD[:1])]), -(read_KD @ mean_D)
        write_KD = torch.cat([writes_LKD[number], shifts_LD[number][None]]) * spread_D
        found[layer] = LowRank(read_KD, torch.cat([bias_K, torch.ones(1)]), write_KD)
    return found
