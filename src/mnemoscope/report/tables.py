"""The tables of the page."""

from __future__ import annotations

from mnemoscope.report import figures_detector, figures_steering, sentences
from mnemoscope.report.intervals import Tree
from mnemoscope.report.page import Table
from mnemoscope.report.records import AIMS, DIRECTIONS


def steering(task: Tree) -> Table:
    """The best vector and its controls: what turned, what did not, with intervals."""
    rows = []
    for direction in DIRECTIONS:
        block = task["steering"][direction]
        for aim in AIMS:
            for control in ("", *block["controls"]):
                found = block["controls"][control] if control else block
                who = figures_steering.control_name(control) if control else "vector"
                what = f"{sentences.TOWARDS[direction]}, {figures_steering.EXAMPLES[aim].lower()}: {who}"
                numbers = [sentences.with_interval(found[aim][key]) for key in ("shift", "stay", "other")]
                worst = sentences.percent(found["worst"][aim]["shift"]["estimate"]) if control else ""
                rows.append([what[0].upper() + what[1:], *numbers, worst, f"{found[aim]['shift']['n']:,}"])
    return Table("Steering, test split", ["", "turned", "unmoved", "neither", "worst draw turns", "answers"], rows)


def collateral(task: Tree) -> Table:
    """What changes that should not, under both settings."""
    rows = []
    for direction in DIRECTIONS:
        for aim, key in zip(AIMS, ("collateral", "collateral_conflict"), strict=True):
            for name, change in task["steering"][direction][key].items():
                where = f"set for {'pairs' if aim == 'pairs' else 'conflicts'}"
                what = f"{sentences.TOWARDS[direction]}, {where}: {sentences.NAMES[name]}"
                what = what[0].upper() + what[1:]
                if sentences.known(change):
                    text = sentences.points(change["estimate"], sign=True)
                    rows.append([what, text, sentences.points_interval(change), f"{change['n']:,}"])
                else:
                    rows.append([what, "not measured", "", "0"])
    return Table("Collateral: change in accuracy, test split", ["", "change", "95\u00a0% interval", "N"], rows)


def methods(task: Tree) -> Table:
    """The setting of each method, chosen on the tune split, with what it turns, its strongest control and its cost.

    Behind them what a user would try first: words, and decoding that contrasts a prompt with its question alone.
    """
    rows = [
        _method(task, method, block[direction], direction)
        for direction in DIRECTIONS
        for method, block in task["steering_by_method"].items()
        if direction in block
    ]
    for direction in DIRECTIONS:
        ways = {"asked for in words": task["prompt"].get(direction)}
        for weight, shares in task.get("context_aware", {}).get(direction, {}).items():
            ways[f"context-aware decoding at {float(weight):+g}"] = shares
        for name, shares in ways.items():
            if shares and sentences.known(shares["shift"]):
                who = f"{name}, {sentences.TOWARDS[direction]}"
                turned = [sentences.with_interval(shares["shift"]), f"{shares['shift']['n']:,}"]
                rows.append([who, "", "", "", *turned, "", "", ""])
    head = ["", "where", "neurons", "strength", "pairs turned", "N", "strongest control", "conflicts turned", "cost"]
    return Table("Settings chosen on the tune split, and what they do on the test split", head, rows)


def detection(found: Tree) -> Table:
    """Within each phrasing, how the detector ranks prompts, beside what needs no state: what a phrasing gives away."""
    scores = figures_detector.SCORES
    rows = [["all conflicts", *(_ranked(found["auroc"][score]) for score in scores), ""]]
    for family, entry in found["by_family"].items():
        counts = f"{entry['memorized']:,} / {entry['generalized']:,}"
        rows.append([family, *(_ranked(entry[score]) for score in scores), counts])
    for other, entry in found["held_out"].items():
        rows.append([f"held out: {other}", *(_ranked(entry[score]) for score in scores), ""])
    caption = "Share of (remembered, worked out) test prompts that a score ranks right, of all and within each phrasing"
    return Table(caption, ["", *scores.values(), "remembered / worked out"], rows)


def _ranked(share: Tree) -> str:
    return sentences.with_interval(share) if sentences.known(share) else "too few"


def _method(task: Tree, method: str, block: Tree, direction: str) -> list[str]:
    chosen, best = block["chosen"], task["steering"][direction]["chosen"]["method"] == method
    control = sentences.strongest_control(block)
    theirs = sentences.percent(block["controls"][control]["pairs"]["shift"]["estimate"]) if control else "none"
    alpha = f" (alpha\u00a0{chosen['alpha']:.2g})" if chosen["alpha"] == chosen["alpha"] else ""
    return [
        f"{method}, {sentences.TOWARDS[direction]}{' (chosen)' if best else ''}",
        f"{chosen['site']}, {_layers(chosen['layers'])}",
        f"{100 * chosen['top']:g}\u00a0%",
        f"{chosen['strength']:g}{alpha}{'' if chosen['within_limits'] else ', beyond the limits'}",
        sentences.with_interval(block["pairs"]["shift"]),
        f"{block['pairs']['shift']['n']:,}",
        f"{theirs} ({figures_steering.control_name(control)})" if control else theirs,
        sentences.with_interval(block["conflict"]["shift"]),
        sentences.worst_cost(block, direction),
    ]


def _layers(layers: list[int]) -> str:
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
