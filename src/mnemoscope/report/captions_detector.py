"""What the figures of a detector show, in words computed from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from mnemoscope.report.figures_detector import ranked_families
from mnemoscope.report.intervals import Tree
from mnemoscope.report.records import Cell
from mnemoscope.report.sentences import (
    TOWARDS,
    UNMEASURED,
    count,
    interval,
    known,
    percent,
    points,
    with_interval,
)


def detector(detection: Tree) -> list[str]:
    """How well prompts are ranked, beside what needs no state, family by family; whether it keeps its word."""
    found = detection["auroc"]
    if not known(found["p_memorized"]):
        return [f"How well P(memorized) tells {UNMEASURED}: the test prompts show one behaviour only."]
    inputs = max((found["input_only"], found["input_repeats"]), key=lambda rival: rival["estimate"])
    rivals = {"the input alone": inputs, "its own certainty": found["top_gap"]}
    beside = ", ".join(f"{name} {percent(value['estimate'])}" for name, value in rivals.items() if known(value))
    texts = [
        f"Of a prompt that will be remembered and one that will be worked out, the detector gives the first the higher "
        f"probability in {percent(found['p_memorized']['estimate'])} of the cases "
        f"({interval(found['p_memorized'])}); {beside}."
    ]
    families = [entry for entry in ranked_families(detection) if not entry[0].startswith("held out")]
    if len(families) > 1:
        worst = min(families, key=lambda entry: entry[1]["estimate"])
        texts.append(f"Within one phrasing, at worst: {with_interval(worst[1])} ({worst[0]}).")
    texts.append(f"Mean squared error of the probability: {detection['brier']['estimate']:.3f}.")
    strange = {name: share for name, share in detection["unlike"].items() if known(share)}
    if strange:
        parts = ", ".join(f"{name.replace('_', ' ')} {percent(share['estimate'])}" for name, share in strange.items())
        texts.append(f"Unlike what it was fitted on: {parts}.")
    return texts


def neutral(found: Tree, direction: str) -> str:
    """What the chosen strength does to text in which nothing is asked, with the gate and without."""
    entry = found.get(direction, {}).get("1")
    if not entry or not known(entry["first"]):
        return ""
    text = (
        f"{TOWARDS[direction].capitalize()}, the chosen vector moves the next token of neutral text by "
        f"{entry['first']['estimate']:.2f} nats and each of the following by {entry['next']['estimate']:.2f}; the "
        f"likeliest token stays in {percent(entry['same_top']['estimate'])}"
    )
    if known(entry["acted"]):
        text += (
            f". Behind the gate, which acts on {percent(entry['acted']['estimate'])}: "
            f"{entry['first_gated']['estimate']:.2f} and {entry['next_gated']['estimate']:.2f}"
        )
    return text + "."


def written(cells: Sequence[Cell]) -> str:
    """How natural the unsteered model finds what it writes when it is steered; "" without samples."""
    if cells[0].samples is None:
        return ""
    rows = pd.concat([cell.samples for cell in cells if cell.samples is not None])
    return (
        f"A token of what follows costs the unsteered model {rows.nats_steered.mean():.2f} nats when it was steered, "
        f"{rows.nats_plain.mean():.2f} when it was not ({count(len(rows), 'prompt')})."
    )


def gated(task: Tree, direction: str) -> str:
    """How often the gate acts, what is still turned, what is no longer damaged."""
    block = task["steering"][direction]
    if "gated" not in block or not known(block["gated"]["acted"].get("pairs", {"estimate": float("nan")})):
        return ""
    found = block["gated"]
    text = (
        f"{TOWARDS[direction].capitalize()}, the gate acts on {percent(found['acted']['pairs']['estimate'])} of "
        f"{count(found['acted']['pairs']['n'], 'pair')}, and {percent(found['shift']['pairs']['estimate'])} are turned "
        f"instead of {percent(block['pairs']['shift']['estimate'])}"
    )
    memory = found["collateral"].get("memory")
    if memory and known(memory) and known(block["collateral"]["memory"]):
        text += (
            f"; facts to recall change by {points(memory['estimate'], sign=True)} instead of "
            f"{points(block['collateral']['memory']['estimate'], sign=True)}"
        )
    return text + "."
