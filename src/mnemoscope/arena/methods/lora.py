"""An adapter trained on the wanted answers: the upper bound that changes weights."""

from __future__ import annotations

from functools import partial

from mnemoscope.arena.adapters import trained, with_adapter
from mnemoscope.arena.contract import Intervention, unchanged
from mnemoscope.arena.fitting import surprise
from mnemoscope.arena.lists import Bench
from mnemoscope.steering import Toward

STRENGTHS = (0.25, 0.5, 1.0)  # of the adapter once it is trained
RATE = 1e-3


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every strength of one adapter; InputError without peft."""
    loss = partial(surprise, applied=unchanged, everywhere=True)
    adapter = trained(bench, toward, RATE, loss, loss)
    return [
        Intervention(
            "lora",
            toward,
            {"strength": strength},
            changes_weights=True,
            applied=with_adapter(bench.asking.model, adapter, strength),
            everywhere=True,
        )
        for strength in STRENGTHS
    ]
