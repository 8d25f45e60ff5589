"""What transformers gives for what a server has answered. Imports no vLLM.

A server's own tokens are read in one pass: greedy is an answer whose every token is the best behind those before it.

Shapes: N requests, T tokens of a left-padded batch, M tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import left_padded, states_at_the_end
from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import SteeringVector
from mnemoscope.interventions.detect import Detector, Reading
from mnemoscope.models import cache_of, pass_inputs, with_last_logits

BATCH = 8  # requests in a pass
LONG = 128  # tokens of a prompt from which on it is not padded to others that are shorter


@dataclass(frozen=True, slots=True)
class Request:
    """What a server is asked: to continue ``ids`` greedily by so many ``tokens``, whatever they are.

    ``settings`` are those of ``vllm_xargs``. Only requests with the same ``salt`` may use one another's cached blocks.
    """

    ids: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 12
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server gave.

    Attributes:
        status: of HTTP; 200 is an answer, else ``message`` says why there is none.
        tokens, log_p: of the answer, and their log probabilities.
        report: what the plugin tells of the request; None where it tells nothing.
    """

    status: int
    tokens: tuple[int, ...] = ()
    log_p: tuple[float, ...] = ()
    report: Mapping[str, Any] | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Expected:
    """Of the tokens that a server gave, float32 (M,): log probabilities, and by how much another token was better."""

    log_p_M: np.ndarray
    behind_M: np.ndarray


@torch.no_grad()
def expected_of(
    fitted: Fitted, requests: Sequence[Request], answers: Sequence[Answer], factors: Sequence[float]
) -> list[Expected]:
    """What transformers gives for answers, each with one token or more, whose vectors act with a factor; 0: not."""
    groups: dict[tuple[str, int, bool], list[int]] = defaultdict(list)
    for n, (request, answer, factor) in enumerate(zip(requests, answers, factors, strict=True)):
        toward = request.settings["steer"] if factor else ""
        groups[toward, len(answer.tokens), len(request.ids) >= LONG].append(n)
    found: dict[int, Expected] = {}
    for (toward, length, _), members in groups.items():
        for begin in range(0, len(members), BATCH):
            some = members[begin : begin + BATCH]
            ids_NT, mask_NT = _padded(fitted, [requests[n].ids for n in some])
            behind_NM = torch.tensor([answers[n].tokens for n in some], device=ids_NT.device)
            all_NT, all_mask_NT = (torch.cat(both, 1) for both in ((ids_NT, behind_NM), (mask_NT, behind_NM * 0 + 1)))
            inputs = pass_inputs(fitted.model, all_NT, all_mask_NT) | {"use_cache": False}
            mine, last = [factors[n] for n in some], ids_NT.shape[1] - 1
            vector = fitted.vector(toward) if toward else None  # type: ignore[arg-type]
            with vector.apply(fitted.model, mine, _start(vector, last)) if vector else nullcontext():
                logits_NMV = with_last_logits(fitted.model, inputs, length + 1).logits[:, -length - 1 : -1]
            found |= dict(zip(some, _of_logits(logits_NMV, behind_NM), strict=True))
    return [found[n] for n in range(len(requests))]


@torch.no_grad()
def leaked(fitted: Fitted, talk: Request, written: Answer, follow: Request, answer: Answer) -> np.ndarray:
    """Log probabilities (M,) of the answer to an unsteered follow-up, had it read keys and values of a steered talk.

    The follow-up begins with the prompt of the talk and all of its answer.
    """
    ids_1T = torch.tensor([[*follow.ids, *answer.tokens]], device=fitted.model.device)
    mask_1T, before = torch.ones_like(ids_1T), len(talk.ids) + len(written.tokens)
    alpha, vector = talk.settings.get("alpha", 1.0), fitted.vector(talk.settings["steer"])
    with vector.apply(fitted.model, alpha, _start(vector, len(talk.ids) - 1)):
        cache = cache_of(fitted.model(**pass_inputs(fitted.model, ids_1T[:, :before], mask_1T[:, :before])))
    logits_1MV = fitted.model(**pass_inputs(fitted.model, ids_1T[:, before:], mask_1T, cache)).logits
    length = len(answer.tokens)
    return _of_logits(logits_1MV[:, -length - 1 : -1], ids_1T[:, -length:])[0].log_p_M


def _start(vector: SteeringVector, last: int) -> int | None:
    """The column from which on a vector acts, where it is not the first."""
    return None if vector.positions == "all" else last


def readings(fitted: Fitted, detector: Detector, prompts: Sequence[tuple[int, ...]]) -> Reading:
    """What a detector reads at the end of prompts."""
    ids_NT, mask_NT = _padded(fitted, prompts)
    states_N1D = states_at_the_end(fitted.model, ids_NT, mask_NT, detector.site, [detector.layer])
    return detector.read_verdict(states_N1D[:, 0])


def _padded(fitted: Fitted, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    pad = fitted.tokenizer.pad_token_id or 0
    ids_NT, mask_NT = left_padded([list(ids) for ids in prompts], pad)
    return ids_NT.to(fitted.model.device), mask_NT.to(fitted.model.device)


def _of_logits(logits_NMV: Tensor, tokens_NM: Tensor) -> list[Expected]:
    log_p_NMV = logits_NMV.float().log_softmax(-1)
    log_p_NM = log_p_NMV.gather(2, tokens_NM[..., None].to(log_p_NMV.device))[..., 0]
    behind_NM = log_p_NMV.max(-1).values - log_p_NM
    return [Expected(*both) for both in zip(log_p_NM.cpu().numpy(), behind_NM.cpu().numpy(), strict=True)]
