"""Scaled heads in one pass: heads that help are enlarged, heads that hurt suppressed (arXiv 2503.10996)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemoscope.interventions import Intervention, Scale, SteeringVector, Toward
from mnemoscope.rivals.heads import SETTINGS, factors_of, ranked

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "heads scaled in one pass (arXiv 2503.10996)"


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of heads and pair of factors; InputError for a model whose heads are not found."""
    model, ranks, found = bench.asking.model, ranked(bench, toward), list[Intervention]()
    for count, up, down in SETTINGS:
        edits = {layer: Scale(factor_D) for layer, factor_D in factors_of(model, ranks, count, up, down).items()}
        setting = {"heads": count, "up": up, "down": down}
        found.append(SteeringVector(toward, edits, "head", method="june", setting=setting))
    return found
