"""Print each claim of the paper beside what runs give, as Markdown: ``python docs/claims.py runs/paper runs/lora``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np

from mnemoscope.contrast import Contrast
from mnemoscope.report.schema import Direction, Estimate, Results, TaskResults
from mnemoscope.statistics import overlap, overlap_by_chance

Said = tuple[str, bool | None]  # a figure in words, and whether the claim holds; None: it cannot be told
TOP = 0.1  # of the neurons, as in the second version


def claims() -> dict[str, Callable[[TaskResults], Said]]:
    """Each claim with how a task answers it."""
    return {
        "one model shows both behaviours (each at least a fifth of conflicts)": both,
        "some phrasings of one item flip (0.11 and 0.085)": flips,
        "the difference grows with depth (mean NMD, last third over first)": grows,
        "where one neuron tells most (the paper: addition in the last layer, inference not)": largest,
        "single neurons tell the behaviours apart (share significant, family-wise)": neurons,
        "a probe predicts the behaviour, better than the input alone": predicts,
        "deeper layers predict better (last over first)": deeper,
        "more data predict better (all fit pairs over the fewest)": data,
        "NMD steers to generalized (0.837), whatever its controls do": lambda task: paper(task, "to_generalized"),
        "NMD steers to memorized (0.899), whatever its controls do": lambda task: paper(task, "to_memorized"),
        "the best method steers 0.8 to generalized, more than any control": lambda task: steers(task, "to_generalized"),
        "the best method steers 0.8 to memorized, more than any control": lambda task: steers(task, "to_memorized"),
        "random shifts do next to nothing (strongest control, both directions)": controls,
    }


def both(task: TaskResults) -> Said:
    shares = task.behaviour.conflict
    least = min(shares["memorized"].estimate, shares["generalized"].estimate)
    told = f"{value(shares['memorized'])} / {value(shares['generalized'])}, recall {value(task.behaviour.recall)}"
    return f"{told}, novel {value(task.behaviour.novel_accuracy)}", least >= 0.2


def flips(task: TaskResults) -> Said:
    return f"{value(task.pairs.yield_)} of {task.pairs.candidates:,}", task.pairs.pairs > 0


def grows(task: TaskResults) -> Said:
    found = np.array(task.contrast.mean_abs_nmd)
    third = max(1, len(found) // 3)
    ratio = found[-third:].mean() / found[:third].mean()
    return f"{ratio:.1f} times", bool(ratio > 1)


def largest(task: TaskResults) -> Said:
    found = task.contrast.max_abs_rho
    place = int(np.argmax(found))
    return f"layer {place} of {len(found)}, rho {found[place]:.2f}", None


def neurons(task: TaskResults) -> Said:
    found = task.contrast.significant
    return value(found), found.estimate > 0


def predicts(task: TaskResults) -> Said:
    best = task.probe.best
    told = f"{value(best.accuracy)}, input {value(task.probe.input_only)}"
    return told, {1: True, -1: False}.get(best.minus_input_only.sign)


def deeper(task: TaskResults) -> Said:
    first, last = task.probe.accuracy[0], task.probe.accuracy[-1]
    return f"{last.estimate:.2f} over {first.estimate:.2f}", told_apart(last, first)


def data(task: TaskResults) -> Said:
    least, most = next(iter(task.learning.accuracy.values())), task.learning.accuracy["all"]
    return f"{most.estimate:.2f} over {least.estimate:.2f}", bool(most.estimate > least.high)


def paper(task: TaskResults, direction: Direction) -> Said:
    """The paper's way: NMD at the setting that steers most on tune."""
    found = task.unpenalized.get(direction)
    if found is None or not found.shift.known:
        return "not tried", None
    return f"{value(found.shift)}, control {found.control.estimate:.2f}", found.shift.estimate >= 0.8


def steers(task: TaskResults, direction: Direction) -> Said:
    """The best method by the tune split, on test pairs."""
    found = task.steering[direction]
    drawn = [control for control in found.controls.values() if control.pairs.shift.known]
    told = f"{value(found.pairs.shift)} ({found.chosen.method})"
    more = all(control.exceeded["pairs"] for control in drawn)
    return told + ("" if drawn else ", no control"), found.pairs.shift.estimate >= 0.8 and more and bool(drawn)


def controls(task: TaskResults) -> Said:
    found = {}
    for block in task.steering.values():
        for name, control in block.controls.items():
            if control.pairs.shift.known:
                found[name] = max(found.get(name, 0.0), control.pairs.shift.estimate)
    if not found:
        return "none drawn", None
    name = max(found, key=lambda one: found[one])
    return f"{found[name]:.2f} ({name.replace('_', ' ')})", found[name] <= 0.2


def told_apart(more: Estimate, less: Estimate) -> bool | None:
    """Whether one interval lies above the other; None where they overlap."""
    return True if more.low > less.high else False if more.high < less.low else None


def value(found: Estimate) -> str:
    """An estimate with its interval."""
    if not found.known:
        return "-"
    return f"{found.estimate:.2f}" + ("" if np.isnan(found.low) else f" ({found.low:.2f} to {found.high:.2f})")


def alike(run: Path) -> Iterator[tuple[str, str]]:
    """Two cells of one model each time: the share of the strongest neurons that they have in common, and chance."""
    found = {}
    for path in sorted((run / "cells").glob("*/contrast.safetensors")):
        facts = json.loads((path.parent / "cell.json").read_text())
        found[path.parent.name] = facts["label"], Contrast.load(path)
    for (first, (label, a)), (second, (other, b)) in combinations(found.items(), 2):
        if a.rho_LD.shape != b.rho_LD.shape:
            continue
        chance = overlap_by_chance(a.top_neurons(TOP), b.top_neurons(TOP))
        shared = overlap(a.top_neurons(TOP), b.top_neurons(TOP))
        kind = "seeds" if label == other else "tasks"
        yield f"{first}, {second} ({kind})", f"{shared:.2f}, chance in layers {chance.estimate:.2f}"


def main(runs: list[Path]) -> None:
    """Print the table."""
    tasks = {}
    for run in runs:
        results = Results.model_validate(json.loads((run / "results.json").read_text()))
        tasks |= {f"{label} ({run.name})": task for label, task in results.tasks.items()}
    print("| claim | " + " | ".join(tasks) + " |")
    print("|---" * (len(tasks) + 1) + "|")
    for claim, answer in claims().items():
        cells = []
        for task in tasks.values():
            told, holds = answer(task)
            cells.append(told + {True: ": holds", False: ": does not", None: ""}[holds])
        print(f"| {claim} | " + " | ".join(cells) + " |")
    print(f"\n| two cells, the strongest {TOP:.0%} of neurons | in common |\n|---|---|")
    for run in runs:
        for two, told in alike(run):
            print(f"| {two} | {told} |")


if __name__ == "__main__":
    main([Path(run) for run in sys.argv[1:]])
