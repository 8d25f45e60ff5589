"""Scaled heads in two passes: what is added to heads comes from a first, unchanged pass (arXiv 2503.10996)."""

from __future__ import annotations

from itertools import product

from mnemoscope.arena.contract import Intervention
from mnemoscope.arena.heads import Ranked, factors_of, in_two_passes, ranked
from mnemoscope.arena.lists import Bench
from mnemoscope.steering import Toward

COUNTS = (5, 10)  # heads of either kind
UP = (0.0, 0.5, 1.0, 3.0, 5.0)
DOWN = (0.0, 1.0, 3.0)
TRIED = [(count, up, down) for count, up, down in product(COUNTS, UP, DOWN) if up or down]


def heads_for(bench: Bench, toward: Toward) -> Ranked:
    """The ranking of heads towards a behaviour, made once for both methods."""
    known: Ranked | None = bench.cache.get(("heads", toward))
    if known is None:
        known = bench.cache["heads", toward] = ranked(bench, toward)
    return known


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of heads and pair of factors; InputError for a model whose heads are not found."""
    model, ranks, found = bench.asking.model, heads_for(bench, toward), []
    for count, up, down in TRIED:
        applied = in_two_passes(model, factors_of(model, ranks, count, up, down))
        setting = {"heads": count, "up": up, "down": down}
        found.append(Intervention("juice", toward, setting, 2, applied=applied, in_one_go=True))
    return found
