"""What each figure shows, in words computed from the numbers, true also where a result is negative or undefined.

An R is an estimate as ``results.json`` holds it: ``{"estimate", "low", "high", "n"}``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnemoscope.report.intervals import Tree
from mnemoscope.report.records import DIRECTIONS

R = dict[str, Any]
NBSP = "\u00a0"
UNMEASURED = "could not be measured"
TOWARDS = {"to_generalized": "towards working it out", "to_memorized": "towards remembering"}
ANSWERED = {"memorized": "remembered", "generalized": "worked out", "other": "answered in some other way"}
CONTROL_NAMES = {
    "random_neurons": "the same shift on random neurons",
    "gaussian": "Gaussian noise of the same norm",
    "low_correlation": "the same shift on the neurons with the lowest |rho|",
    "random_sign": "the same shift with random signs",
    "shuffled_labels": "a vector learned from shuffled labels",
}


NAMES = {
    "novel": "new questions",
    "memory": "facts to recall",
    "conflict_rest": "conflicts that already went the wanted way",
}
SHORT_NAMES = {**NAMES, "conflict_rest": "conflicts that already went so"}


def known(value: float | R) -> bool:
    """Whether a number, or the estimate of an R, is defined."""
    return not math.isnan(value["estimate"] if isinstance(value, dict) else value)


def percent(share: float) -> str:
    """A share in per cent: whole, but with a decimal where whole numbers would say nothing or all."""
    if math.isnan(share):
        return UNMEASURED
    value = 100 * share
    digits = 1 if 0 < abs(value) < 1 or 99 < abs(value) < 100 else 0
    if digits and abs(value) < 0.05:
        return f"under 0.1{NBSP}%"
    if digits and abs(value) > 99.95:
        return f"over 99.9{NBSP}%"
    return f"{value:.{digits}f}{NBSP}%"


def interval(share: R) -> str:
    """``60 to 66 %`` for a share, cut to what a share can be; as many digits as it needs to have two ends."""
    if not known(share) or math.isnan(share["low"]):
        return "no interval"
    low, high = (min(1.0, max(0.0, share[end])) for end in ("low", "high"))
    digits = 1 if high - low < 0.02 else 0
    return f"{100 * low:.{digits}f}{NBSP}to{NBSP}{100 * high:.{digits}f}{NBSP}%"


def with_interval(share: R) -> str:
    """``63 % (60 to 66 %)``, with as many digits outside the brackets as inside."""
    if known(share) and "." in interval(share):
        return f"{100 * share['estimate']:.1f}{NBSP}% ({interval(share)})"
    return f"{percent(share['estimate'])} ({interval(share)})" if known(share) else UNMEASURED


def points(change: float, *, sign: bool = False) -> str:
    """A difference of shares, in percentage points."""
    if math.isnan(change):
        return UNMEASURED
    value = round(100 * change) + 0
    unit = "point" if abs(value) == 1 else "points"
    return f"{value:+d}{NBSP}{unit}" if sign and value else f"{value:d}{NBSP}{unit}"


def points_interval(change: R) -> str:
    """``6 to 12``, in percentage points, cut to what a difference of shares can be."""
    if not known(change) or math.isnan(change["low"]):
        return "no interval"
    low, high = (min(100, max(-100, round(100 * change[end]))) for end in ("low", "high"))
    return f"{low + 0:d}{NBSP}to{NBSP}{high + 0:d}"


def certain(change: R) -> int:
    """+1 or -1 where the interval lies wholly above or below 0, else 0 (also where there is none)."""
    return 1 if change["low"] > 0 else -1 if change["high"] < 0 else 0


def count(number: float, noun: str, plural: str = "") -> str:
    """``1 pair``, ``1,200 pairs``."""
    return f"{number:,.0f}{NBSP}{noun if number == 1 else plural or noun + 's'}"


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def argmax(values: list[float]) -> int | None:
    """Where the largest defined value is; None where none is."""
    return None if all(math.isnan(value) for value in values) else int(np.nanargmax(values))


# --- the three answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One of the three questions, answered for one task.

    Attributes:
        anchor: the end of the identifier of the section that shows it.
        verdict: one or a few words.
        number: as text.
        sentence: what the number means.
        note: its interval, and what else should be known beside it.
        strip: (low, estimate, high, reference) as shares, for the small scale; NaN where there is nothing to draw.
        reference: what the reference mark of the scale is; empty without one.
    """

    anchor: str
    question: str
    verdict: str
    number: str
    sentence: str
    note: str
    strip: tuple[float, float, float, float]
    reference: str = ""


