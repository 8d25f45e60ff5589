"""Contrastive decoding: the logits of a prompt and those of its contrast, joined at each token.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from mnemoscope.interventions.contract import Contrast, Intervention, Toward
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

CONTRASTS: tuple[Contrast, ...] = ("bare", "cut")  # a bare question may be put otherwise than the prompt


@dataclass(frozen=True, kw_only=True, repr=False)
class Decoding(Intervention):
    """Base class of rules: a subclass has its parameters as fields, and joins distributions in ``joined``.

    ``alpha``: how far logits go from the prompt's own to the joined ones.
    """

    alpha: float = 1.0
    contrast: Contrast | None = "bare"

    passes: ClassVar[int] = 2

    def join(self, mine_NMV: Tensor, other_NMV: Tensor) -> Tensor:
        """Joined logits; towards memory the two change roles."""
        both = (mine_NMV, other_NMV) if self.toward == "generalized" else (other_NMV, mine_NMV)
        joined_NMV = self.joined(*both)
        return joined_NMV if self.alpha == 1.0 else mine_NMV + self.alpha * (joined_NMV - mine_NMV)

    def scaled(self, alpha: float) -> Intervention:
        """The same with another ``alpha``; 0 reads no second pass."""
        return replace(self, alpha=self.alpha * alpha) if alpha else super().scaled(0.0)

    def joined(self, first_NMV: Tensor, other_NMV: Tensor) -> Tensor:
        """Logits from those of the side to be followed and those of the other."""
        raise NotImplementedError


def with_contrasts(
    bench: Bench, rule: type[Decoding], toward: Toward, settings: Iterable[Mapping[str, Any]]
) -> list[Intervention]:
    """A rule with each setting and either contrast; InputError where a conflict has no bare question."""
    check_bares(bench, rule.KIND)
    both = (({**setting}, contrast) for setting in settings for contrast in CONTRASTS)
    return [
        rule(toward=toward, method=rule.KIND, setting=setting | {"contrast": contrast}, contrast=contrast, **setting)
        for setting, contrast in both
    ]


def check_bares(bench: Bench, method: str) -> None:
    """Raises InputError where a conflict has no bare question."""
    if not bench.has_bares:
        raise InputError(
            f"{method}: task {bench.task.name!r} has no bare question for every conflict (without_context; in a JSONL "
            "file the field 'bare'), with which it is contrasted"
        )
