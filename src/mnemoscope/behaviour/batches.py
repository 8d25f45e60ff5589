"""Encoded examples as batches of tokens: contexts left-padded, one row per answer.

Shapes: N examples, T tokens of a left-padded context, R rows (one per example and option), M tokens of an answer,
D neurons, H heads of W neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking, Encoded, encode, left_padded, pad_of
from mnemoscope.models import batch_that_fits, select_rows, states_of, with_states
from mnemoscope.models.caches import bytes_of
from mnemoscope.tasks import Example

EACH_BATCH = 400  # tokens that a further batch costs beside its own, as weights are read once for each
FEWEST = 10**9  # that no padding outweighs


@dataclass(frozen=True, slots=True)
class Unshifted:
    """Outputs of blocks from the decision position on, while nothing is shifted in them or below."""

    context_L: list[Any]  # of each block at the decision position, states (N, 1, D)
    answers_L: list[Any]  # of each block over the options' tokens, states (R, M, D)
    columns_L: list[tuple[Tensor, Tensor]]  # each layer's key and value of the decision position, (N, H, 1, W) each

    def picked(self, example_K: Tensor, row_K: Tensor) -> Unshifted:
        """Of some examples with a row each."""
        context_L = [picked(context, example_K) for context in self.context_L]
        columns_L = [(rows_of(key, example_K), rows_of(value, example_K)) for key, value in self.columns_L]
        return Unshifted(context_L, [picked(answers, row_K) for answers in self.answers_L], columns_L)


def rows_of(states: Tensor, row_K: Tensor) -> Tensor:
    """Rows of a layer's states, which may lie on another device than the batch."""
    return states[row_K.to(states.device)]


def picked(output: Any, row_K: Tensor, columns: int | None = None) -> Any:
    """Rows of a block's output, and its first columns."""
    return with_states(output, rows_of(states_of(output), row_K)[:, :columns])


@dataclass(slots=True)
class Batch:
    """Examples of similar length, left-padded, with one row per option.

    Attributes:
        examples_N: their indices in the list that was prepared.
        ids_NT, mask_NT, shared_N: contexts, and how many of their last tokens the options share.
        example_R, option_R: which example (within the batch) and which option a row is.
        suffix_RM, length_R: the options' tokens, right-padded with 0, and their number.
        prefix: cache of every context token but the last, or None; with it come whether the model itself produces the
            shared tokens (``prefix_fits_N``), and outputs of blocks below every shift (``Unshifted``).
    """

    examples_N: np.ndarray
    ids_NT: Tensor
    mask_NT: Tensor
    shared_N: Tensor
    example_R: Tensor
    option_R: Tensor
    suffix_RM: Tensor
    length_R: Tensor
    prefix: Any = None
    prefix_fits_N: Tensor | None = None
    unshifted: Any = None


def prepare(asking: Asking, examples: Sequence[Example], *, whole: bool = False) -> list[Batch]:
    """Encode examples and batch them by length, fewer at a time where memory is short.

    ``whole``: as few batches as there can be, for lists whose prefixes are cached; else, on a processor, fewer examples
    than ``batch_size`` where a batch would be padding for the most part.
    """
    encoded = encode(asking, examples)
    if not encoded:
        return []
    order = np.argsort([len(e.context) for e in encoded], kind="stable")
    longest = max(len(e.context) for e in encoded)
    read_on = max(len(e.suffixes) * max(map(len, e.suffixes)) for e in encoded)
    size = batch_that_fits(asking.model, asking.batch_size, longest, read_on)
    whole = whole or asking.model.device.type != "cpu"  # elsewhere padding costs less than a further batch
    parts = parts_of([len(encoded[i].context) for i in order], size, FEWEST if whole else EACH_BATCH)
    return [as_batch(asking, encoded, order[part]) for part in parts]


def parts_of(lengths: Sequence[int], most: int, each: int = EACH_BATCH) -> list[slice]:
    """Parts of at most ``most`` of ascending lengths that cost least: padded tokens, and ``each`` for a part."""
    best, begins = np.zeros(len(lengths) + 1, np.int64), [0]
    for end, longest in enumerate(lengths, 1):
        first = max(0, end - most)
        costs = best[first:end] + np.arange(end - first, 0, -1) * longest
        begins.append(first + int(costs.argmin()))
        best[end] = costs.min() + each
    ends = [len(lengths)] if lengths else []
    while ends and begins[ends[-1]]:
        ends.append(begins[ends[-1]])
    return [slice(begins[end], end) for end in reversed(ends)]


