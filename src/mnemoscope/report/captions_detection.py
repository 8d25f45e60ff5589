"""What the figures of reading, of consistency and of transfer show, in words computed from the numbers."""

from __future__ import annotations

import math
from typing import Any

from mnemoscope.report.figures_detection import overlaps, seed_rows, transferred
from mnemoscope.report.intervals import Tree
from mnemoscope.report.records import DIRECTIONS
from mnemoscope.report.sentences import (
    TOWARDS,
    UNMEASURED,
    argmax,
    certain,
    interval,
    known,
    listed,
    percent,
    points,
    points_interval,
    why_nothing,
    with_interval,
)

# what a probe has to beat -> how the page calls it
RIVALS = {
    "input_only": "the input alone",
    "input_repeats": "what repeats in the input",
    "entropy": "the entropy of the next token",
    "top_gap": "the gap between its two likeliest tokens",
}


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
    return text


def rivals(task: Tree) -> list[str]:
    """Which baselines the probe beats for certain, how early it can tell, and what fewer pairs give."""
    best = task["probe"]["best"]
    differences = {name: best.get(f"minus_{kind}") for kind, name in RIVALS.items()}
    parts = [f"{name} {_beats(found)}" for name, found in differences.items() if found and known(found)]
    if not parts:
        return [f"What the probe has to beat {UNMEASURED}. {why_nothing(task)}"]
    rest = [_early(task["probe"]), _few(task.get("learning", {}))]
    return [f"The probe against {listed(parts)}.", *(text for text in rest if text)]


def _beats(difference: Tree) -> str:
    verdict = {1: "it beats", -1: "it loses to", 0: "unclear"}[certain(difference)]
    return f"({verdict}, {points(difference['estimate'], sign=True)}, {points_interval(difference)})"


def _early(probe: Tree) -> str:
    if len(probe.get("best_by_offset", {})) < 2 or "known_from" not in probe:
        return ""
    chance, alone = (_from(probe["known_from"].get(what, math.nan)) for what in ("chance", "input_only"))
    return f"Surely above chance: {chance}. Surely above the input alone: {alone}."


def _from(offset: float) -> str:
    """Where something is first known, as tokens before the decision; NaN where nowhere."""
    if math.isnan(offset):
        return "nowhere"
    if not offset:
        return "only at the decision itself"
    return f"already {offset:.0f} token{'' if offset == 1 else 's'} before the decision"


def _few(learning: Tree) -> str:
    accuracy = learning.get("accuracy", {})
    keys = sorted(accuracy, key=lambda key: learning["pairs"][key])
    if len(keys) < 2 or not known(accuracy[keys[0]]):
        return ""
    first, last = (
        f"{percent(accuracy[k]['estimate'])} from {learning['pairs'][k]:.0f} pairs" for k in (keys[0], keys[-1])
    )
    return f"It is right in {first}, and in {last}."


def steadiness(task: Tree, seeds: list[dict[str, Any]]) -> list[str]:
    found = [entry for entry in overlaps(task, seeds) if known(entry[2])]
    if not found:
        return [f"Whether the same neurons are found again {UNMEASURED}. {why_nothing(task)}"]
    texts = []
    for between, words in (("halves", "Two halves of the fit pairs"), ("seeds", "Two seeds")):
        entry = next((e for e in found if e[0] == between), None)
        if entry:
            _, top, share, chance = entry
            beyond = "above" if share["estimate"] > chance["high"] else "not above"
            texts.append(
                f"{words} share {percent(share['estimate'])} of their top {100 * top:g}\u00a0% of neurons by |rho|, "
                f"{beyond} chance ({percent(chance['estimate'])}, up to {percent(chance['high'])})."
            )
    rows = seed_rows(seeds, "rank_correlation")
    if rows:
        began = "began with the same weights" if rows[0]["shared_initialization"] else "began with other weights each"
        texts.append(f"The seeds {began}.")
    return texts


def transfer(matrix: Tree) -> list[str]:
    """Own against foreign, on average over all twos of labels."""
    labels = sorted({*matrix, *(target for targets in matrix.values() for target in targets)})
    texts = []
    for what in (*DIRECTIONS, "probe"):
        own: list[float] = []
        foreign: list[float] = []
        chance: list[float] = []
        for source in labels:
            for target in labels:
                found = transferred(matrix, source, target, what)
                if found:
                    (own if source == target else foreign).append(found[0]["estimate"])
                    chance += [found[1]] if source != target and not math.isnan(found[1]) else []
        if foreign:
            texts.append(_carried(what, own, foreign, chance))
    return texts


def _carried(what: str, own: list[float], foreign: list[float], chance: list[float]) -> str:
    average = [percent(sum(values) / len(values)) if values else "unmeasured" for values in (foreign, own, chance)]
    if what == "probe":
        return f"A probe of another task is right in {average[0]}, a task's own in {average[1]}."
    return (
        f"{TOWARDS[what].capitalize()}, a vector of another task turns {average[0]} on average, a task's own "
        f"{average[1]}, Gaussian shifts {average[2]}."
    )
