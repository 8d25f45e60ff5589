"""Passes of a model over contexts and answers; whatever no vector changes is read once.

A shift that starts at the decision position changes nothing before it, and behind it nothing in the blocks below the
first shift. Both are kept with a batch, so that a setting of a sweep costs the decision token and the answers, and of
these only the blocks above the first shift.

Shapes: N examples, T tokens of a left-padded context, R rows (one per example and option), S rows that are read on,
M tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking
from mnemoscope.behaviour.batches import Batch, Unshifted, kept_bytes, picked
from mnemoscope.models import backbone_of, cache_of, pass_inputs, select_rows, states_of, with_last_logits, with_states
from mnemoscope.models.caches import make_room
from mnemoscope.models.passes import logits_at, recorded_blocks, replayed_blocks, rows_of_prompts, untouched_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# From this share of wanted rows on, reading all is cheaper than copying the keys and values of some.
MOST_ROWS = 0.75
MOST_BYTES = 2**30  # kept of a list: small next to a model for which that is few prompts


@dataclass(frozen=True, slots=True)
class Contexts:
    """A pass over contexts."""

    logits_NV: Tensor  # at the decision position
    begins_N: Tensor  # whether the model itself produces the shared beginning of the options
    cache: Any  # keys and values of the contexts
    known: int = 0  # how many of the first blocks need not be run for the answers


@dataclass(frozen=True, slots=True)
class Answers:
    """A pass over options: their rows in the batch, their tokens and how many, and logits at some of the tokens."""

    rows_S: Tensor
    suffix_SM: Tensor
    length_S: Tensor
    read_SM: Tensor  # at which tokens
    logits_KV: Tensor  # there, in order

    @classmethod
    def whole(cls, batch: Batch, logits_SMV: Tensor) -> Answers:
        """A pass over the only option of each example, with the logits at all of its tokens."""
        read_SM = torch.ones(logits_SMV.shape[:2], dtype=torch.bool, device=logits_SMV.device)
        suffix_SM = batch.suffix_RM[:, : logits_SMV.shape[1]]
        return cls(batch.example_R, suffix_SM, batch.length_R, read_SM, logits_SMV.flatten(0, 1))


@torch.no_grad()
def cache_prefixes(asking: Asking, batches: Sequence[Batch], most_bytes: int = MOST_BYTES) -> None:
    """Read every context up to, not including, its decision position, and keep the caches in the batches.

    Once more than ``most_bytes`` are kept, further batches stay as they are. Batches can be scored again and again,
    but not two at a time: what follows a prefix is written behind it.
    """
    kept = 0
    for batch in batches:
        if kept > most_bytes:
            return
        ids_NT, keep = batch.ids_NT[:, :-1], int(batch.shared_N.max())
        if ids_NT.shape[1] == 0:
            continue
        inputs = pass_inputs(asking.model, ids_NT, batch.mask_NT[:, :-1])
        # No head where no logits are needed.
        output = with_last_logits(asking.model, inputs, keep) if keep else backbone_of(asking.model)(**inputs)
        batch.prefix_fits_N = _shared_fits(batch, output.logits if keep else None)
        batch.prefix = cache_of(output)
        # Without room in every layer it is a kind of model whose blocks may leave other things behind.
        has_room = make_room(batch.prefix, 1 + batch.suffix_RM.shape[1])
        batch.unshifted = _read_unshifted(asking.model, batch) if has_room else None
        kept += kept_bytes(batch)


def _read_unshifted(model: PreTrainedModel, batch: Batch) -> Unshifted:
    with recorded_blocks(model) as context_L:
        cache = cache_of(backbone_of(model)(**_decision_inputs(model, batch)))
    columns_L = [(layer.keys[:, :, -1:].clone(), layer.values[:, :, -1:].clone()) for layer in cache.layers]
    with recorded_blocks(model) as answers_L:
        backbone_of(model)(**_answer_inputs(model, cache, batch.mask_NT, batch.suffix_RM, batch.example_R))
    return Unshifted(context_L, answers_L, columns_L[: len(context_L)])


def read_contexts(model: PreTrainedModel, batch: Batch) -> Contexts:
    """Read contexts up to and including their decision positions."""
    if batch.prefix is None:
        inputs = pass_inputs(model, batch.ids_NT, batch.mask_NT)
        output = with_last_logits(model, inputs, int(batch.shared_N.max()) + 1)
        return Contexts(output.logits[:, -1].float(), _shared_fits(batch, output.logits[:, :-1]), cache_of(output))
    assert batch.prefix_fits_N is not None
    known, context, _ = _known_blocks(model, batch)
    with replayed_blocks(model, known, context):
        output = with_last_logits(model, _decision_inputs(model, batch))
    cache = cache_of(output)
    for layer, column in zip(cache.layers, batch.unshifted.columns_L[:known] if batch.unshifted else (), strict=False):
        layer.update(*column)
    return Contexts(output.logits[:, -1].float(), batch.prefix_fits_N, cache, known)


def read_answers(
    model: PreTrainedModel, batch: Batch, contexts: Contexts, wanted_R: Tensor, closed_R: Tensor | None = None
) -> Answers | None:
    """Read the wanted options, and perhaps others, whose logits are left out; None where none is wanted.

    Args:
        wanted_R: without ``closed_R`` only options of several tokens.
        closed_R: the options of which the last token is read too, whose logits predict what follows; None: of none.
    """
    rows_S, example_S = _rows_to_read(batch, wanted_R)
    if len(rows_S) == 0:
        return None
    length_S = batch.length_R[rows_S]
    suffix_SM = batch.suffix_RM[rows_S, : int(length_S.max())]
    behind_SM = suffix_SM if closed_R is not None else suffix_SM[:, :-1]
    used_S = length_S - 1 if closed_R is None else length_S - 1 + closed_R[rows_S].long()
    step_M = torch.arange(behind_SM.shape[1], device=used_S.device)
    read_SM = (step_M < used_S[:, None]) & wanted_R[rows_S][:, None]
    returned = None
    if contexts.known and batch.unshifted:
        returned = picked(batch.unshifted.answers_L[contexts.known - 1], rows_S, behind_SM.shape[1])
    with replayed_blocks(model, contexts.known, returned), rows_of_prompts(batch.example_R[rows_S]):
        inputs = _answer_inputs(model, contexts.cache, batch.mask_NT, behind_SM, example_S)
        logits_KV = logits_at(model, inputs, read_SM).float()
    return Answers(rows_S, suffix_SM, length_S, read_SM, logits_KV)


def read_only_options(model: PreTrainedModel, batch: Batch, closed: bool = False) -> Tensor:
    """Logits that predict each token of each example's only option, float32 (N, M, V), in one pass.

    ``closed`` adds those of what follows the longest option.
    The decision position is inside this pass: the last column of ``batch.ids_NT``, which vectors need as ``start``.
    """
    assert torch.equal(batch.example_R, torch.arange(len(batch.examples_N), device=batch.example_R.device))
    behind_NM = batch.suffix_RM[:, : int(batch.length_R.max()) - (not closed)]
    mask_NT = torch.cat([batch.mask_NT, torch.ones_like(behind_NM)], dim=1)
    if batch.prefix is None:
        inputs = pass_inputs(model, torch.cat([batch.ids_NT, behind_NM], dim=1), mask_NT)
        return with_last_logits(model, inputs, behind_NM.shape[1] + 1).logits.float()
    known, context, answers = _known_blocks(model, batch)
    if known:
        both = [states_of(context), states_of(answers)[:, : behind_NM.shape[1]]]
        context = with_states(context, torch.cat(both, dim=1))
    ids_NM = torch.cat([batch.ids_NT[:, -1:], behind_NM], dim=1)
    with replayed_blocks(model, known, context):
        return model(**pass_inputs(model, ids_NM, mask_NT, select_rows(batch.prefix, None))).logits.float()


def _known_blocks(model: PreTrainedModel, batch: Batch) -> tuple[int, Any, Any]:
    """How many of the first blocks need not be run, and what the last of them returned for contexts and answers."""
    known = min(untouched_blocks(model), len(batch.unshifted.context_L)) if batch.unshifted else 0
    if not known or not batch.unshifted:
        return 0, None, None
    return known, batch.unshifted.context_L[known - 1], batch.unshifted.answers_L[known - 1]


def _rows_to_read(batch: Batch, wanted_R: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows to read on, and their examples (None: every example once, in order, whose cache needs no copy)."""
    rows_S = torch.nonzero(wanted_R)[:, 0]
    example_S, n = batch.example_R[rows_S], len(batch.examples_N)
    once = bool((example_S[1:] != example_S[:-1]).all())
    if not once or len(rows_S) < MOST_ROWS * n:
        return rows_S, example_S
    first_N = torch.searchsorted(batch.example_R, torch.arange(n, device=rows_S.device))
    return first_N.index_put((example_S,), rows_S), None


