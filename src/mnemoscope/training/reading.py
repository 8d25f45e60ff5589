"""Training batches of token ids with loss weights, split into passes with little padding.

Shapes: N instances, B of a batch, R of one pass, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Asking
from mnemoscope.config import TrainingConfig
from mnemoscope.errors import InputError
from mnemoscope.models import context_length
from mnemoscope.tasks import Instance, Task, answer_of

AHEAD = 32  # batches that are tokenized in one call
MUCH_PADDING = 0.15  # share of a batch's tokens that two passes must save
MOST_LOGITS = 2**27  # of a pass, 512 MiB; the gradient and the log-probabilities take as much each


def batches(
    asking: Asking, task: Task, config: TrainingConfig, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids (B, T) int64, right-padded, and each token's weight in the loss (B, T) float32; an endless stream."""
    instances = task.training(rng)
    while True:
        chunk = list(islice(instances, AHEAD * config.batch_size))
        ids_NT, weights_NT = _tokenize(asking, chunk, config.prompt_weight)
        yield from zip(ids_NT.split(config.batch_size), weights_NT.split(config.batch_size), strict=True)


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


def passes(ids_BT: Tensor, weights_BT: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a batch into passes of at most ``MOST_LOGITS`` logits."""
    for ids_RT, weights_RT in by_length(ids_BT, weights_BT):
        rows = max(1, MOST_LOGITS // (ids_RT.shape[1] * vocabulary))
        yield from zip(ids_RT.split(rows), weights_RT.split(rows), strict=True)


def by_length(ids_BT: Tensor, weights_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split a batch into short and long rows where that saves ``MUCH_PADDING`` of its tokens.

    A row ends at its last token with a weight, the end of text.
    """
    rows, longest = ids_BT.shape
    length_B = (torch.arange(1, longest + 1) * (weights_BT > 0)).amax(1)
    lengths, counts = length_B.unique(return_counts=True)
    read = counts.cumsum(0) * lengths + (rows - counts.cumsum(0)) * longest
    short = lengths[read.argmin()]
    if int(read.min()) > (1 - MUCH_PADDING) * rows * longest:
        return [(ids_BT, weights_BT)]
    parts = [rows_B for rows_B in (length_B <= short, length_B > short) if rows_B.any()]
    return [(ids_BT[r, : length_B[r].max()], weights_BT[r, : length_B[r].max()]) for r in parts]
