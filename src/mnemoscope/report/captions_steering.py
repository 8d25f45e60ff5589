"""What the figures of turning show, in words computed from the numbers; see ``sentences`` for the words."""

from __future__ import annotations

import math
from itertools import pairwise

from mnemoscope.report.figures_effects import PAPERS, best_site, dose_lines, mapped_method
from mnemoscope.report.figures_methods import patch_bound
from mnemoscope.report.intervals import Tree
from mnemoscope.report.records import DIRECTIONS
from mnemoscope.report.sentences import (
    CONTROL_NAMES,
    NAMES,
    TOWARDS,
    UNMEASURED,
    R,
    argmax,
    certain,
    known,
    listed,
    percent,
    points,
    points_interval,
    strongest_control,
    why_nothing,
    with_interval,
)


def _towards(direction: str) -> str:
    return TOWARDS[direction].capitalize()


def turning(task: Tree, direction: str) -> str:
    block = task["steering"][direction]
    shift = block["pairs"]["shift"]
    if not known(shift):
        text = f"Turning pairs {TOWARDS[direction]} {UNMEASURED}. {why_nothing(task)}"
        return f"{text} {_elsewhere(block, direction)}" if known(block["conflict"]["shift"]) else text
    text = f"{_towards(direction)}, the vector turns {with_interval(shift)} of test pairs{_beside(block)}"
    made_up = block["confabulated"]
    if known(made_up) and made_up["estimate"] > 0:
        text += f"; {percent(made_up['estimate'])} get an answer that only looks remembered"
    text = f"{text}. {_elsewhere(block, direction)}"
    lost = block["pairs_unreachable"]["shift"]
    if known(lost):
        text += f" Phrasings that do not keep the stored key, told apart: {with_interval(lost)}."
    return text


def _beside(block: Tree) -> str:
    """The strongest control: its mean, its worst draw, and the paired difference."""
    control = strongest_control(block)
    if control is None:
        return "; no control was run"
    difference = block["minus_control"][control]["pairs"]
    theirs, worst = (block["controls"][control], block["controls"][control]["worst"])
    shifts = [percent(found["pairs"]["shift"]["estimate"]) for found in (theirs, worst)]
    side = "more" if difference["estimate"] >= 0 else "fewer"
    amount = f"{points(abs(difference['estimate']))} ({points_interval(difference)})"
    name = CONTROL_NAMES.get(control, control.replace("_", " "))
    return f", {amount} {side} than the strongest control, {name} ({shifts[0]}; worst draw {shifts[1]})"


def _elsewhere(block: Tree, direction: str) -> str:
    shift = block["conflict"]["shift"]
    source = {"memorized": "answered from memory", "generalized": "worked out"}[DIRECTIONS[direction][1]]
    if not known(shift):
        return f"On conflicts as they are drawn it {UNMEASURED}: none was {source} without it."
    control = strongest_control(block, "conflict")
    theirs = block["controls"][control]["conflict"]["shift"]["estimate"] if control else math.nan
    compared = "" if math.isnan(theirs) else f", the strongest control {percent(theirs)}"
    at = block["chosen_conflict"]["strength"] / block["chosen"]["strength"]
    strength = f", at {at:.2g} times that norm" if not math.isclose(at, 1) else ""
    return f"Of all test conflicts that were {source}, it turns {with_interval(shift)}{strength}{compared}."


def methods(task: Tree, direction: str) -> str:
    """The chosen way of turning beside the paper's own; empty where only one was tried or nothing could be measured."""
    chosen = task["steering"][direction]["chosen"]["method"]
    found = {name: block[direction] for name, block in task["steering_by_method"].items() if direction in block}
    shift = found[chosen]["pairs"]["shift"] if chosen in found else None
    if shift is None or not known(shift):
        return ""
    text = f"{_towards(direction)}, {_picked(task, direction)} and turns {percent(shift['estimate'])} of test pairs"
    paper = found.get(PAPERS)
    if chosen != PAPERS and paper and known(paper["pairs"]["shift"]):
        text += f"; the paper's own shift, {PAPERS}, turns {percent(paper['pairs']['shift']['estimate'])}"
    clear = [name for name, block in found.items() if _exceeds_all(block)]
    return f"{text}. {_how_many(len(clear), len(found))} for certain more than every control."


