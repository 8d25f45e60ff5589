"""What a training step learns from: token ids with weights, and their loss.

Shapes: N instances, B of a batch, R of one pass, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.behaviour import Asking
from mnemoscope.config import TrainingConfig
from mnemoscope.models import context_length
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Instance, Task, answer_of

AHEAD = 8  # batches that are tokenized in one call
MUCH_PADDING = 0.15  # share of a batch's tokens that two passes must save


def backward(model: Any, ids_BT: Tensor, weights_BT: Tensor) -> float:
    """Loss of a batch; accumulates its gradients."""
    # Weighted mean over the batch: each pass contributes its sum divided by the weights of the whole batch.
    total, loss = weights_BT[:, 1:].sum(), 0.0
    for ids_RT, weights_RT in by_length(ids_BT, weights_BT):
        part = weighted_loss(model, ids_RT, weights_RT, total)
        part.backward()
        loss += float(part.detach())
    return loss


def weighted_loss(model: Any, ids_RT: Tensor, weights_RT: Tensor, total: Tensor) -> Tensor:
    """Weighted sum of the next-token losses of one pass, divided by ``total``, the weights of the whole batch."""
    logits_RTV = model(input_ids=ids_RT[:, :-1].to(model.device), use_cache=False).logits
    # Flattened: cross entropy over three dimensions has no deterministic CUDA kernel.
    losses_R = nn.functional.cross_entropy(
        logits_RTV.float().flatten(0, 1), ids_RT[:, 1:].flatten().to(model.device), reduction="none"
    )
    return (losses_R * weights_RT[:, 1:].flatten().to(model.device)).sum() / total.to(model.device)


def batches(
    asking: Asking,
    task: Task,
    config: TrainingConfig,
    rng: np.random.Generator,
    after: int = 0,
    dial_at: Callable[[int], float | None] = lambda step: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids (B, T) int64, right-padded, and each token's weight in the loss (B, T) float32; an endless stream.

    ``after``: batches that are drawn, but not given. ``dial_at``: the value of the dial of ``config.hold`` for
    instances that are drawn behind so many batches; a stream that goes on draws what it would have drawn.
    """
    task = copy.copy(task)  # whose dial is moved
    instances, drawn = task.training(rng), 0
    while True:
        if config.hold is not None and (value := dial_at(drawn)) is not None:
            setattr(task, config.hold.dial, value)
        chunk = list(islice(instances, AHEAD * config.batch_size))
        drawn += AHEAD
        if after >= AHEAD:
            after -= AHEAD
            continue
        ids_NT, weights_NT = _tokenize(asking, chunk, config.prompt_weight)
        both = zip(ids_NT.split(config.batch_size), weights_NT.split(config.batch_size), strict=True)
        yield from islice(both, after, None)
        after = 0


def _tokenize(asking: Asking, instances: list[Instance], prompt_weight: float) -> tuple[Tensor, Tensor]:
    parts, tokenizer = [answer_of(instance) for instance in instances], asking.tokenizer
    encoded = tokenizer([p + a for p, a in parts], return_offsets_mapping=True)
    longest = max(len(ids) for ids in encoded.input_ids) + 1
    if longest > context_length(asking.model):
        raise InputError(f"model.context: {context_length(asking.model)} tokens; a training instance has {longest}")
    # Padded with end-of-text tokens of weight 0: the library would warn of pad tokens.
    ids_NT = np.full((len(parts), longest), tokenizer.eos_token_id)
    weights_NT = np.zeros(ids_NT.shape, np.float32)
    rows = zip(encoded.input_ids, encoded.offset_mapping, parts, strict=True)
    for row, (ids, offsets, (prompt, answer)) in enumerate(rows):
        n = len(ids)
        ids_NT[row, :n], ids_NT[row, n] = ids, tokenizer.eos_token_id
        seam = len(prompt) if answer else 0
        if any(start < seam < end for start, end in offsets):
            raise InputError(
                f"task: the tokenizer merges the answer {answer!r} with the end of the prompt {prompt[-30:]!r} in a "
                "training instance; let the seam lie between two tokens"
            )
        weights_NT[row, :n] = [1.0 if end > seam else prompt_weight for _, end in offsets]
        weights_NT[row, n] = 1.0
    return torch.from_numpy(ids_NT), torch.from_numpy(weights_NT)


def by_length(ids_BT: Tensor, weights_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split a batch into short and long rows where that saves ``MUCH_PADDING`` of its tokens."""
    rows, longest = ids_BT.shape
    length_B = row_lengths(weights_BT)
    lengths, counts = length_B.unique(return_counts=True)
    read = counts.cumsum(0) * lengths + (rows - counts.cumsum(0)) * longest
    short = lengths[read.argmin()]
    if int(read.min()) > (1 - MUCH_PADDING) * rows * longest:
        return [(ids_BT, weights_BT)]
    parts = [rows_B for rows_B in (length_B <= short, length_B > short) if rows_B.any()]
    return [(ids_BT[r, : length_B[r].max()], weights_BT[r, : length_B[r].max()]) for r in parts]


def row_lengths(weights_BT: Tensor) -> Tensor:
    """Tokens of each row (B,) int64; a row ends at its last token with a weight, the end of text."""
    return (torch.arange(1, weights_BT.shape[1] + 1) * (weights_BT > 0)).amax(1)
