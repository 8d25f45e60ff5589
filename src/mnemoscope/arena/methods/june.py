"""Scaled heads in one pass: heads that help are enlarged, heads that hurt suppressed (arXiv 2503.10996)."""

from __future__ import annotations

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.heads import factors_of, in_one_pass
from mnemoscope.arena.lists import Bench
from mnemoscope.arena.methods.juice import TRIED, heads_for
from mnemoscope.steering import Toward


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of heads and pair of factors; InputError for a model whose heads are not found."""
    model, ranks, found = bench.asking.model, heads_for(bench, toward), []
    for count, up, down in TRIED:
        applied = in_one_pass(model, factors_of(model, ranks, count, up, down))
        found.append(Intervention("june", toward, {"heads": count, "up": up, "down": down}, applied=applied))
    return found
