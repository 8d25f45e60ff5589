"""Context-aware decoding: the bare question's distribution is taken out of the prompt's, or the other way round.

Shi et al. (2023), "Trusting your evidence: hallucinate less with context-aware decoding", arXiv 2305.14739.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

SETTINGS = [{"weight": weight} for weight in (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)]


def joined(first_NMV: Tensor, other_NMV: Tensor, weight: float | Tensor) -> Tensor:
    """``(1 + weight) * logits - weight * other logits``."""
    return (1 + weight) * first_NMV - weight * other_NMV
