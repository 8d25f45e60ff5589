"""Solved conflicts before the prompt, each with the answer that is wanted."""

from __future__ import annotations

from itertools import product

import numpy as np

from mnemoscope.interventions import Intervention, Toward
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.sources import spread_groups
from mnemoscope.interventions.words import Words

SHOTS, BETWEEN = (2, 4), {"line": "\n", "blank line": "\n\n"}


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of solved conflicts and what is between them; their groups are of the fit split alone."""
    found, solved = list[Intervention](), drawn(bench, toward)
    for shots, (name, between) in product(SHOTS, BETWEEN.items()):
        text = "".join(one + between for one in solved[:shots]).removesuffix("\n")  # a prompt follows on its own line
        found.append(Words(toward=toward, method="few-shot", setting={"shots": shots, "between": name}, text=text))
    return found


def drawn(bench: Bench, toward: Toward) -> list[str]:
    """Fit conflicts with their wanted answers, of different groups where there are such."""
    examples = bench.fit_conflicts.examples
    order = np.random.default_rng([bench.seed, 41]).permutation(len(examples))
    return [e.prompt + str(getattr(e, toward)) for e in spread_groups(examples[n] for n in order)[: max(SHOTS)]]