def answers(task: Tree) -> list[Answer]:
    return [do_they_differ(task), can_it_be_read(task), can_it_be_turned(task)]


def why_nothing(task: Tree) -> str:
    """The reason why pairs could not be compared."""
    pairs = task["pairs"]
    if not pairs["by_split"]["all"]["pairs"]:
        candidates = count(pairs["by_split"]["all"]["candidates"], "candidate")
        return f"None of {candidates} flipped, so there are no pairs to compare."
    if not pairs["by_split"]["fit"]["pairs"]:
        return "No candidate of the fit split flipped, so there was nothing to learn from."
    if not pairs["pairs"]:
        return f"None of the {count(pairs['candidates'], 'test candidate')} flipped, so there is nothing to score on."
    return "The records hold no rows for it."


def do_they_differ(task: Tree) -> Answer:
    contrast, question = task["contrast"], "Do they differ?"
    share = contrast["significant"]
    best = argmax(contrast["significant_fraction"])
    if best is None:
        return Answer("differ", question, "Not measured", "", why_nothing(task), "", (math.nan,) * 4)
    most = contrast["significant_fraction"][best]
    verdict = "Yes" if share["estimate"] > 0 else "Not that it shows"
    sentence = f"of {share['n'] // len(task['seeds']):,} neurons differ when all are tested together."
    if math.isnan(share["low"]):
        seeds = "all seeds agree" if len(task["seeds"]) > 1 else "one seed, so no interval"
        notes = ["Family-wise p \u2264 0.05", seeds]
    else:
        notes = [f"95{NBSP}% interval over seeds: {interval(share)}"]
    if share["estimate"] > 0:
        notes.append(f"most in layer {contrast['layers'][best]} ({percent(most)})")
    else:
        notes.append(f"on {count(contrast['pairs'], 'pair')}")
    input_only = task["probe"]["input_only"]
    if share["estimate"] > 0 and known(input_only) and input_only["low"] > 0.5:
        notes.append(f"so do their wordings: the input alone tells {percent(input_only['estimate'])} apart")
    strip = (share["low"], share["estimate"], share["high"], math.nan)
    return Answer("differ", question, verdict, percent(share["estimate"]), sentence, "; ".join(notes), strip)


def can_it_be_read(task: Tree) -> Answer:
    best, question = task["probe"]["best"], "Can it be read?"
    accuracy, (beyond, alone) = best["accuracy"], _strongest_input(task["probe"])
    if not known(accuracy):
        return Answer("read", question, "Not measured", "", why_nothing(task), "", (math.nan,) * 4)
    if certain(beyond) > 0:
        verdict = "Yes, beyond the input"
    elif accuracy["low"] > 0.5 and certain(beyond) < 0:
        verdict = "Yes, but better from the input alone"
    elif accuracy["low"] > 0.5:
        verdict = "Yes, but not surely beyond the input"
    else:
        verdict = "Not that it shows"
    where = f"a linear probe on {_layers(best['picked'])}"
    sentence = f"of test states are told apart by {where}, {_compared(beyond)} the input alone."
    strip = (accuracy["low"], accuracy["estimate"], accuracy["high"], alone["estimate"])
    note = f"95{NBSP}% interval: {interval(accuracy)}, of the difference {points_interval(beyond)}"
    return Answer("read", question, verdict, percent(accuracy["estimate"]), sentence, note, strip, "input alone")


