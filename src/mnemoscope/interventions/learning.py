"""What is learned by gradients, on the lists of a fit: the teachers, what is held, and one loop, for all that learn.

To memory the teacher may be the model's own answer to the bare question, so that no answer is learned by heart. To the
context, and where there is no bare question, it is the wanted answer.

Shapes: N examples, K ways that are learned together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mnemoscope.behaviour import (
    Asking,
    Batch,
    first_and_rest,
    only_log_probability,
    prepare,
    with_options,
    with_suffixes,
    without_prefix,
)
from mnemoscope.behaviour.reading import read_contexts
from mnemoscope.interventions.contract import Toward
from mnemoscope.interventions.sources import ANSWERED, FitLists, Labels, in_turn
from mnemoscope.tasks import Example

Applied = Callable[[int | None], AbstractContextManager[Any]]  # the decision column, None: the last of each prompt
Lesson = Callable[[Any], Tensor]  # what is learned so far -> loss
Acting = Callable[[Any], AbstractContextManager[Any]]  # what is learned so far -> the context in which it acts
Teacher = Literal["own", "wanted"]  # the model's own answers to bare questions, or the wanted ones


class Asked(NamedTuple):
    """A batch to learn from, and the number of the option that is wanted of each example, (N,).

    ``instead``: tokens that are wanted in place of that option.
    """

    batch: Batch
    option_N: Tensor
    instead: Sequence[list[int]] | None = None

    @classmethod
    def first(cls, batch: Batch) -> Asked:
        """The batch with the first option of each example, the memorized answer or the only one."""
        return cls(batch, torch.zeros(len(batch.examples_N), dtype=torch.long, device=batch.ids_NT.device))


def wanted_batches(lists: FitLists, toward: Toward, labels: Labels = ANSWERED) -> Iterator[Asked]:
    """Batches to learn from: phrasings of pairs and other conflicts alternate.

    Under a shuffle, half of the examples of both sides want either answer, or all want answers of other items. Asked on
    one side alone, both would still teach to leave this side.
    """
    ways = (toward,) if labels.shuffle is None else (toward, toward.opposite)
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


def asked_batch(asked: Sequence[Asked], everywhere: bool) -> Batch:
    """The contexts of a batch once for each of several ways to ask it, with the one answer that is wanted there."""
    batch = without_prefix(asked[0].batch) if everywhere else asked[0].batch
    device = batch.ids_NT.device
    batch = with_options(batch, torch.stack([one.option_N.to(device) for one in asked]))
    if asked[0].instead:
        batch = with_suffixes(batch, [suffix for one in asked for suffix in one.instead or ()])
    return batch


def log_p(asking: Asking, asked: Sequence[Asked], applied: Applied | None = None, everywhere: bool = True) -> Tensor:
    """Log probability of the wanted answers in nats, read in a context, float32 (K * N,).

    ``everywhere``: it acts on all tokens, so no cached prefix serves.
    """
    batch = asked_batch(asked, everywhere)
    with applied(None if everywhere else batch.ids_NT.shape[1] - 1) if applied else nullcontext():
        return only_log_probability(asking, batch)


def teachers(lists: FitLists, toward: Toward) -> tuple[Teacher, ...]:
    """Those that there are in a direction."""
    return ("own", "wanted") if toward == "memorized" and lists.bare else ("wanted",)


def taught(lists: FitLists, toward: Toward, labels: Labels, applied: Acting, teacher: Teacher = "own") -> list[Lesson]:
    """What is taught to what acts on all tokens, batch by batch; ``applied``: the context in which it acts.

    ``teacher``: the model's own answers to bare questions, where there are such, or the wanted answers.
    """
    if labels == ANSWERED and teacher in teachers(lists, toward)[:-1]:
        assert lists.bare
        return _own_answers(lists, *lists.bare, applied)

    def wanted(asked: Asked, now: Any) -> Tensor:
        return -log_p(lists.asking, [asked], lambda _: applied(now)).mean()

    return [partial(wanted, asked) for asked in wanted_batches(lists, toward, labels)]


def _own_answers(
    lists: FitLists, pairs: Sequence[Example], conflicts: Sequence[Example], applied: Acting
) -> list[Lesson]:
    """To answer pairs and other conflicts in turn as the model answers their bare questions.

    The first token has the model's own distribution as its target; those behind it are of the memorized answer.
    """
    bare = list({example.prompt: example for example in (*pairs, *conflicts)}.values())
    own: dict[str, Tensor] = {}
    for batch in prepare(lists.asking, bare):
        with torch.no_grad():
            rows_NV = _next_log_p(lists, batch).half()  # of a large vocabulary they take room
        own |= {bare[i].prompt: row_V for i, row_V in zip(batch.examples_N, rows_NV, strict=True)}

    def answer(batch: Batch, asked: Sequence[Example], now: Any) -> Tensor:
        target_NV = torch.stack([own[asked[i].prompt].float() for i in batch.examples_N])
        with applied(now):
            first_NV, rest_N = first_and_rest(lists.asking, asked_batch([Asked.first(batch)], True))
        return _divergence(target_NV, first_NV) - rest_N.mean()

    both = ((lists.pairs[Toward.MEMORIZED], pairs), (lists.conflicts[Toward.MEMORIZED], conflicts))
    return in_turn([partial(answer, batch, asked) for batch in batches] for batches, asked in both)


def held(lists: FitLists, toward: Toward, applied: Acting) -> list[Lesson]:
    """To answer what should stay as the model does unsteered: the divergence of the next token, in nats.

    With twice the weight of what is taught, as it is held at every second step, which costs half as much.
    """

    def lesson(batch: Batch, before_NV: Tensor, now: Any) -> Tensor:
        with applied(now):
            found_NV = _next_log_p(lists, batch)
        return 2 * lists.kept_weight * _divergence(before_NV.float(), found_NV)

    if not lists.kept_weight:
        return []
    with torch.no_grad():
        every = [(batch, _next_log_p(lists, batch).half()) for batch in lists.held or lists.kept[toward]]
    return [partial(lesson, *one) for one in every]


def _next_log_p(lists: FitLists, batch: Batch) -> Tensor:
    """Log probabilities of the token behind each context, float32 (N, V), through which gradients flow back."""
    return read_contexts(lists.asking.model, without_prefix(batch)).logits_NV.log_softmax(-1)


def _divergence(target_NV: Tensor, found_NV: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence in nats."""
    return (target_NV.exp() * (target_NV - found_NV)).sum(-1).mean()


def gradients(
    parameters: Sequence[Tensor],
    made: Callable[[], Any],
    lessons: tuple[Sequence[Lesson], Sequence[Lesson]],
    steps: int,
) -> Iterator[None]:
    """Give parameters the gradients of one lesson after another; the caller steps.

    ``made``: of the parameters, what lessons are about. The second ``lessons`` are of what should stay, at every second
    step, which is enough to hold it.
    """
    wanted, kept = lessons
    held = cycle(kept)
    for number, lesson in enumerate(islice(cycle(wanted), steps)):
        now = made()
        loss = lesson(now)
        if kept and number % 2:
            loss = loss + next(held)(now)
        # Not backward(): that would also fill the gradients of the model's own parameters.
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        yield


def descend(
    parameters: Sequence[Tensor],
    rate: float,
    made: Callable[[], Any],
    lessons: tuple[Sequence[Lesson], Sequence[Lesson]],
    steps: int,
    most: float = 1.0,
) -> None:
    """Adam with a rate that falls to 0, on gradients of norm ``most`` at most."""
    adam = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    for _ in gradients(parameters, made, lessons, steps):
        nn.utils.clip_grad_norm_(list(parameters), most)
        adam.step()
        schedule.step()
