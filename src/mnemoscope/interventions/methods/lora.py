"""An adapter trained on the wanted answers: the upper bound that changes weights."""

from __future__ import annotations

from mnemoscope.interventions.adapter import adapters, again
from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.sources import PERMUTED

NULLS = (PERMUTED,)
__all__ = ["NULLS", "again", "candidates"]


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every rate and strength; InputError without peft."""
    return adapters(bench, "lora", toward)
