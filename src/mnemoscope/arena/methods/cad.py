"""Context-aware decoding: the bare question's distribution is taken out of the prompt's, or the other way round.

Shi et al. (2023), "Trusting your evidence: hallucinate less with context-aware decoding", arXiv 2305.14739.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from mnemoscope.arena.contract import Contrast, Intervention, Joined
from mnemoscope.arena.lists import Bench
from mnemoscope.errors import InputError
from mnemoscope.steering import Toward

WEIGHTS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
CONTRASTS: tuple[Contrast, ...] = ("bare", "cut")  # a bare question may be put otherwise than the prompt


def contrasted(prompt_NMV: Tensor, bare_NMV: Tensor, weight: float, toward: Toward) -> Tensor:
    """``(1 + weight) * logits - weight * other logits``; towards memory the bare question's logits come first."""
    if not weight:
        return prompt_NMV
    first_NMV, other_NMV = (prompt_NMV, bare_NMV) if toward == "generalized" else (bare_NMV, prompt_NMV)
    return (1 + weight) * first_NMV - weight * other_NMV


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every weight and contrast; InputError where the task has no bare questions."""
    rules = {a: partial(contrasted, weight=a, toward=toward) for a in WEIGHTS}
    return [one for a, rule in rules.items() for one in in_two_passes(bench, "cad", toward, {"weight": a}, rule)]


def in_two_passes(
    bench: Bench, method: str, toward: Toward, setting: Mapping[str, Any], joined: Joined
) -> list[Intervention]:
    """A rule that joins two passes, with either contrast; InputError where the task has no bare questions."""
    check_bares(bench, method)
    return [
        Intervention(method, toward, {**setting, "contrast": contrast}, 2, joined=joined, contrast=contrast)
        for contrast in CONTRASTS
    ]


def check_bares(bench: Bench, method: str) -> None:
    """Raises InputError where a conflict has no bare question."""
    if not bench.has_bares:
        raise InputError(
            f"{method}: task {bench.task.name!r} has no bare question for every conflict (without_context; in a JSONL "
            "file the field 'bare'), with which it is contrasted"
        )