def _picked(task: Tree, direction: str) -> str:
    """Which method was chosen; where seeds chose differently, by how many."""
    chosen = task["steering"][direction]["chosen"]["method"]
    by_seed = [best["pairs"][direction] for best in task.get("chosen_by_seed", {}).values()]
    if len(set(by_seed)) < 2:
        return f"{chosen} was chosen on the tune split"
    return f"{chosen} was chosen on the tune split by {by_seed.count(chosen)} of {len(by_seed)} seeds"


def _exceeds_all(block: Tree) -> bool:
    differences = [found["pairs"] for found in block["minus_control"].values() if known(found["pairs"])]
    return bool(differences) and all(certain(difference) > 0 for difference in differences)


def _how_many(some: int, of: int) -> str:
    if of == 1:
        return "It turns" if some else "It does not turn"
    return f"{some if some else 'None'} of {of} methods turn{'s' if some == 1 else ''}"


def simpler(task: Tree, direction: str) -> str:
    """The vector beside a bias on the answers, beside words, and below what a whole state does."""
    found = task["logit"][direction]
    if not known(found["shift"]):
        return ""
    difference = found["vector_minus_logit"]
    side = "more" if difference["estimate"] >= 0 else "fewer"
    sure = "" if certain(difference) else ", no sure difference"
    text = (
        f"{_towards(direction)}, pushing every pair's margin by the same {abs(found['push']['estimate']):.1f} nats "
        f"turns {percent(found['shift']['estimate'])}; the vector, whose mean push that is, turns "
        f"{points(abs(difference['estimate']))} {side} ({points_interval(difference)}{sure})."
    )
    if direction in task["prompt"]:
        text += f" Asked for in words: {with_interval(task['prompt'][direction]['shift'])}."
    for weight, shares in task.get("context_aware", {}).get(direction, {}).items():
        text += f" Context-aware decoding at {float(weight):+g}: {with_interval(shares['shift'])}."
    bound = patch_bound(task, direction)
    if bound:
        text += f" The other phrasing's whole state, put in at layer {bound[1]}: {with_interval(bound[2])}."
    return text


def elsewhere(task: Tree, direction: str) -> str:
    """What the same vector turns where nothing was fitted: the behaviour, or only one way of asking?"""
    block = task["steering"][direction]
    found = {name: shares["shift"] for name, shares in block.get("held_out", {}).items() if known(shares["shift"])}
    if not found:
        return ""
    parts = [f"with another {name} {with_interval(shift)} of {shift['n']:,}" for name, shift in found.items()]
    return (
        f"{_towards(direction)}, the vector turns {percent(block['pairs']['shift']['estimate'])}, {', '.join(parts)}."
    )


def dose(task: Tree, direction: str) -> str:
    best = task["steering"][direction]["chosen"]["method"]
    by_dose = dose_lines(task, direction).get(best, {})
    found = [(float(d), v["margin"]["estimate"], v["shift"]["estimate"]) for d, v in by_dose.items()]
    found = sorted(entry for entry in found if not math.isnan(entry[1]))
    if len(found) < 2:
        return f"{_towards(direction)}, the dose-response {UNMEASURED}."
    sign = 1 if direction == "to_generalized" else -1
    steady = all(sign * (b[1] - a[1]) > 0 for a, b in pairwise(found))
    way = ("rises" if sign > 0 else "falls") + " with every step" if steady else "does not move steadily"
    shares = [f"{turned:.0%} at {d:g}".replace("%", "\u00a0%") for d, _, turned in found if d in (0.5, 1.0, 2.0)]
    text = f"{_towards(direction)}, the mean margin {way}, from {found[0][1]:.1f} to {found[-1][1]:.1f} nats"
    return f"{text}; turned: {listed(shares)} times the chosen shift." if shares else f"{text}."


