"""A low-rank shift of every token, which changes how a text is read; taught by the model itself where that is possible.

To memory the teacher is the model's own answer to the bare question, so that no answer is learned by heart. To the
context, and where there is no bare question, it is the wanted answer.

Shapes: N examples, L layers, D neurons, K rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Batch, first_and_rest, next_logits, only_log_probability, prepare, without_prefix
from mnemoscope.interventions.ascent import Asked, asked_batch, wanted_batches
from mnemoscope.interventions.edits import LowRank
from mnemoscope.interventions.hooks import shifted
from mnemoscope.interventions.sources import ANSWERED, Labels, Setting, Sources, in_turn
from mnemoscope.models import in_precision, quick_precision
from mnemoscope.tasks import Example

RANK = 4
RATE, WARM_UP, LAST_RATE = 0.004, 5, 0.1  # of AdamW, for states in units of their spread; it falls to a tenth
Lesson = Callable[[Mapping[int, LowRank]], Tensor]  # shifts by layer -> how far the model under them is from a target


def low_rank_learned(sources: Sources, setting: Setting, labels: Labels) -> np.ndarray:
    """A low-rank shift of every token at the setting's layers, packed; zero in the other layers.

    AdamW on the divergence from the teacher, or on the log probability of the wanted answer, and at every second step
    on the divergence of kept examples from what the model gives them unsteered, in nats. States are read about their
    mean, and shifts written, in units of each neuron's spread. Passes are in bfloat16 where that is quicker (three
    times on a processor that has it); the shift is applied and judged in float32.
    """
    with in_precision(sources.lists.asking.model, quick_precision(sources.lists.asking.model)):
        return _learned(sources, setting, labels)


def _learned(sources: Sources, setting: Setting, labels: Labels) -> np.ndarray:
    lists = sources.lists
    drawn = np.random.default_rng(0).normal(size=(len(setting.layers), RANK, sources.shape_LD[1]))
    reads_LKD = torch.tensor(drawn / np.sqrt(drawn.shape[2]), dtype=torch.float32)
    learned = [reads_LKD, torch.zeros_like(reads_LKD), torch.zeros_like(reads_LKD[:, 0])]
    for part in learned:
        part.requires_grad_()
    adam = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - (1 - LAST_RATE) * step / lists.low_rank_steps)
    )
    held = [_unsteered(sources, batch) for batch in lists.kept[setting.toward]]
    kept = cycle(held) if held and lists.kept_weight else None
    for number, lesson in enumerate(islice(cycle(_lessons(sources, setting, labels)), lists.low_rank_steps)):
        edits = _edits(sources, setting, *learned)
        loss = lesson(edits)
        if kept and number % 2:  # with twice the weight, which costs half as much
            loss = loss + 2 * lists.kept_weight * next(kept)(edits)
        # Not backward(): that would also fill the gradients of the model's own parameters.
        for part, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            part.grad = gradient
        adam.step()
        schedule.step()
    return packed(_edits(sources, setting, *learned), sources.shape_LD)


def _edits(
    sources: Sources, setting: Setting, reads_LKD: Tensor, writes_LKD: Tensor, shifts_LD: Tensor
) -> dict[int, LowRank]:
    """By layer, the shift in units of the state; the constant part is one more row, which reads nothing."""
    found = {}
    for number, layer in enumerate(setting.layers):
        mean_D, spread_D = (torch.from_numpy(row_LD[layer]).float() for row_LD in (sources.mean_LD, sources.spread_LD))
        read_KD = reads_LKD[number] / spread_D
        read_KD, bias_K = torch.cat([read_KD, torch.zeros_like(read_KD[:1])]), -(read_KD @ mean_D)
        write_KD = torch.cat([writes_LKD[number], shifts_LD[number][None]]) * spread_D
        found[layer] = LowRank(read_KD, torch.cat([bias_K, torch.ones(1)]), write_KD)
    return found


def packed(edits: Mapping[int, LowRank], shape_LD: tuple[int, int]) -> np.ndarray:
    """Shifts by layer as one array, float64 (L, 2 K + 1, D): rows that read, rows that write, and one of biases."""
    rank = max(len(edit.bias_K) for edit in edits.values())
    found = np.zeros((shape_LD[0], 2 * rank + 1, shape_LD[1]))
    for layer, edit in edits.items():
        found[layer, :rank], found[layer, rank : 2 * rank] = edit.read_KD.detach(), edit.write_KD.detach()
        found[layer, -1, :rank] = edit.bias_K.detach()
    return found


def unpacked(packed_LRD: np.ndarray) -> dict[int, LowRank]:
    """The shifts of ``packed``; layers without one are left out."""
    rank = packed_LRD.shape[1] // 2
    parts = torch.from_numpy(packed_LRD).float()
    return {
        layer: LowRank(rows_RD[:rank], rows_RD[-1, :rank], rows_RD[rank : 2 * rank])
        for layer, rows_RD in enumerate(parts)
        if bool(rows_RD[rank : 2 * rank].any())
    }


def _lessons(sources: Sources, setting: Setting, labels: Labels) -> list[Lesson]:
    """What is taught, batch by batch."""
    lists, toward = sources.lists, setting.toward
    if labels == ANSWERED and toward == "memorized" and lists.bare:
        return _own_answers(sources, *lists.bare)

    def wanted(asked: Asked, edits: Mapping[int, LowRank]) -> Tensor:
        with _shifted(sources, edits):
            return -only_log_probability(lists.asking, asked_batch([asked], "all")).mean()

    return [partial(wanted, asked) for asked in wanted_batches(lists, toward, labels)]


def _own_answers(sources: Sources, pairs: Sequence[Example], conflicts: Sequence[Example]) -> list[Lesson]:
    """To answer pairs and other conflicts in turn as the model answers their bare questions.

    The first token has the model's own distribution as its target; those behind it are of the memorized answer.
    """
    lists = sources.lists
    bare = list({example.prompt: example for example in (*pairs, *conflicts)}.values())
    own: dict[str, Tensor] = {}
    for batch in prepare(lists.asking, bare):
        rows_NV = _next_log_p(sources, batch).half()  # of a large vocabulary they take room
        own |= {bare[i].prompt: row_V for i, row_V in zip(batch.examples_N, rows_NV, strict=True)}

    def answer(batch: Batch, asked: Sequence[Example], edits: Mapping[int, LowRank]) -> Tensor:
        target_NV = torch.stack([own[asked[i].prompt].float() for i in batch.examples_N])
        memorized = Asked(batch, torch.zeros(len(batch.examples_N), dtype=torch.long, device=batch.ids_NT.device))
        with _shifted(sources, edits):
            first_NV, rest_N = first_and_rest(lists.asking, asked_batch([memorized], "all"))
        return _divergence(target_NV, first_NV) - rest_N.mean()

    both = ((lists.pairs["memorized"], pairs), (lists.conflicts["memorized"], conflicts))
    return in_turn([partial(answer, batch, asked) for batch in batches] for batches, asked in both)


def _unsteered(sources: Sources, batch: Batch) -> Lesson:
    """To answer as the model does unsteered."""
    before_NV = _next_log_p(sources, batch).half()
    return lambda edits: _divergence(before_NV.float(), _next_log_p(sources, batch, edits))


def _next_log_p(sources: Sources, batch: Batch, edits: Mapping[int, LowRank] | None = None) -> Tensor:
    """Log probabilities of the token behind each context, float32 (N, V); gradients flow back into the shifts."""
    asking, whole = sources.lists.asking, without_prefix(batch)
    if edits is None:
        with torch.no_grad():
            return next_logits(asking, whole).log_softmax(-1)
    with _shifted(sources, edits):
        return next_logits(asking, whole).log_softmax(-1)


def _shifted(sources: Sources, edits: Mapping[int, LowRank]) -> AbstractContextManager[None]:
    return shifted(sources.lists.asking.model, edits, sources.site, "all")


def _divergence(target_NV: Tensor, found_NV: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence in nats."""
    return (target_NV.exp() * (target_NV - found_NV)).sum(-1).mean()
