"""The numbers of a task that somebody who fitted a vector looks at first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mnemoscope.report.intervals import Tree
from mnemoscope.report.sentences import TOWARDS, count, percent, strongest_control, with_interval, worst_cost


def brief_of(run: Path) -> dict[str, Any]:
    """The same of a run folder."""
    return brief(json.loads((run / "results.json").read_text()))


def brief(results: Tree) -> dict[str, Any]:
    """By task, from ``results.json``: pairs, what the best vectors turn, their strongest control, what they cost."""
    return {name: _brief(task) for name, task in results.get("tasks", {}).items()}


def _brief(task: Tree) -> Tree:
    found: Tree = {"weights": task["weights"]} if "weights" in task else {}
    found |= {"differ": task["contrast"]["significant"], "read": task["probe"]["best"]["accuracy"]}
    found |= {"pairs": task["pairs"]["by_split"]["all"]["pairs"], "test_pairs": task["pairs"]["pairs"]}
    for direction, block in task["steering"].items():
        control = strongest_control(block)
        found[direction] = {
            "chosen": block["chosen"],
            "pairs": block["pairs"]["shift"],
            "other": block["pairs"]["other"],
            "strongest_control": control,
            "control": block["controls"][control]["pairs"]["shift"] if control else None,
            "collateral": block["collateral"],
        }
    if "detection" in task:
        found["detect_auroc"] = task["detection"]["auroc"]["p_memorized"]
    return found


def compare_briefs(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Two runs side by side: a row for each number that either has, with ``first`` and ``second`` in words."""
    rows = []
    for task in {**first, **second}:
        ours, theirs = (_in_rows(found[task]) if task in found else {} for found in (first, second))
        for what in {**ours, **theirs}:
            rows.append({"task": task, "what": what, "first": ours.get(what, "-"), "second": theirs.get(what, "-")})
    return rows


def _in_rows(task: Tree) -> dict[str, str]:
    rows = {"pairs": f"{task['pairs']:,.0f}", "test pairs": f"{task['test_pairs']:,.0f}"}
    rows |= {"neurons that differ": with_interval(task["differ"])}
    rows |= {"behaviours told apart by a probe": with_interval(task["read"])}
    for direction, name in TOWARDS.items():
        block = task[direction]
        chosen = block["chosen"]
        rows[f"{name}: method"] = f"{chosen['method']}, {chosen['site']}, strength {chosen['strength']:g}"
        rows[f"{name}: test pairs turned"] = with_interval(block["pairs"])
        rows[f"{name}: strongest control"] = with_interval(block["control"]) if block["control"] else "none"
        rows[f"{name}: cost"] = worst_cost(block, direction)
    if "detect_auroc" in task:
        rows["P(memorized) ranks right"] = with_interval(task["detect_auroc"])
    return rows


def in_words(run: Path) -> list[str]:
    """The same in sentences."""
    lines = []
    for name, task in json.loads((run / "results.json").read_text())["tasks"].items():
        weights = f" ({task['weights']})" if "weights" in task else ""
        lines.append(f"{name}{weights}: {count(task['pairs']['by_split']['all']['pairs'], 'pair')}")
        for direction, block in task["steering"].items():
            chosen, control = block["chosen"], strongest_control(block)
            layers = ", ".join(map(str, chosen["layers"]))
            theirs = percent(block["controls"][control]["pairs"]["shift"]["estimate"]) if control else "none"
            lines.append(
                f"  {TOWARDS[direction]}: {chosen['method']} at {chosen['site']} {layers}, strength "
                f"{chosen['strength']:g}, turns {with_interval(block['pairs']['shift'])} of the test pairs; strongest "
                f"control {theirs}; cost {worst_cost(block, direction)}"
                f"{'' if chosen['within_limits'] else '; beyond the limits'}"
            )
        alike = max(block["chosen"].get("begin_alike", 0.0) for block in task["steering"].values())
        if alike:
            lines.append(
                f"  {percent(alike)} of the prompts have two answers that begin alike: what is said of these holds "
                "where that beginning stands at the end of the prompt"
            )
        if "detection" in task:
            lines.append(f"  P(memorized) ranks {with_interval(task['detection']['auroc']['p_memorized'])} right")
    return lines