def as_batch(asking: Asking, encoded: Sequence[Encoded], chosen: np.ndarray) -> Batch:
    """The chosen ones of encoded examples as one batch."""
    some = [encoded[i] for i in chosen]
    rows = [(n, o, suffix) for n, e in enumerate(some) for o, suffix in enumerate(e.suffixes)]
    example_R, option_R, suffixes = zip(*rows, strict=True)
    contexts = left_padded([e.context for e in some], pad_of(asking.tokenizer))
    tensors = (*contexts, torch.tensor([e.shared for e in some]), torch.tensor(example_R), torch.tensor(option_R))
    return Batch(chosen, *(tensor.to(asking.model.device) for tensor in (*tensors, *_right_padded(suffixes))))


def _right_padded(suffixes: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Answers as one tensor, int64 (R, M), and their lengths."""
    longest, lengths = max(map(len, suffixes)), [*map(len, suffixes)]
    return torch.tensor([suffix + [0] * (longest - len(suffix)) for suffix in suffixes]), torch.tensor(lengths)


def kept_bytes(batch: Batch) -> int:
    """Bytes that a batch keeps: keys and values, and outputs of untouched blocks."""
    known = batch.unshifted
    states = [*map(states_of, (*known.context_L, *known.answers_L)), *chain(*known.columns_L)] if known else []
    return (0 if batch.prefix is None else bytes_of(batch.prefix)) + sum(part.nbytes for part in states)


def without_prefix(batch: Batch) -> Batch:
    """The same contexts, to be read from their beginning: for shifts that act before the decision position."""
    return replace(batch, prefix=None, prefix_fits_N=None, unshifted=None)


def with_suffixes(batch: Batch, suffixes: Sequence[list[int]]) -> Batch:
    """The same contexts, each with one answer: the given tokens. Blocks below a shift are run again."""
    suffix_RM, length_R = (tensor.to(batch.ids_NT.device) for tensor in _right_padded(suffixes))
    return replace(batch, suffix_RM=suffix_RM, length_R=length_R, unshifted=None)


def by_length(batch: Batch) -> list[Batch]:
    """A batch without cached prefixes in parts of similar length, where that saves more padding than it costs."""
    if batch.ids_NT.device.type != "cpu":
        return [batch]
    length_N = batch.mask_NT.sum(1)
    order_N = torch.argsort(length_N, stable=True)
    found = []
    for part in parts_of(length_N[order_N].tolist(), len(order_N)):
        place_N = torch.full_like(order_N, len(order_N))  # in this part, behind all others if not there
        place_N[order_N[part]] = torch.arange(part.stop - part.start)
        place_R = place_N[batch.example_R]
        rows_R = torch.argsort(place_R, stable=True)[: int((place_R < len(order_N)).sum())]
        one = _part_of(batch, order_N[part], rows_R, place_R[rows_R])
        columns = slice(batch.ids_NT.shape[1] - int(length_N[order_N[part]].max()), None)
        found.append(replace(one, ids_NT=one.ids_NT[:, columns], mask_NT=one.mask_NT[:, columns]))
    return found


def with_options(batch: Batch, option_KN: Tensor) -> Batch:
    """The same contexts K times, each time with one option of every example, by its number.

    Shares the prefixes if K is 1, so score only one at a time.
    """
    copies, n = option_KN.shape
    again_M = torch.arange(n, device=option_KN.device).repeat(copies)
    numbers_R = torch.arange(len(batch.example_R), device=option_KN.device)
    rows_M = by_option(batch, numbers_R, 0)[again_M, option_KN.flatten()]
    found = _part_of(batch, again_M, rows_M, torch.arange(copies * n, device=option_KN.device))
    if batch.prefix is not None:
        found.prefix = select_rows(batch.prefix, again_M if copies > 1 else None)
        found.prefix_fits_N = None if batch.prefix_fits_N is None else batch.prefix_fits_N[again_M]
        found.unshifted = batch.unshifted and batch.unshifted.picked(again_M, rows_M)
    return found


def _part_of(batch: Batch, example_K: Tensor, rows_R: Tensor, example_R: Tensor) -> Batch:
    """Some examples of a batch and some of its rows, whose examples are numbered anew; without prefixes."""
    return Batch(
        batch.examples_N[example_K.cpu().numpy()],
        batch.ids_NT[example_K],
        batch.mask_NT[example_K],
        batch.shared_N[example_K],
        example_R,
        batch.option_R[rows_R],
        batch.suffix_RM[rows_R],
        batch.length_R[rows_R],
    )


def by_option(batch: Batch, values_R: Tensor, missing: float | bool) -> Tensor:
    """Values of rows by example and option; (N, 2)."""
    empty_N2 = torch.full((len(batch.examples_N), 2), missing, dtype=values_R.dtype, device=values_R.device)
    return empty_N2.index_put((batch.example_R, batch.option_R), values_R)
