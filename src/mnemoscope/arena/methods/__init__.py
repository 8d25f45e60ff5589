"""The methods, one file each: ``candidates(bench, toward)`` fits one and returns its settings, to be chosen on tune."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from mnemoscope.errors import InputError

if TYPE_CHECKING:
    from mnemoscope.arena.contract import Intervention
    from mnemoscope.arena.lists import Bench
    from mnemoscope.steering import Toward

# By name, what a method is, in the order in which they run: cheap ones first.
METHODS = {
    "prompt": "a sentence in the prompt, the best of five in two places",
    "cad": "context-aware decoding (arXiv 2305.14739)",
    "adacad": "the same, weighted by how far the two distributions differ (arXiv 2409.07394)",
    "coiecd": "contrast where a token is unlikely to be by the bare question (arXiv 2402.11893)",
    "caa": "mean difference of pairs at one layer (arXiv 2312.06681)",
    "nmd": "mean difference on the neurons that correlate most, all layers (arXiv 2412.18497)",
    "gradient": "steepest ascent of the decision margin, one layer",
    "learned": "a shift that is optimized, one layer",
    "low-rank": "ours: low-rank shifts of every token at several blocks, taught by the model's own answers",
    "iti": "heads that a probe reads best, shifted (arXiv 2306.03341)",
    "june": "heads scaled in one pass (arXiv 2503.10996)",
    "juice": "heads scaled by what they gave in a first pass (arXiv 2503.10996)",
    "ircan": "neurons of the highest attribution scaled (arXiv 2406.18406)",
    "knob": "one coordinate at one layer, set to a value (arXiv 2411.07404)",
    "reft": "low-rank edit of the state (arXiv 2404.03592)",
    "lora": "an adapter trained on the wanted answers",
    "dpo": "an adapter trained on wanted over other answers",
}


def candidates(method: str, bench: Bench, toward: Toward) -> Sequence[Intervention]:
    """Fit a method and return its settings.

    Raises:
        InputError: this model or task cannot take it; the reason is named.
    """
    if method not in METHODS:
        raise InputError(f"methods: {method!r} is not one of {', '.join(METHODS)}")
    module = import_module(f"mnemoscope.arena.methods.{method.replace('-', '_')}")
    found: Sequence[Intervention] = module.candidates(bench, toward)
    return found
