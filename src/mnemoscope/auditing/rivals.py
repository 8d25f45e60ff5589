"""Rivals that need replies: how much of a text is completed as it stands, and how alike sampled replies are.

Rivals that need likelihoods alone are in ``replies.likelihoods``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mnemoscope.auditing.replies import Form, replies
from mnemoscope.behaviour import Asking

SAMPLES, TEMPERATURE, CLOSE = 10, 0.8, 0.05  # of CDD: replies, their temperature, and how far a close one may be


def completed(asking: Asking, texts: Sequence[str]) -> list[float]:
    """Of each text how much of its second half is written behind its first, ROUGE-L by words (F1, 0 to 1).

    Golchin & Surdeanu 2023 (arXiv 2308.08493), without their instruction, which names the benchmark.
    """
    words = [text.split() for text in texts]
    halves = [(" ".join(part[: len(part) // 2]), part[len(part) // 2 :]) for part in words]
    longest = max(len(asking.tokenizer(" ".join(rest)).input_ids) for _, rest in halves)
    written = replies(asking, Form("short", tokens=longest), [first for first, _ in halves])
    return [_rouge(reply.text.split()[: len(rest)], rest) for reply, (_, rest) in zip(written, halves, strict=True)]


def peaked(asking: Asking, form: Form, asked: Sequence[str], seed: int = 0) -> list[float]:
    """Of each prompt the share of sampled replies that are close to the greedy one (CDD, 0 to 1).

    Close: an edit distance in tokens of at most ``CLOSE`` of the longest of its replies; Dong et al. 2024
    (arXiv 2402.15938). Samples are the greedy replies to logits with Gumbel noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def sampled(_: Tensor, logits_NV: Tensor) -> Tensor:
        uniform_NV = torch.rand(logits_NV.shape, generator=generator).clamp(min=1e-20).to(logits_NV.device)
        return logits_NV / TEMPERATURE - (-uniform_NV.log()).log()

    def tokens(several: Sequence[str], *processors: Callable[[Tensor, Tensor], Tensor]) -> list[list[int]]:
        return [asking.tokenizer(reply.text).input_ids for reply in replies(asking, form, several, processors)]

    greedy, found = tokens(asked), []
    samples = tokens([prompt for prompt in asked for _ in range(SAMPLES)], sampled)
    for n, ids in enumerate(greedy):
        own = samples[n * SAMPLES : (n + 1) * SAMPLES]
        longest = max(len(one) for one in (ids, *own))
        found.append(sum(_distance(one, ids) <= CLOSE * longest for one in own) / SAMPLES)
    return found


def _rouge(found: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of the longest common subsequence (Lin 2004)."""
    lengths = [0] * (len(wanted) + 1)
    for word in found:
        before = 0
        for place, other in enumerate(wanted, 1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if word == other else max(lengths[place], lengths[place - 1]),
            )
    return 2 * lengths[-1] / (len(found) + len(wanted)) if found else 0.0


def _distance(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Edit distance (Levenshtein 1966)."""
    row = list(range(len(wanted) + 1))
    for number, token in enumerate(found, 1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(wanted, 1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (token != other))
    return row[-1]
