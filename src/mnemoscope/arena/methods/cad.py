"""Context-aware decoding: the bare question's distribution is taken out of the prompt's, or the other way round.

Shi et al. (2023), "Trusting your evidence: hallucinate less with context-aware decoding", arXiv 2305.14739.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.lists import Bench
from mnemoscope.errors import InputError
from mnemoscope.steering import Toward

WEIGHTS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


def contrasted(prompt_NMV: Tensor, bare_NMV: Tensor, weight: float, toward: Toward) -> Tensor:
    """``(1 + weight) * logits - weight * other logits``; towards memory the bare question's logits come first."""
    if not weight:
        return prompt_NMV
    first_NMV, other_NMV = (prompt_NMV, bare_NMV) if toward == "generalized" else (bare_NMV, prompt_NMV)
    return (1 + weight) * first_NMV - weight * other_NMV


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every weight; InputError where the task has no bare questions."""
    check_bares(bench, "cad")
    return [
        Intervention("cad", toward, {"weight": a}, 2, joined=partial(contrasted, weight=a, toward=toward))
        for a in WEIGHTS
    ]


def check_bares(bench: Bench, method: str) -> None:
    """Raises InputError where a conflict has no bare question."""
    if not bench.has_bares:
        raise InputError(
            f"{method}: task {bench.task.name!r} has no bare question for every conflict (without_context; in a JSONL "
            "file the field 'bare'), with which it is contrasted"
        )
