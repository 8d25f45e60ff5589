"""Low-rank shifts of every token at several blocks, which change how a text is read; taught by the model itself.

No cached prefix serves.

Shapes: L layers, D neurons, K rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.edits import LowRank
from mnemoscope.interventions.hooks import edited
from mnemoscope.interventions.learning import Teacher, gradients, held, taught, teachers
from mnemoscope.interventions.shifts import once, spread_layers
from mnemoscope.interventions.sources import ANSWERED, TAUGHT, Labels, Sources
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import in_precision, quick_precision

NULLS = TAUGHT
LAYERS, RANK, FACTORS = 10, 8, (0.5, 0.75, 1.0)  # blocks, and factors on what was learned
FEW = 4  # rank where a bench tries few blocks
RATES, WARM_UP, LAST_RATE = (0.004, 0.002), 5, 0.1  # of Adam, for states in units of their spread; it falls to a tenth
Edits = dict[int, LowRank]


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every factor of what is learned by each teacher, or what the bench tries; InputError with too few pairs."""
    if tried := bench.tried.low_rank:
        ways = [How(tuple(spread_layers(bench, tried.layers)), FEW, RATES[0], teachers(bench.lists, toward)[0])]
    else:
        ways = ways_of(bench, toward, RATES)
    factors = tried.factors if tried else FACTORS
    return [
        replace(_vector(bench, toward, how, ANSWERED) * factor, setting=how.setting | {"factor": factor})
        for how, factor in product(ways, factors)
    ]


class How(NamedTuple):
    """How an edit is learned: at which blocks, of which rank, at which rate, by which teacher."""

    layers: tuple[int, ...]
    rank: int
    rate: float
    teacher: Teacher

    @property
    def setting(self) -> dict[str, Any]:
        """As artefacts have it."""
        return self._asdict() | {"layers": list(self.layers)}


def ways_of(bench: Bench, toward: Toward, rates: Sequence[float]) -> list[How]:
    """By each teacher, at each rate; by the model's own answers at the first one alone."""
    layers, every = tuple(spread_layers(bench, LAYERS)), teachers(bench.lists, toward)
    return [
        How(layers, RANK, rate, teacher) for teacher in every for rate in (rates if teacher == "wanted" else rates[:1])
    ]


def again(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """The same learned from other answers, one by one."""
    given: dict[str, Any] = {"rank": FEW, "rate": RATES[0], "teacher": "own"}
    given |= {name: one.setting[name] for name in How._fields if name in one.setting}
    how = How(**given | {"layers": tuple(given["layers"])})
    return [_vector(bench, one.toward, how, labels) * one.strength for labels in several]


@once
def _vector(bench: Bench, toward: Toward, how: How, labels: Labels) -> SteeringVector:
    sources = bench.sources("block")
    model = sources.lists.asking.model
    with in_precision(model, quick_precision(model)):
        edits = _learned(sources, toward, how, labels, bench.seed)
    return SteeringVector(toward, edits, positions="all", unit="spread", method="low-rank")


def _learned(sources: Sources, toward: Toward, how: How, labels: Labels, seed: int) -> Edits:
    """A low-rank shift of every token at some layers.

    Adam on what is ``taught`` and ``held``. States are read about their mean, and shifts written, in units of each
    neuron's spread. Passes are in bfloat16 where that is quicker; the shift is applied and judged in float32.
    """
    lists, layers = sources.lists, how.layers
    drawn = np.random.default_rng(seed).normal(size=(len(layers), how.rank, sources.shape_LD[1]))
    reads_LKD = torch.tensor(drawn / np.sqrt(drawn.shape[2]), dtype=torch.float32)
    learned = [reads_LKD, torch.zeros_like(reads_LKD), torch.zeros_like(reads_LKD[:, 0])]
    for part in learned:
        part.requires_grad_()
    adam = torch.optim.Adam(learned, lr=how.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - (1 - LAST_RATE) * step / lists.low_rank_steps)
    )
    mean_LD = sources.states_P2LD.mean(axis=(0, 1), dtype=np.float64)
    means_LD, spreads_LD = (torch.from_numpy(part_LD).float() for part_LD in (mean_LD, sources.spread_LD))
    made = partial(_edits, {layer: (means_LD[layer], spreads_LD[layer]) for layer in layers}, *learned)
    applied = partial(edited, lists.asking.model, site="block", positions="all")
    lessons = taught(lists, toward, labels, applied, how.teacher), held(lists, toward, applied)
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
