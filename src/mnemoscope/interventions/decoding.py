"""Contrastive decoding: the logits of a prompt and those of its contrast, joined at each token by a method's rule.

Shapes: N prompts, M tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from mnemoscope.interventions.contract import Bench, Contrast, Intervention, Seen, Toward
from mnemoscope.interventions.registry import method_module
from mnemoscope.runs.errors import InputError


@dataclass(frozen=True, kw_only=True, repr=False)
class Decoding(Intervention):
    """Logits that ``joined(first_NMV, other_NMV, **weights)`` of the method's module makes of two passes.

    ``first`` is the side to be followed; weights: ``setting`` without contrast and scale. ``alpha``: how far logits go
    from the prompt's own to the joined ones. A module with ``watched(model)`` is given what it saw in either pass too.
    """

    alpha: float = 1.0
    contrast: Contrast | None = "bare"

    KIND: ClassVar[str] = "decoding"
    passes: ClassVar[int] = 2

    def watched(self, model: Any) -> AbstractContextManager[Seen]:
        """That of the method's module, where it has one."""
        return getattr(method_module(self.method), "watched", super().watched)(model)

    def join(self, mine_NMV: Tensor, other_NMV: Tensor, *seen: Any) -> Tensor:
        """Joined logits; towards memory the two change roles."""
        both = [(mine_NMV, other_NMV), [one for one in seen if one is not None]]
        given = [one for pair in both for one in pair[:: self.toward.sign]]
        weights = {name: value for name, value in self.setting.items() if name not in ("contrast", "scaled")}
        joined_NMV: Tensor = method_module(self.method).joined(*given, **weights)
        return joined_NMV if self.alpha == 1.0 else mine_NMV + self.alpha * (joined_NMV - mine_NMV)

    def scaled(self, alpha: float) -> Intervention:
        """The same with another ``alpha``; 0 reads no second pass."""
        return replace(self, alpha=self.alpha * alpha) if alpha else super().scaled(0.0)


def candidates(bench: Bench, method: str, toward: Toward) -> list[Intervention]:
    """A method's rule with each of its ``SETTINGS``, against the prompt without its text, or its ``CONTRAST``.

    Raises InputError without a bare question, by which the text is found.
    """
    check_bares(bench, method)
    module = method_module(method)
    contrast: Contrast = getattr(module, "CONTRAST", "cut")
    return [
        Decoding(toward=toward, method=method, setting={**setting, "contrast": contrast}, contrast=contrast)
        for setting in module.SETTINGS
    ]


def check_bares(bench: Bench, method: str) -> None:
    """Raises InputError where a conflict has no bare question."""
    if not bench.has_bares:
        raise InputError(
            f"{method}: task {bench.task.name!r} has no bare question for every conflict (without_context; in a JSONL "
            "file the field 'bare'), with which it is contrasted"
        )
