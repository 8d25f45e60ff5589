"""Context-aware decoding: the bare question's distribution is taken out of the prompt's, or the other way round.

Shi et al. (2023), "Trusting your evidence: hallucinate less with context-aware decoding", arXiv 2305.14739.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.decoding import Decoding, with_contrasts

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "context-aware decoding (arXiv 2305.14739)"
WEIGHTS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class ContextAware(Decoding):
    """``(1 + weight) * logits - weight * other logits``."""

    weight: float

    KIND: ClassVar[str] = "cad"

    def joined(self, first_NMV: Tensor, other_NMV: Tensor) -> Tensor:
        """The weighted difference."""
        return (1 + self.weight) * first_NMV - self.weight * other_NMV


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every weight and contrast; InputError where the task has no bare questions."""
    return with_contrasts(bench, ContextAware, toward, ({"weight": weight} for weight in WEIGHTS))
