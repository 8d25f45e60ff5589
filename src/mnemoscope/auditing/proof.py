"""Proof by steering: what moves recited originals off their answers must leave solved variants at theirs.

The shift is the paper's, a neuron-wise mean difference between near-identical inputs whose behaviour flips: variants
minus their original, at the decision position. It is fitted on half of the recited items and judged on the other half,
each in turn, so it is evidence for the group and not for an item.

Shapes: N prompts, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.auditing.answers import found_in, stated
from mnemoscope.auditing.items import Item, Variant
from mnemoscope.auditing.replies import Form, decision_states, replies
from mnemoscope.behaviour import Asking
from mnemoscope.interventions import SteeringVector, Toward
from mnemoscope.interventions.controls import gaussian
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import proportion

LEAST = 4  # recited items, of which half are fitted on
FACTORS = (0.5, 1.0, 2.0, 4.0)  # of the mean difference
PARTS = 3  # of the blocks: shifted are those of one part, or all
ALLOWED = 0.05  # of solved variants that may be lost where a setting is chosen
CONTROLS = 2  # draws of equal norm
SOLVABLE = 0.5  # share of its variants from which on an item would be solved as well
MOST = 64  # solved variants of which half are chosen on, drawn by chance


@dataclass(frozen=True)
class Asked:
    """What should be answered: the recited originals, and variants that were solved."""

    recited: Sequence[tuple[str, Variant]]
    solved: Sequence[tuple[str, Variant]]


def prove(
    asking: Asking, form: Form, items: Sequence[Item], rows: pd.DataFrame, recited: Sequence[str]
) -> dict[str, Any]:
    """Shares that lose their answers under the shift and under controls of equal norm, of both groups.

    Args:
        rows: of ``replies.rows_of``, of the unsteered model.
        recited: names of the items. Those are steered whose original is right and most of whose variants are not:
            an answer that would be solved as well is not lost with memory.

    Raises:
        InputError: there are too few of them.
    """
    right = set(rows.loc[rows["label"] == "right", "item"])
    variants = rows[rows["place"] > 0]
    solvable = (variants["label"] == "solved").groupby(variants["item"]).mean() >= SOLVABLE
    chosen = [
        item for item in items if item.item in recited and item.item in right and not solvable.get(item.item, True)
    ]
    if len(chosen) < LEAST:
        what = "recited items are answered right, and their variants mostly not"
        raise InputError(f"prove: {len(chosen)} {what}; at least {LEAST} are needed")
    solved_of = {(row.item, row.place) for row in rows.itertuples() if row.label == "solved"}
    solved = [
        (item.item, one) for item in items for n, one in enumerate(item.variants, 1) if (item.item, n) in solved_of
    ]
    few = np.random.default_rng(62).permutation(len(solved))[:MOST]
    solved = [solved[n] for n in sorted(few)]
    half = {item.item: n % 2 for several in (items, chosen) for n, item in enumerate(several)}
    found: dict[str, list[tuple[str, float]]] = {}
    for fold in range(2):
        fit, test = chosen[fold::2], chosen[1 - fold :: 2]
        shift_LD = _difference(asking, form, fit)
        lists = [
            Asked(
                [(i.item, Variant(i.prompt, i.answer)) for i in part],
                [s for s in solved if (half[s[0]] == fold) == own],
            )
            for part, own in ((fit, True), (test, False))
        ]
        best = _chosen(asking, form, shift_LD, lists[0])
        for role, one in [("shift", best), *(("control", _random(best, n + CONTROLS * fold)) for n in range(CONTROLS))]:
            for group, of in (("recited", lists[1].recited), ("solved", lists[1].solved)):
                found.setdefault(f"{role}_{group}", []).extend(_lost(asking, form, one, of))
    return {name: proportion([lost for _, lost in part], [item for item, _ in part]) for name, part in found.items()}


def _difference(asking: Asking, form: Form, items: Sequence[Item]) -> np.ndarray:
    """Mean over items of their variants' states minus their original's, float64 (L, D)."""

    originals_NLD = decision_states(asking, form, [(item.item, Variant(item.prompt, item.answer)) for item in items])
    variants = [(item.item, one) for item in items for one in item.variants]
    table = pd.Series(range(len(variants))).groupby([item for item, _ in variants], sort=False)
    variants_NLD = decision_states(asking, form, variants)
    means_NLD = np.stack([variants_NLD[list(rows)].mean(0) for _, rows in table])
    return (means_NLD - originals_NLD).mean(0)


def _chosen(asking: Asking, form: Form, shift_LD: np.ndarray, asked: Asked) -> SteeringVector:
    """Of all layers and strengths the one that loses most recited answers, and not too many solved ones."""
    layers = range(len(shift_LD))
    found = list[tuple[float, int, SteeringVector]]()
    for part, factor in product([*np.array_split(layers, PARTS), np.array(layers)], FACTORS):
        one = _vector(factor * shift_LD, part.tolist())
        recited, solved = (_share(_lost(asking, form, one, of)) for of in (asked.recited, asked.solved))
        found.append((recited - solved - 10 * max(0.0, solved - ALLOWED), -len(found), one))
    return max(found)[2]


def _vector(shift_LD: np.ndarray, layers: Sequence[int]) -> SteeringVector:
    chosen_LD = np.zeros_like(shift_LD)
    chosen_LD[list(layers)] = shift_LD[list(layers)]
    return SteeringVector(Toward.GENERALIZED, {}, method="nmd").with_dense(chosen_LD)


def _random(one: SteeringVector, seed: int) -> SteeringVector:
    """A Gaussian shift of the same norm in every layer."""
    shift_LD = one.dense(1 + max(one.layers), len(one.shifts[one.layers[0]])).astype(np.float64)
    return one.with_dense(gaussian(shift_LD, np.random.default_rng([seed, 62])))


def _lost(
    asking: Asking, form: Form, one: SteeringVector, of: Sequence[tuple[str, Variant]]
) -> list[tuple[str, float]]:
    """By item whether the right answer is lost."""
    with one.apply(asking.model):
        written = replies(asking, form, [form.asked(variant) for _, variant in of]) if of else []
    return [
        (item, float(found_in(reply.text, form.kind) != stated(variant.answer, form.kind)))
        for (item, variant), reply in zip(of, written, strict=True)
    ]


def _share(lost: Sequence[tuple[str, float]]) -> float:
    return float(np.mean([one for _, one in lost])) if lost else 0.0
