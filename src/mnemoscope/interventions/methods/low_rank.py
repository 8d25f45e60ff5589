"""Low-rank shifts of every token at several blocks, which change how a text is read; taught by the model itself.

To memory the teacher is the model's own answer to the bare question, so that no answer is learned by heart. To the
context, and where there is no bare question, it is the wanted answer. No cached prefix serves.

Shapes: N examples, L layers, D neurons, K rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Batch, first_and_rest, prepare, without_prefix
from mnemoscope.behaviour.reading import read_contexts
from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.edits import LowRank
from mnemoscope.interventions.hooks import edited
from mnemoscope.interventions.learning import Asked, Lesson, asked_batch, gradients, log_p, wanted_batches
from mnemoscope.interventions.shifts import once, spread_layers
from mnemoscope.interventions.sources import ANSWERED, TAUGHT, FitLists, Labels, Sources, in_turn
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import in_precision, quick_precision
from mnemoscope.tasks import Example

ABOUT = "low-rank shifts of every token at several blocks, taught by the model's own answers"
NULLS = TAUGHT
LAYERS, FACTORS = 5, (0.5, 0.75, 1.0)  # blocks, and factors on what was learned
RANK = 4
RATE, WARM_UP, LAST_RATE = 0.004, 5, 0.1  # of Adam, for states in units of their spread; it falls to a tenth
Edits = dict[int, LowRank]


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every factor of one learned shift, or what the bench tries; InputError with too few pairs."""
    tried = bench.tried.low_rank
    layers = tuple(spread_layers(bench, tried.layers if tried else LAYERS))
    whole = _vector(bench, toward, layers, ANSWERED)
    return [
        replace(whole * factor, setting={"layers": list(layers), "factor": factor})
        for factor in (tried.factors if tried else FACTORS)
    ]


def again(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """The same learned from other answers, one by one."""
    return [_vector(bench, one.toward, tuple(one.setting["layers"]), labels) * one.strength for labels in several]


@once
def _vector(bench: Bench, toward: Toward, layers: tuple[int, ...], labels: Labels) -> SteeringVector:
    sources = bench.sources("block")
    model = sources.lists.asking.model
    with in_precision(model, quick_precision(model)):
        edits = _learned(sources, toward, layers, labels)
    return SteeringVector(toward, edits, positions="all", unit="spread", method="low-rank")


def _learned(sources: Sources, toward: Toward, layers: Sequence[int], labels: Labels) -> Edits:
    """A low-rank shift of every token at some layers.

    Adam on the divergence from the teacher, or on the log probability of the wanted answer, and at every second step
    on the divergence of kept examples from what the model gives them unsteered, in nats. States are read about their
    mean, and shifts written, in units of each neuron's spread. Passes are in bfloat16 where that is quicker (three
    times on a processor that has it); the shift is applied and judged in float32.
    """
    lists = sources.lists
    drawn = np.random.default_rng(0).normal(size=(len(layers), RANK, sources.shape_LD[1]))
    reads_LKD = torch.tensor(drawn / np.sqrt(drawn.shape[2]), dtype=torch.float32)
    learned = [reads_LKD, torch.zeros_like(reads_LKD), torch.zeros_like(reads_LKD[:, 0])]
    for part in learned:
        part.requires_grad_()
    adam = torch.optim.Adam(learned, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - (1 - LAST_RATE) * step / lists.low_rank_steps)
    )
    # With twice the weight, as it is held at every second step, which costs half as much.
    held = lists.kept[toward] if lists.kept_weight else ()
    kept = [_unsteered(lists, batch, 2 * lists.kept_weight) for batch in held]
    mean_LD = sources.states_P2LD.mean(axis=(0, 1), dtype=np.float64)
    means_LD, spreads_LD = (torch.from_numpy(part_LD).float() for part_LD in (mean_LD, sources.spread_LD))
    made = partial(_edits, {layer: (means_LD[layer], spreads_LD[layer]) for layer in layers}, *learned)
    for _ in gradients(learned, made, (_lessons(lists, toward, labels), kept), lists.low_rank_steps):
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


def _lessons(lists: FitLists, toward: Toward, labels: Labels) -> list[Lesson]:
    """What is taught, batch by batch."""
    if labels == ANSWERED and toward == "memorized" and lists.bare:
        return _own_answers(lists, *lists.bare)

    def wanted(asked: Asked, edits: Edits) -> Tensor:
        return -log_p(lists.asking, [asked], partial(edited, lists.asking.model, edits, "block", "all")).mean()

    return [partial(wanted, asked) for asked in wanted_batches(lists, toward, labels)]


def _own_answers(lists: FitLists, pairs: Sequence[Example], conflicts: Sequence[Example]) -> list[Lesson]:
    """To answer pairs and other conflicts in turn as the model answers their bare questions.

    The first token has the model's own distribution as its target; those behind it are of the memorized answer.
    """
    bare = list({example.prompt: example for example in (*pairs, *conflicts)}.values())
    own: dict[str, Tensor] = {}
    for batch in prepare(lists.asking, bare):
        with torch.no_grad():
            rows_NV = _next_log_p(lists, batch).half()  # of a large vocabulary they take room
        own |= {bare[i].prompt: row_V for i, row_V in zip(batch.examples_N, rows_NV, strict=True)}

    def answer(batch: Batch, asked: Sequence[Example], edits: Edits) -> Tensor:
        target_NV = torch.stack([own[asked[i].prompt].float() for i in batch.examples_N])
        with edited(lists.asking.model, edits, "block", "all"):
            first_NV, rest_N = first_and_rest(lists.asking, asked_batch([Asked.first(batch)], True))
        return _divergence(target_NV, first_NV) - rest_N.mean()

    both = ((lists.pairs[Toward.MEMORIZED], pairs), (lists.conflicts[Toward.MEMORIZED], conflicts))
    return in_turn([partial(answer, batch, asked) for batch in batches] for batches, asked in both)


def _unsteered(lists: FitLists, batch: Batch, weight: float) -> Lesson:
    """To answer as the model does unsteered."""
    with torch.no_grad():
        before_NV = _next_log_p(lists, batch).half()

    def lesson(edits: Edits) -> Tensor:
        with edited(lists.asking.model, edits, "block", "all"):
            found_NV = _next_log_p(lists, batch)
        return weight * _divergence(before_NV.float(), found_NV)

    return lesson


def _next_log_p(lists: FitLists, batch: Batch) -> Tensor:
    """Log probabilities of the token behind each context, float32 (N, V), through which gradients flow back."""
    return read_contexts(lists.asking.model, without_prefix(batch)).logits_NV.log_softmax(-1)


def _divergence(target_NV: Tensor, found_NV: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence in nats."""
    return (target_NV.exp() * (target_NV - found_NV)).sum(-1).mean()