def _strongest_input(probe: Tree) -> tuple[R, R]:
    """Probe minus input alone, and the input alone: of the two ways to read the input, the one that leaves least."""
    found = [
        (probe["best"][f"minus_{kind}"], probe[kind])
        for kind in ("input_only", "input_repeats")
        if kind in probe and f"minus_{kind}" in probe["best"] and known(probe["best"][f"minus_{kind}"])
    ]
    undefined = {"estimate": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    return min(found, key=lambda pair: pair[0]["estimate"], default=(undefined, undefined))


def _compared(difference: R) -> str:
    """``9 points more than from``."""
    side = "more" if difference["estimate"] >= 0 else "fewer"
    return f"{points(abs(difference['estimate']))} {side} than from"


def _layers(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {listed([str(layer) for layer in layers])}"


def can_it_be_turned(task: Tree) -> Answer:
    """Of two ways, the number is that of the harder one."""
    question, steering = "Can it be turned?", task["steering"]
    measured = [d for d in DIRECTIONS if known(steering[d]["pairs"]["shift"])]
    if not measured:
        return Answer("turn", question, "Not measured", "", why_nothing(task), "", (math.nan,) * 4)
    hard, *others = sorted(measured, key=lambda d: steering[d]["pairs"]["shift"]["estimate"])
    shift, control = steering[hard]["pairs"]["shift"], _control_shift(steering[hard])
    way = f"{TOWARDS[hard]}, the harder way" if others else TOWARDS[hard]
    compared = "no control was run" if math.isnan(control) else f"the strongest control turns {percent(control)}"
    notes = [f"95{NBSP}% interval: {interval(shift)}"]
    for direction in others:
        beside = _control_shift(steering[direction])
        told = "" if math.isnan(beside) else f", control {percent(beside)}"
        notes.append(f"{TOWARDS[direction]} {with_interval(steering[direction]['pairs']['shift'])}{told}")
    notes.append(f"cost: {listed([worst_cost(steering[direction], direction) for direction in measured])}")
    strip = (shift["low"], shift["estimate"], shift["high"], control)
    label = "" if math.isnan(control) else "strongest control"
    verdict, number = _verdict_of_turning(steering, measured), percent(shift["estimate"])
    return Answer(
        "turn", question, verdict, number, f"of test pairs turn {way}; {compared}.", "; ".join(notes), strip, label
    )


def _control_shift(block: Tree) -> float:
    """The mean shift of the strongest control on pairs; NaN without any."""
    control = strongest_control(block)
    return block["controls"][control]["pairs"]["shift"]["estimate"] if control else math.nan


def strongest_control(block: Tree, examples: str = "pairs") -> str | None:
    """The control with the highest mean shift; None where none was run."""
    shifts = {name: block["controls"][name][examples]["shift"]["estimate"] for name in block["controls"]}
    shifts = {name: shift for name, shift in shifts.items() if not math.isnan(shift)}
    return max(shifts, key=lambda name: shifts[name]) if shifts else None


def worst_cost(block: Tree, direction: str) -> str:
    """The largest loss among what should stay; towards remembering, new questions have nothing to remember."""
    counted = tuple(NAMES) if direction == "to_generalized" else ("memory", "conflict_rest")
    losses = {key: block["collateral"][key] for key in counted if known(block["collateral"][key])}
    if not losses:
        return UNMEASURED
    key = min(losses, key=lambda name: losses[name]["estimate"])
    return f"{points(losses[key]['estimate'], sign=True)} of {SHORT_NAMES[key]}"


def _verdict_of_turning(steering: Tree, measured: list[str]) -> str:
    def turned(direction: str) -> bool:
        control = strongest_control(steering[direction])
        return control is not None and certain(steering[direction]["minus_control"][control]["pairs"]) > 0

    ways = [direction for direction in measured if turned(direction)]
    if not ways:
        return "Not that it shows"
    if all(steering[direction]["pairs"]["shift"]["estimate"] >= 0.5 for direction in ways):
        return "Yes, both ways" if len(ways) == 2 else f"Yes, {TOWARDS[ways[0]]}"
    return "In part, both ways" if len(ways) == 2 else f"In part, {TOWARDS[ways[0]]}"
