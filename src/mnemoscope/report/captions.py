"""The sentence under each figure, computed from the numbers; see ``sentences`` for the words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.intervals import Tree
from mnemoscope.report.measures import SIGNIFICANT
from mnemoscope.report.records import DIRECTIONS, Cell, Contrast
from mnemoscope.report.sentences import (
    ANSWERED,
    CONTROL_NAMES,
    TOWARDS,
    UNMEASURED,
    R,
    argmax,
    certain,
    count,
    interval,
    known,
    listed,
    percent,
    points,
    points_interval,
    strongest_control,
    why_nothing,
    with_interval,
)

NAMES = {
    "novel": "new questions",
    "memory": "facts to recall",
    "conflict_rest": "conflicts that already went the wanted way",
}


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
        text += f", {nmd[top] / nmd[0]:.2g} times as much as in layer {layers[0]}"
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


def probe(task: Tree) -> str:
    found = task["probe"]
    best = argmax([entry["estimate"] for entry in found["accuracy"]])
    if best is None:
        return f"How well the behaviour can be read {UNMEASURED}. {why_nothing(task)}"
    accuracy, beyond, alone = found["accuracy"][best], found["minus_input_only"][best], found["input_only"]
    side = "above" if beyond["estimate"] >= 0 else "below"
    sure = "" if certain(beyond) else ", which is not a sure difference"
    text = (
        f"The probe reads best at layer {found['layers'][best]}: right in {percent(accuracy['estimate'])} of test "
        f"states ({interval(accuracy)}), {points(abs(beyond['estimate']))} {side} what the input alone gives "
        f"({percent(alone['estimate'])}){sure}."
    )
    if len(found["layers"]) > 1:
        text += f" With the layer chosen on other test groups: {with_interval(found['best']['accuracy'])}."
    if known(found["shuffled"]):
        text += f" Trained on shuffled labels it is right in {percent(found['shuffled']['estimate'])}."
    return text


def _towards(direction: str) -> str:
    return TOWARDS[direction].capitalize()


def turning(task: Tree, direction: str) -> str:
    block = task["steering"][direction]
    shift = block["pairs"]["shift"]
    if not known(shift):
        text = f"Turning pairs {TOWARDS[direction]} {UNMEASURED}. {why_nothing(task)}"
        return f"{text} {_elsewhere(block, direction)}" if known(block["conflict"]["shift"]) else text
    text = f"{_towards(direction)}, the vector turns {with_interval(shift)} of test pairs"
    control = strongest_control(block)
    if control is None:
        text += "; no control was run"
    else:
        difference = block["minus_control"][control]["pairs"]
        theirs = block["controls"][control]["pairs"]["shift"]["estimate"]
        amount = f"{points(abs(difference['estimate']))} ({points_interval(difference)})"
        side = "more" if difference["estimate"] >= 0 else "fewer"
        text += f", {amount} {side} than {CONTROL_NAMES.get(control, control.replace('_', ' '))} ({percent(theirs)})"
    made_up = block["pairs"]["confabulated"]
    if known(made_up) and made_up["estimate"] > 0:
        text += f"; {percent(made_up['estimate'])} get an answer that only looks remembered"
    return f"{text}. {_elsewhere(block, direction)}"


def methods(task: Tree, direction: str) -> str:
    """The chosen way of turning beside the paper's own; empty where only one was tried or nothing could be measured."""
    chosen = task["steering"][direction]["chosen"]["method"]
    found = {name: block[direction] for name, block in task["steering_by_method"].items() if direction in block}
    shift = found[chosen]["pairs"]["shift"] if chosen in found else None
    if shift is None or not known(shift):
        return ""
    turned = percent(shift["estimate"])
    text = f"{_towards(direction)}, {chosen} was chosen on the tune split and turns {turned} of test pairs"
    paper = found.get("nmd")
    if chosen != "nmd" and paper and known(paper["pairs"]["shift"]):
        text += f"; the paper's own shift, nmd, turns {percent(paper['pairs']['shift']['estimate'])}"
    return f"{text}."


def _elsewhere(block: Tree, direction: str) -> str:
    shift = block["conflict"]["shift"]
    source = {"memorized": "answered from memory", "generalized": "worked out"}[DIRECTIONS[direction][1]]
    if not known(shift):
        return f"On other conflicts it {UNMEASURED}: none was {source} without it."
    control = strongest_control(block, "conflict")
    theirs = block["controls"][control]["conflict"]["shift"]["estimate"] if control else math.nan
    compared = "" if math.isnan(theirs) else f", the strongest control {percent(theirs)}"
    return f"Of all test conflicts that were {source}, it turns {with_interval(shift)}{compared}."


def collateral(task: Tree, direction: str) -> str:
    """What steering damages; new questions have nothing to remember, so towards remembering they are told apart."""
    found = task["steering"][direction]["collateral"]
    apart = direction == "to_memorized"
    counted = [key for key in NAMES if known(found[key]) and not (apart and key == "novel")]
    damaged = [f"{NAMES[key]} {_lose(found[key])}" for key in counted if certain(found[key]) < 0]
    if damaged:
        text = f"{_towards(direction)}, {listed(damaged)}."
    elif counted:
        text = f"{_towards(direction)}, no sure damage was seen."
    else:
        text = f"{_towards(direction)}, damage {UNMEASURED}: there were no such examples."
    if apart and certain(found["novel"]) < 0:
        text += f" New questions, which have nothing to remember, {_lose(found['novel'])}."
    return text


def _lose(change: R) -> str:
    return f"lose {points(-change['estimate'])} ({points_interval(change)})"
