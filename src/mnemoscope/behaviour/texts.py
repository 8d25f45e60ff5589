"""Given texts, read behind their prompts: what each token costs, and the states at it.

Shapes: N texts, T tokens of a text, U = 1 + T with the last of its prompt, V vocabulary, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking, left_padded, pad_of
from mnemoscope.behaviour.states import capturing
from mnemoscope.models import context_length, pass_inputs, with_last_logits
from mnemoscope.runs.errors import InputError

LARGEST = 2**26  # logits of one pass


class Read(NamedTuple):
    """A text as a model reads it behind a prompt, float64, nats: by token its log probability, the entropy and the
    standard deviation of the log probabilities there, and by how much the likeliest token is likelier, 0 for itself.

    ``states_ULD``: float32 states of the prompt's last token and the text's.
    """

    logp_T: np.ndarray
    entropy_T: np.ndarray
    spread_T: np.ndarray
    behind_T: np.ndarray
    states_ULD: np.ndarray


@torch.no_grad()
def read_behind(
    asking: Asking, several: Sequence[tuple[list[int], list[int]]], layers: Sequence[int] = ()
) -> list[Read]:
    """Read texts behind prompts, (tokens of the prompt, tokens of the text) each, in batches of like length.

    ``layers``: blocks whose states are kept. Raises InputError for an empty prompt or text, or too long ones.
    """
    limit, found = context_length(asking.model), dict[int, Read]()
    for prompt, text in several:
        if not (prompt and text) or len(prompt) + len(text) > limit:
            what = f"a prompt and it have {len(prompt)} and {len(text)} tokens"
            raise InputError(f"answer: {what}; at least 1 each and at most {limit} are allowed together")
    for chosen in _batches(asking, several):
        longest = max(len(several[i][1]) for i in chosen)
        ids_NT, mask_NT = left_padded([[*several[i][0], *several[i][1]] for i in chosen], pad_of(asking.tokenizer))
        inputs = pass_inputs(asking.model, ids_NT.to(asking.model.device), mask_NT.to(asking.model.device))
        kept: AbstractContextManager[list[Tensor]] = nullcontext([])
        with capturing(asking.model, "block", layers, offsets=None) if layers else kept as states:
            logits_NTV = with_last_logits(asking.model, inputs, longest + 1).logits
        for n, i in enumerate(chosen):
            begins = -len(several[i][1]) - 1
            rows = [state_NTD[n, begins:].float().cpu().numpy() for state_NTD in states]
            states_ULD = np.stack(rows, axis=1) if rows else np.empty((0, 0, 0), np.float32)
            found[i] = Read(*_costs(logits_NTV[n, begins:-1], several[i][1]), states_ULD)
    return [found[i] for i in range(len(several))]


@torch.no_grad()
def next_tokens(asking: Asking, prompts: Sequence[list[int]], tried: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log probability of some tokens (K,) behind each prompt, nats, float64."""
    found = dict[int, np.ndarray]()
    for chosen in _batches(asking, [(prompt, []) for prompt in prompts]):
        ids_NT, mask_NT = left_padded([prompts[i] for i in chosen], pad_of(asking.tokenizer))
        inputs = pass_inputs(asking.model, ids_NT.to(asking.model.device), mask_NT.to(asking.model.device))
        logp_NV = with_last_logits(asking.model, inputs, 1).logits[:, -1].float().log_softmax(-1)
        for i, logp_V in zip(chosen, logp_NV.double().cpu().numpy(), strict=True):
            found[i] = logp_V[list(tried[i])]
    return [found[i] for i in range(len(prompts))]


def _costs(logits_TV: Tensor, ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """See ``Read``."""
    logp_TV = logits_TV.float().log_softmax(-1)
    said_T = logp_TV.gather(1, torch.tensor(ids, device=logp_TV.device)[:, None])[:, 0]
    mean_T, square_T = ((logp_TV.exp() * part_TV).sum(-1).double() for part_TV in (logp_TV, logp_TV.square()))
    spread_T = (square_T - mean_T.square()).clamp(min=1e-12).sqrt()
    parts = said_T.double(), -mean_T, spread_T, (logp_TV.max(-1).values - said_T).double()
    found = tuple(part_T.cpu().numpy() for part_T in parts)
    return found[0], found[1], found[2], found[3]


def _batches(asking: Asking, several: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
    """Places of texts of like length, as many at a time as ``asking`` has in a pass, and as their logits allow."""
    chosen, longest = list[int](), 0
    for i in sorted(range(len(several)), key=lambda n: sum(map(len, several[n]))):
        longest = max(longest, len(several[i][1]) + 1)
        most = min(asking.batch_size, LARGEST // (longest * len(asking.tokenizer)))
        if chosen and len(chosen) >= most:
            yield chosen
            chosen, longest = [], len(several[i][1]) + 1
        chosen.append(i)
    if chosen:
        yield chosen
