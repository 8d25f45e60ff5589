"""A shift that is optimized: the log probability of the wanted answer, under a budget of norm.

Shapes: N examples, L layers, D neurons, K shifts that are learned together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Batch, only_log_probability, with_options, with_suffixes, without_prefix
from mnemoscope.interventions.contract import OPPOSITE, Toward
from mnemoscope.interventions.hooks import Positions, shifted
from mnemoscope.interventions.sources import FitLists, Labels, Sources, in_turn
from mnemoscope.models import in_precision, quick_precision

MOMENTUM = 0.5
MOST_WEIGHTS = 2**24  # of a model that is read in bfloat16, as all are cast anew in each pass


Taught = tuple[float, Labels]  # a strength, and the labels that are learned from


def learned_together(
    sources: Sources, toward: Toward, layers: Sequence[int], positions: Positions, fits: Sequence[Taught]
) -> list[np.ndarray]:
    """Shifts optimized on the fit split for the log probability of the wanted answer, each within its strength.

    One for each of ``fits``; float64 (L, D), zero in other layers.

    Steepest ascent with momentum: each gradient is scaled to norm 1, so that neurons without influence take nothing of
    the budget, as they would with Adam. Steps fall from the whole budget to 0; after each the shift is scaled back into
    it. Passes of small models are in bfloat16 where that is quicker; the shift is applied and judged in float32.
    """
    model, shift_KLD = sources.lists.asking.model, np.zeros((len(fits), *sources.shape_LD))
    small = sum(weight.numel() for weight in model.parameters()) <= MOST_WEIGHTS
    with in_precision(model, quick_precision(model) if small else "float32"):
        for layer, unit_KD in _ascended(sources, toward, layers, positions, fits).items():
            shift_KLD[:, layer] = unit_KD.detach().double().numpy() * sources.scale_LD[layer] * sources.unit_L[layer]
    return list(shift_KLD)


def _ascended(
    sources: Sources, toward: Toward, layers: Sequence[int], positions: Positions, fits: Sequence[Taught]
) -> dict[int, Tensor]:
    """By layer, the shifts where the ascent ends, float32 (K, D), in units of strength."""
    lists = sources.lists
    strength_K1 = torch.tensor([[strength] for strength, _ in fits], dtype=torch.float32)
    units = {layer: torch.zeros(len(fits), sources.shape_LD[1], requires_grad=True) for layer in layers}
    unit_LD = torch.from_numpy(sources.scale_LD * sources.unit_L[:, None]).float()
    ascent = torch.optim.SGD(units.values(), lr=1 - MOMENTUM, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(ascent, lambda step: 1 - step / lists.steps)
    held = lists.kept[toward]
    kept = cycle(held) if held and lists.kept_weight else None
    wanted = cycle(zip(*(wanted_batches(lists, toward, labels) for _, labels in fits), strict=True))
    for number, batches in enumerate(islice(wanted, lists.steps)):
        shifts = {layer: unit_KD * unit_LD[layer] for layer, unit_KD in units.items()}
        loss = -_log_p(sources, batches, shifts, positions)
        if kept and number % 2:  # every second step is enough to hold what should stay
            batch = next(kept)
            same = [Asked(batch, torch.zeros_like(batch.option_R))] * len(fits)
            loss = loss - lists.kept_weight * _log_p(sources, same, shifts, positions)
        # Not backward(): that would also fill the gradients of the model's own parameters.
        gradients = torch.autograd.grad(loss, list(units.values()))
        norm_K1 = _norm(gradients)
        for unit_KD, gradient_KD in zip(units.values(), gradients, strict=True):
            unit_KD.grad = strength_K1 * torch.where(norm_K1 > 0, gradient_KD / norm_K1, gradient_KD)
        ascent.step()
        schedule.step()
        with torch.no_grad():
            scale_K1 = (strength_K1 / _norm(list(units.values()))).clamp(max=1.0)
            for unit_KD in units.values():
                unit_KD *= scale_K1
    return units


class Asked(NamedTuple):
    """A batch to learn from, and the number of the option that is wanted of each example, (N,).

    ``instead``: tokens that are wanted in place of that option.
    """

    batch: Batch
    option_N: Tensor
    instead: Sequence[list[int]] | None = None


def wanted_batches(lists: FitLists, toward: Toward, labels: Labels) -> Iterator[Asked]:
    """Batches to learn from: phrasings of pairs and other conflicts alternate.

    Under a shuffle, half of the examples of both sides want either answer, or all want answers of other items. Asked on
    one side alone, both would still teach to leave this side.
    """
    ways = (toward,) if labels.shuffle is None else (toward, OPPOSITE[toward])
    streams = [(which, way) for which in (0, 1) for way in ways]
    option = 1 if toward == "generalized" else 0
    placed = [
        [(stream, number, batch) for number, batch in enumerate((lists.pairs, lists.conflicts)[which][way])]
        for stream, (which, way) in enumerate(streams)
    ]
    longest = max(map(len, placed))
    if labels.shuffle is not None:
        placed = [list(islice(cycle(batches), longest)) for batches in placed]
    others = lists.permuted(labels.shuffle or 0) if labels.permuted else None
    for stream, number, batch in in_turn(placed):
        which, way = streams[stream]
        stays_N = torch.from_numpy(labels.signs(len(batch.examples_N), stream, number) > 0)
        instead = [others[lists.items[way][which][i]] for i in batch.examples_N] if others else None
        yield Asked(batch, torch.where(stays_N, option, 1 - option).to(batch.ids_NT.device), instead)


def asked_batch(asked: Sequence[Asked], positions: Positions) -> Batch:
    """The contexts of a batch once for each of several ways to ask it, with the one answer that is wanted there."""
    batch = without_prefix(asked[0].batch) if positions == "all" else asked[0].batch
    batch = with_options(batch, torch.stack([one.option_N for one in asked]))
    if asked[0].instead:
        batch = with_suffixes(batch, [suffix for one in asked for suffix in one.instead or ()])
    return batch


def _log_p(sources: Sources, asked: Sequence[Asked], shifts: Mapping[int, Tensor], positions: Positions) -> Tensor:
    """Mean log probability of the wanted answers, in nats, summed over the shifts; answers k are read under shift k."""
    batch, asking, n = asked_batch(asked, positions), sources.lists.asking, len(asked[0].batch.examples_N)
    of_prompts = {layer: shift_KD.repeat_interleave(n, 0) for layer, shift_KD in shifts.items()}
    start = None if positions == "all" else batch.ids_NT.shape[1] - 1
    with shifted(asking.model, of_prompts, sources.site, positions, start):
        return only_log_probability(asking, batch).sum() / n


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """The norm of each row over all parts together, (K, 1)."""
    return torch.stack([part_KD.norm(dim=1, keepdim=True) for part_KD in parts]).norm(dim=0)
