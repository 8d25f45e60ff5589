"""An adapter trained on the wanted answers: the upper bound that changes weights."""

from __future__ import annotations

from mnemoscope.interventions.adapter import adapters
from mnemoscope.interventions.contract import Bench, Intervention, Toward

ABOUT = "an adapter trained on the wanted answers"


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every strength of one adapter; InputError without peft."""
    return adapters(bench, "lora", toward)
