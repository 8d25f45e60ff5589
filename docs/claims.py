"""Print docs/CLAIMS.md, the paper's claims beside what runs give: ``python docs/claims.py RUN... > docs/CLAIMS.md``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from mnemoscope.contrast import Contrast
from mnemoscope.report.schema import Direction, Estimate, Results, TaskResults
from mnemoscope.statistics import overlap, overlap_by_chance

HEAD = Path(__file__).with_name("claims.head.md").read_text()
Said = tuple[str, bool | None]  # a figure in words, and whether the claim holds; None: it cannot be told
TOP = 0.1  # of the neurons, as in the second version
VERDICTS = {True: "holds", False: "does not", None: "cannot be told"}


def claims() -> dict[str, tuple[str, Callable[[TaskResults], Said]]]:
    """Each claim: what the paper gives, and how a task answers it."""
    return {
        "One model shows both behaviours": ("yes; here: each at least 0.2 of the conflicts", both),
        "Some phrasings of one item flip the behaviour": ("0.11 and 0.085 of them", flips),
        "The difference grows with depth": ("yes; here: mean NMD, last third of the layers over first", grows),
        "Where one neuron tells most": ("addition: the last layer; inference: not the last", largest),
        "Single neurons tell the behaviours apart": ("no test; here: share significant, family-wise", neurons),
        "A probe predicts the behaviour": ("yes; here: better than the input alone", predicts),
        "Deeper layers predict better": ("yes; here: last layer over first", deeper),
        "More data predict better": ("yes; here: all fit pairs over the fewest", data),
        "NMD steers to generalized": ("0.837; here: 0.8, whatever its controls do", partial(paper, "to_generalized")),
        "NMD steers to memorized": ("0.899; here: 0.8, whatever its controls do", partial(paper, "to_memorized")),
        "The best method steers to generalized": (
            "here: 0.8, more than any control",
            partial(steers, "to_generalized"),
        ),
        "The best method steers to memorized": ("here: 0.8, more than any control", partial(steers, "to_memorized")),
        "Random shifts do next to nothing": ("yes; here: the strongest control, at most 0.2", controls),
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
    return (f"{ratio:.1f} times", bool(ratio > 1)) if np.isfinite(ratio) else ("-", None)


def largest(task: TaskResults) -> Said:
    found = task.contrast.max_abs_rho
    place = int(np.argmax(found))
    return f"layer {place} of {len(found)}, rho {found[place]:.2f}" if np.isfinite(found[place]) else "-", None


def neurons(task: TaskResults) -> Said:
    found = task.contrast.significant
    return value(found), found.estimate > 0 if found.known else None


def predicts(task: TaskResults) -> Said:
    best = task.probe.best
    told = f"{value(best.accuracy)}, input {value(task.probe.input_only)}"
    return told, {1: True, -1: False}.get(best.minus_input_only.sign)


def deeper(task: TaskResults) -> Said:
    if not task.probe.best.accuracy.known:
        return "-", None
    first, last = task.probe.accuracy[0], task.probe.accuracy[-1]
    return f"{last.estimate:.2f} over {first.estimate:.2f}", told_apart(last, first)


def data(task: TaskResults) -> Said:
    if "all" not in task.learning.accuracy:
        return "-", None
    least, most = next(iter(task.learning.accuracy.values())), task.learning.accuracy["all"]
    return f"{most.estimate:.2f} over {least.estimate:.2f}", bool(most.estimate > least.high)


def paper(direction: Direction, task: TaskResults) -> Said:
    """The paper's way: NMD at the setting that steers most on tune; else at the setting chosen with its controls."""
    found = task.unpenalized.get(direction)
    if found is not None and found.shift.known:
        return f"{value(found.shift)}, control {found.control.estimate:.2f}", found.shift.estimate >= 0.8
    chosen = task.steering_by_method.get("nmd", {}).get(direction)
    if chosen is None or not chosen.pairs.shift.known:
        return "not tried", None
    return f"{value(chosen.pairs.shift)}, chosen by its controls too", chosen.pairs.shift.estimate >= 0.8