def depth(task: Tree, direction: str) -> str:
    """Whether a shift acts where the difference shows."""
    found, shows = task["by_layer"]["shift"][direction], argmax(task["by_layer"]["max_abs_rho"])
    acts = {
        method: (argmax([s["estimate"] for s in shifts]), shifts)
        for method, sites in found["methods"].items()
        for shifts in [sites[best_site(sites)]]
    }
    acts = {method: entry for method, entry in acts.items() if entry[0] is not None}
    if not acts or shows is None:
        return f"{_towards(direction)}, no single layer was tried."
    method, (layer, shifts) = max(acts.items(), key=lambda item: item[1][1][item[1][0]]["estimate"])
    assert layer is not None
    where = "the layer where |rho| is largest" if layer == shows else f"while |rho| is largest in layer {shows}"
    return (
        f"{_towards(direction)}, one layer alone turns most in layer {layer}, {where}: "
        f"{percent(shifts[layer]['estimate'])} of tune pairs, by {method} at strength {found['strength']:g}."
    )


def ablation(task: Tree, direction: str) -> str:
    method = task["steering"][direction]["chosen"]["method"]
    shares = task["ablation"].get(method, {}).get(direction, {})
    known_ = [top for top in sorted(shares, key=float) if known(shares[top]["minus_random"])]
    if not known_:
        return f"{_towards(direction)}, whether its neurons are needed {UNMEASURED}."
    top = known_[-1]
    lost, beyond, before = shares[top]["vector"]["lost"], shares[top]["minus_random"], shares[top]["vector"]["before"]
    needed = {1: "more than", -1: "less than", 0: "not surely more than"}[certain(beyond)]
    return (
        f"{_towards(direction)}, holding the {100 * float(top):g}\u00a0% of neurons that {method} ranks highest at "
        f"their mean {_taken(lost['estimate'])} the {before['estimate']:.1f} nats between the two sides: {needed} "
        f"as many random ones ({beyond['estimate']:+.1f}, {beyond['low']:.1f} to {beyond['high']:.1f})."
    )


def _taken(lost: float) -> str:
    return f"takes {lost:.1f} of" if lost >= 0 else f"adds {-lost:.1f} to"


def patches(task: Tree, direction: str) -> str:
    bound = patch_bound(task, direction)
    if not bound:
        return f"{_towards(direction)}, no state was put in."
    site, layer, shift = bound
    return f"{_towards(direction)}, most turn by the state of layer {layer}'s {site}: {with_interval(shift)}."


def sweep(task: Tree, direction: str) -> str:
    method = mapped_method(task)
    rows = [r for r in task["sweep"] if (r["method"], r["direction"], r["examples"]) == (method, direction, "pairs")]
    rows = [row for row in rows if known(row["shift"])]
    if not rows:
        return f"{_towards(direction)}, no sweep was measured in full."
    best = max(rows, key=lambda row: row["shift"]["estimate"])
    chosen = task["steering_by_method"][method][direction]["chosen"]
    return (
        f"{_towards(direction)}, of {len(rows)} settings of {method}, {_setting(chosen)} was chosen; "
        f"{_setting(best)} turns most, {percent(best['shift']['estimate'])} of tune pairs."
    )


def _setting(row: Tree) -> str:
    share = "all neurons" if row["top"] >= 1 else f"{100 * row['top']:g}\u00a0% of the neurons"
    return f"strength {row['strength']:g} on {share}"


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
    families = task["steering"][direction].get("recall_by_family", {})
    parts = [
        f"{family} {percent(share['before']['estimate'])} right before, {percent(share['after']['estimate'])} after"
        for family, share in families.items()
    ]
    return f"{text} Facts to recall by how they are asked: {listed(parts)}." if parts else text


def _lose(change: R) -> str:
    return f"lose {points(-change['estimate'])} ({points_interval(change)})"