def _decision_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    return pass_inputs(model, batch.ids_NT[:, -1:], batch.mask_NT, select_rows(batch.prefix, None))


def _answer_inputs(
    model: PreTrainedModel, cache: Any, mask_NT: Tensor, suffix_SM: Tensor, example_S: Tensor | None
) -> dict[str, Any]:
    """A pass over answers behind the contexts of their examples (None: one answer for every example, in order)."""
    mask_ST = mask_NT if example_S is None else mask_NT[example_S]
    mask_ST = torch.cat([mask_ST, torch.ones_like(suffix_SM)], dim=1)
    return pass_inputs(model, suffix_SM, mask_ST, select_rows(cache, example_S))


def _shared_fits(batch: Batch, logits_NKV: Tensor | None) -> Tensor:
    """Whether the model itself produces the options' shared beginning, by logits before the last token; bool (N,)."""
    if logits_NKV is None or logits_NKV.shape[1] == 0:
        return torch.ones_like(batch.shared_N, dtype=torch.bool)
    keep = logits_NKV.shape[1]
    matches_NK = logits_NKV.argmax(-1) == batch.ids_NT[:, -keep:]
    counts_NK = torch.arange(keep, 0, -1, device=matches_NK.device) <= batch.shared_N[:, None]
    return (matches_NK | ~counts_NK).all(1)
