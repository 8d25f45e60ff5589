"""The sentence under each figure, computed from the numbers; see ``sentences`` for the words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mnemoscope.report.intervals import Tree
from mnemoscope.report.measures import SIGNIFICANT
from mnemoscope.report.records import Cell, Contrast
from mnemoscope.report.sentences import (
    ANSWERED,
    UNMEASURED,
    argmax,
    count,
    known,
    listed,
    percent,
    why_nothing,
    with_interval,
)


def emergence(cells: Sequence[Cell]) -> str:
    table = next((cell.training for cell in cells if cell.training is not None), None)
    if table is None or table.empty:
        return "This model was loaded, not trained here, so there is no curve."
    kept = table[table.kept.astype(bool)]
    if kept.empty:
        return f"No step was kept in {count(table.step.iloc[-1], 'step')} of training."
    row = kept.iloc[0]
    met = table[table.met.astype(bool)]
    first = f"The stop rule first held at step {met.step.iloc[0]:,.0f}. " if len(met) else "The stop rule never held. "
    return (
        f"{first}The weights kept are those of step {row.step:,.0f}: {percent(row.novel_accuracy)} of new questions "
        f"right, {percent(row.recall)} of facts recalled, and conflicts answered {percent(row.conflict_memorized)} "
        f"from memory, {percent(row.conflict_generalized)} by working it out."
    )


def behaviour(task: Tree) -> str:
    found = task["behaviour"]
    conflict = found["conflict"]
    if not known(conflict["memorized"]):
        return f"What the model does in conflicts {UNMEASURED}: the test split holds none."
    shares = [f"{with_interval(conflict[key])} are {ANSWERED[key]}" for key in ("memorized", "generalized")]
    text = f"Of {count(conflict['memorized']['n'], 'test conflict')}, {listed(shares)}; {_other(conflict)}."
    scores = []
    if known(found["novel_accuracy"]):
        scores.append(f"gets {percent(found['novel_accuracy']['estimate'])} of new questions right")
    if known(found["recall"]):
        scores.append(f"recalls {percent(found['recall']['estimate'])} of the facts")
    return f"{text} Where nothing conflicts, it {listed(scores)}." if scores else text


def _other(conflict: Tree) -> str:
    text = f"{percent(conflict['other']['estimate'])} get an answer that is neither"
    if known(conflict["confabulated"]) and conflict["other"]["estimate"] > 0:
        made_up = percent(conflict["confabulated"]["estimate"])
        text += f" ({made_up} look like a stored answer but were never stored for that question)"
    return text


def margins(cells: Sequence[Cell]) -> str:
    values = pd.concat([cell.behaviour[cell.behaviour.kind == "conflict"].margin for cell in cells]).to_numpy(float)
    values = values[np.isfinite(values)]
    if not len(values):
        return f"The decision margin {UNMEASURED}: there are no test conflicts."
    low, high = np.quantile(values, [0.25, 0.75])
    near = float((np.abs(values) < 1).mean())
    return (
        f"The middle half of the conflicts has margins from {low:.1f} to {high:.1f} nats. {percent(near).capitalize()} "
        "lie within 1 nat of the tipping point, where a small push decides."
    )


def pairs(task: Tree) -> str:
    found = task["pairs"]
    if not found["candidates"]:
        return f"The yield {UNMEASURED}: the test split has no candidates."
    return (
        f"{found['pairs']:,} of {count(found['candidates'], 'test candidate')} flip when they are put in other "
        f"words: a yield of {with_interval(found['yield'])}, from {count(found['groups'], 'group')}."
    )


def heatmap(task: Tree) -> str:
    contrast = task["contrast"]
    top = argmax(contrast["mean_abs_nmd"])
    if top is None:
        return f"The difference between the behaviours {UNMEASURED}. {why_nothing(task)}"
    nmd, layers = contrast["mean_abs_nmd"], contrast["layers"]
    text = f"The two behaviours differ most in layer {layers[top]}, by {nmd[top]:.2g} on average over its neurons"
    if top and nmd[0] > 0:
        text += f", {_times(nmd[top] / nmd[0])} times as much as in layer {layers[0]}"
    return f"{text}. {_significant(contrast)}"


def _significant(contrast: Tree) -> str:
    best = argmax(contrast["significant_fraction"])
    if best is None:
        return f"How many neurons differ for certain {UNMEASURED}."
    share = contrast["significant_fraction"][best]
    if not share:
        return f"No neuron differs for certain (family-wise p \u2264 {SIGNIFICANT})."
    return (
        f"Tested over all neurons together, {percent(share)} of those in layer {contrast['layers'][best]} differ, "
        f"from {count(contrast['pairs'], 'pair')} of {count(contrast['groups'], 'group')}."
    )


def correlations(contrast: Contrast, task: Tree) -> str:
    rho_LD = np.abs(contrast.rho)
    if np.isnan(rho_LD).all():
        return f"The correlation {UNMEASURED}. {why_nothing(task)}"
    layer, _ = np.unravel_index(np.nanargmax(rho_LD), rho_LD.shape)
    half = float(np.nanmedian(rho_LD[layer]))
    return (
        f"The strongest neuron is in layer {layer}: its activity correlates with the behaviour at |rho| = "
        f"{np.nanmax(rho_LD):.2g}. Half of that layer's neurons stay below {half:.2g}."
    )


def _times(ratio: float) -> str:
    """Two digits, and never a power of ten."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