def steers(direction: Direction, task: TaskResults) -> Said:
    """The best method by the tune split, on test pairs."""
    found = task.steering[direction]
    if not found.pairs.shift.known:
        return "not tried", None
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
    """A share with its interval, cut to what a share can be."""
    if not found.known:
        return "-"
    low, high = max(0.0, found.low), min(1.0, found.high)
    return f"{found.estimate:.2f}" + ("" if np.isnan(found.low) else f" ({low:.2f} to {high:.2f})")


def seeds_alike(results: Results) -> Iterator[tuple[str, str]]:
    """The share of the strongest neurons that two seeds of one task have in common, and what chance gives."""
    for label, rows in results.seeds.items():
        for row in rows:
            if row.what == "overlap_in_layers" and row.top == TOP:
                yield (
                    f"{label}, {row.site}, {row.twos} twos of seeds",
                    f"{value(row.value)}, chance {row.chance.estimate:.2f}",
                )


def tasks_alike(run: Path) -> Iterator[tuple[str, str]]:
    """The same of two tasks of one seed, whose models have one shape."""
    found = {}
    for path in sorted((run / "cells").glob("*/contrast.safetensors")):
        facts = json.loads((path.parent / "cell.json").read_text())
        found[facts["label"], facts["seed"]] = Contrast.load(path)
    for ((label, seed), a), ((other, other_seed), b) in combinations(found.items(), 2):
        if label == other or seed != other_seed or a.rho_LD.shape != b.rho_LD.shape:
            continue
        tops = a.top_neurons(TOP), b.top_neurons(TOP)
        chance = overlap_by_chance(*tops).estimate
        yield f"{label} and {other}, seed {seed}", f"{overlap(*tops):.2f}, chance in layers {chance:.2f}"


def main(runs: list[Path]) -> None:
    """Print the tables: all claims in short, each of them by task, and how alike seeds and tasks are."""
    tasks, same = dict[str, TaskResults](), list[tuple[str, str]]()
    for run in runs:
        results = Results.model_validate(json.loads((run / "results.json").read_text()))
        tasks |= {f"{label} ({run.name})": task for label, task in results.tasks.items()}
        same += [*seeds_alike(results), *tasks_alike(run)]
    # A packaged model's weights are named in the results; the others were trained from scratch.
    kinds = {"small models": [], "pretrained models": []}
    for label, task in tasks.items():
        kinds["pretrained models" if task.weights else "small models"].append(label)
    answers = {claim: {label: answer(task) for label, task in tasks.items()} for claim, (_, answer) in claims().items()}
    print(HEAD + "\n## In short\n")
    print("| claim | the paper | " + " | ".join(kinds) + " |\n" + "|---" * (2 + len(kinds)) + "|")
    for claim, (given, _) in claims().items():
        found = [counted([answers[claim][label][1] for label in labels]) for labels in kinds.values()]
        print(f"| {claim} | {given} | " + " | ".join(found) + " |")
    for claim, said in answers.items():
        print(f"\n## {claim}\n\n| task | seeds | figure | |\n|---|---|---|---|")
        for label, (figure, holds) in said.items():
            print(f"| {label} | {len(tasks[label].seeds)} | {figure} | {VERDICTS[holds]} |")
    print(f"\n## The strongest {TOP:.0%} of neurons in common\n\n| what is compared | shared |\n|---|---|")
    for two, told in same:
        print(f"| {two} | {told} |")


def counted(verdicts: list[bool | None]) -> str:
    """In how many tasks a claim holds."""
    known = [holds for holds in verdicts if holds is not None]
    return f"holds in {sum(known)} of {len(known)}" if known else "-"


if __name__ == "__main__":
    main([Path(run) for run in sys.argv[1:]])
