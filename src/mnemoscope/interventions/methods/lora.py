"""An adapter trained on the wanted answers: the upper bound that changes weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mnemoscope.interventions.adapter import of_each_strength, trained
from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.descent import surprise, unchanged

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench

ABOUT = "an adapter trained on the wanted answers"
RATE = 1e-3


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every strength of one adapter; InputError without peft."""
    loss = partial(surprise, applied=unchanged, everywhere=True)
    return of_each_strength(trained(bench, "lora", toward, RATE, loss, loss))
