"""Sizes of a small arena, and what plain transformers decode, for tests of interventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mnemoscope.behaviour import Asking
from mnemoscope.bench.prompts import Prompts

SIZES: dict[str, Any] = {
    **{"conflicts": 24, "kept": 8, "varied": 6, "tune_conflicts": 16, "tune_kept": 4, "fit_conflicts": 40},
    **{"fit_kept": 8, "pairs": 40, "steps": 4, "batch": 8, "controls": 2, "fits": 2, "written": 8, "tokens": 5},
    **{"cuts": 4, "following": 4, "batch_size": 16},
}
PLANTED = ("planted.last_pair", "planted.clamp", "planted.sharper")  # methods of a user's own
LONGEST = 5  # tokens of a greedy answer that are compared


def plainly(model: Any, ids: list[int]) -> Tensor:
    """Logits of every position, float32 (T, V), from one pass of plain transformers."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def greedy(asking: Asking, ids: list[int], logits_of: Callable[[list[int]], Tensor]) -> list[int]:
    """Greedy decoding without a cache, by a function of all tokens so far -> logits of the next."""
    ends, found = asking.boundary_ids(), list(ids)
    for _ in range(LONGEST):
        found.append(int(logits_of(found).argmax()))
        if found[-1] in ends:
            break
    return found[len(ids) :]


def labels_by(asking: Asking, prompts: Prompts, answer: Callable[[int], list[int]]) -> list[str]:
    """Labels of answers, by comparing tokens."""
    ends, found = asking.boundary_ids(), []
    for n, example in enumerate(prompts.examples):
        tokens = answer(n)
        said = asking.tokenizer.decode(tokens[:-1]).split() if tokens[-1] in ends else None
        names = ("memorized", "generalized") if example.kind == "conflict" else ("correct",)
        fits = [name for name, option in zip(names, example.options, strict=True) if said == option.split()]
        found.append(fits[0] if fits else "other" if example.kind == "conflict" else "wrong")
    return found


def ids_of(asking: Asking, prompt: str) -> list[int]:
    return list(asking.tokenizer(prompt).input_ids)
