"""Print the page of claims, the paper's beside what runs give: ``python docs/claims.py RUN... [--write FILE]``.

What is published is kept in ``docs/results/claims.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from printing import Sections, put, table

from mnemoscope.config import load_study
from mnemoscope.report.rows import Part, parts_of
from mnemoscope.report.stories.read import INPUTS
from mnemoscope.report.words import CONTROLS, REFITTED, RIVALS, Direction
from mnemoscope.statistics import Estimate, overlap, overlap_by_chance
from mnemoscope.statistics.contrast import Contrast

Verdict = bool | None  # whether a claim holds; None: it cannot be told
Said = tuple[str, Verdict]
TOP = 0.1  # of the neurons, as in the second version
VERDICTS = {True: "holds", False: "does not", None: "cannot be told"}
SMALL, PRETRAINED = "small models", "pretrained models"


class Claim(NamedTuple):
    """What the paper gives, how results answer it, and what else decides.

    ``each``: by every seed's own figures however many there are, as those over seeds have no interval. ``shown``: a
    cell that could not go on because this did not come about counts as one where it does not hold.
    """

    given: str
    answer: Callable[[Part], Said]
    each: bool = False
    shown: bool = False


def claims() -> dict[str, Claim]:
    """All claims that have a rule, in the paper's order."""
    steered = "here: 0.8, and surely more than every control that was drawn"
    return {
        "One model shows both behaviours": Claim("yes; here: each at least 0.2 of the conflicts", both, shown=True),
        "Some phrasings of one item flip the behaviour": Claim(
            "0.11 and 0.085 of them; here: any in every seed", flips, shown=True
        ),
        "The difference grows with depth": Claim(
            "yes; here: mean absolute NMD, last third of the layers over first",
            partial(grows, "mean_abs_nmd"),
            each=True,
        ),
        "It grows in units of the states' norm, too": Claim(
            "not told; here: the same over the mean norm of a layer's states", partial(grows, "in_norms"), each=True
        ),
        "Single neurons differ significantly": Claim(
            "no test; here: share significant, family-wise, and the largest absolute rho", neurons, each=True
        ),
        "A probe predicts the behaviour": Claim("yes; here: better than the input, read either way", predicts),
        "Deeper layers predict better": Claim("yes; here: last layer over first", deeper),
        "More data predict better": Claim(
            "yes; here: with all fit pairs surely better than in each draw of the fewest, and than chance",
            data,
            each=True,
        ),
        "NMD steers to generalized": Claim(
            "0.837; here: 0.8, whatever its controls do", partial(paper, "to_generalized")
        ),
        "NMD steers to memorized": Claim("0.899; here: 0.8, whatever its controls do", partial(paper, "to_memorized")),
        "The best method steers to generalized": Claim(steered, partial(steers, "to_generalized")),
        "The best method steers to memorized": Claim(steered, partial(steers, "to_memorized")),
        "Random shifts do next to nothing": Claim(
            "yes; here: beside the best method, whose setting is chosen with them, each at most 0.2", controls
        ),
    }


def both(cell: Part) -> Said:
    shares = [cell.behaviour.conflict[name] for name in ("memorized", "generalized")]
    told = f"{value(shares[0])} / {value(shares[1])}, recall {value(cell.behaviour.recall)}"
    return f"{told}, novel {value(cell.behaviour.novel_accuracy)}", everything(reaches(share, 0.2) for share in shares)


def flips(cell: Part) -> Said:
    each = cell.per_seed.values() if "per_seed" in cell else [cell]
    return f"{value(cell.pairs['yield'])} of {cell.pairs.candidates:,}", all(one.pairs.pairs > 0 for one in each)


def grows(measure: str, cell: Part) -> Said:
    found = np.array(cell.contrast[measure])
    if not len(found):
        return "-", None  # records of before
    third = max(1, len(found) // 3)
    ratio = found[-third:].mean() / found[:third].mean()
    return (f"{ratio:.1f} times", bool(ratio > 1)) if np.isfinite(ratio) else ("-", None)


def neurons(cell: Part) -> Said:
    found, rho_L = cell.contrast.significant, np.array(cell.contrast.max_abs_rho)
    largest = f", largest rho {np.nanmax(rho_L):.2f}" if np.isfinite(rho_L).any() else ""
    return value(found) + largest, found.estimate > 0 if found.known else None


def predicts(cell: Part) -> Said:
    best = cell.probe.best
    told = ", ".join(f"from {RIVALS[rival]} {value(cell.probe[rival])}" for rival in INPUTS)
    signs = [best[f"minus_{rival}"].sign for rival in INPUTS]
    return f"{value(best.accuracy)}, {told}", everything({1: True, -1: False}.get(sign) for sign in signs)


def deeper(cell: Part) -> Said:
    if not cell.probe.best.accuracy.known:
        return "-", None
    first, last = cell.probe.accuracy[0], cell.probe.accuracy[-1]
    return f"{last.estimate:.2f} over {first.estimate:.2f}", told_apart(last, first)


def data(cell: Part) -> Said:
    """Beyond each draw of the fewest by more than the probe's own uncertainty, which their ranges do not have."""
    pairs, accuracy = cell.learning.pairs, cell.learning.accuracy
    if "all" not in accuracy:
        return "-", None
    fewest = min(pairs, key=lambda key: pairs[key])
    least, most = accuracy[fewest], accuracy["all"]
    told = f"{most.estimate:.2f} of {pairs['all']:.0f} over {least.estimate:.2f} of {pairs[fewest]:.0f}"
    best = cell.probe.best.accuracy
    drawn = pairs["all"] >= 2 * pairs[fewest] and most.known and best.known and not np.isnan(least.high)
    if not drawn:
        return told, None
    unsure = best.estimate - best.low
    more = most.estimate - unsure > max(least.high, 0.5)
    return told, True if more else False if most.estimate + unsure < least.low else None


def paper(direction: Direction, cell: Part) -> Said:
    """The paper's way: NMD at the setting that steers most on tune; else at the setting chosen with its controls.

    The latter leaves out what its controls or what it breaks forbid, so that to fall short there tells nothing.
    """
    found = cell.unpenalized.get(direction)
    if found is not None and found.shift.known:
        return f"{value(found.shift)}, control {found.control.estimate:.2f}", reaches(found.shift, 0.8)
    chosen = cell.steering_by_method.get("nmd", {}).get(direction)
    if chosen is None or not chosen.pairs.shift.known:
        return "not tried", None
    return f"{value(chosen.pairs.shift)}, chosen by its controls too", reaches(chosen.pairs.shift, 0.8) or None


def steers(direction: Direction, cell: Part) -> Said:
    """The best method by the tune split, on test pairs; a control counts in the seeds that drew it."""
    shift = cell.steering[direction].pairs.shift
    if not shift.known:
        return "not tried", None
    blocks = [one.steering[direction] for one in (cell.per_seed.values() if "per_seed" in cell else [cell])]
    drawn = [(block, name) for block in blocks for name, one in block.controls.items() if one.pairs.shift.known]
    told = f"{value(shift)} ({', '.join(dict.fromkeys(block.chosen.method for block in blocks))})"
    if not drawn:
        return f"{told}, no control", None
    more = all(block.controls[name].exceeded["pairs"] for block, name in drawn)
    less = any(block.minus_control[name]["pairs"].sign < 0 for block, name in drawn)
    return told, everything([reaches(shift, 0.8), True if more else False if less else None])


def controls(cell: Part) -> Said:
    """The random ones decide; those that are fitted again, on labels that say nothing, are shown."""
    found: dict[str, Estimate] = {}
    for block in cell.steering.values():
        for name, control in block.controls.items():
            shift = control.pairs.shift
            if shift.known and (name not in found or shift.estimate > found[name].estimate):
                found[name] = shift
    strongest = []
    for names in (found.keys() - set(REFITTED), found.keys() & set(REFITTED)):
        strongest += [max(sorted(names), key=lambda name: found[name].estimate)] if names else []
    told = "; ".join(f"{value(found[name])}, {CONTROLS[name]}" for name in strongest)
    random = [shift for name, shift in found.items() if name not in REFITTED]
    return told or "none drawn", everything(below(shift, 0.2) for shift in random) if random else None


def reaches(found: Estimate, bar: float) -> Verdict:
    """Whether an interval lies at a bar or above it; None where it lies on both sides."""
    return True if found.low >= bar else False if found.high < bar else None


def below(found: Estimate, bar: float) -> Verdict:
    """Whether an interval lies at a bar or below it."""
    return True if found.high <= bar else False if found.low > bar else None


def told_apart(more: Estimate, less: Estimate) -> Verdict:
    """Whether one interval lies above the other; None where they overlap."""
    return True if more.low > less.high else False if more.high < less.low else None


def everything(verdicts: Iterable[Verdict]) -> Verdict:
    """Holds where all do, does not where one does not."""
    found = set(verdicts)
    return False if False in found else None if None in found else True


def decided(claim: Claim, task: Part) -> Said:
    """A claim's figures and verdict: over seeds from three on, else what each seed says, where they say the same."""
    told, verdict = claim.answer(task)
    if claim.each or len(task.per_seed) < 3:
        said = [claim.answer(seed) for seed in task.per_seed.values()]
        each = {verdict for _, verdict in said}
        verdict = each.pop() if len(each) == 1 else None
        told = "; ".join(figure for figure, _ in said) if len(said) == 2 else told  # two seeds have no interval
    return told, verdict


def value(found: Estimate) -> str:
    """A share with its interval, cut to what a share can be."""
    if not found.known:
        return "-"
    low, high = max(0.0, found.low), min(1.0, found.high)
    return f"{found.estimate:.2f}" + ("" if np.isnan(found.low) else f" ({low:.2f} to {high:.2f})")


def layers_of(task: Part) -> tuple[object, ...]:
    """The layers whose neurons tell most, and the last one."""
    rho_L, nmd_L = np.array(task.contrast.max_abs_rho), np.array(task.contrast.mean_abs_nmd)
    if not np.isfinite(rho_L).any():
        return "-", "-", len(rho_L) - 1
    place = int(np.nanargmax(rho_L))
    return int(np.nanargmax(nmd_L)), f"{place} ({rho_L[place]:.2f})", len(rho_L) - 1


def seeds_alike(results: Part) -> Iterator[tuple[str, str]]:
    """The share of the strongest neurons that two seeds of one task have in common, and what chance gives."""
    for label, rows in results.seeds.items():
        for row in rows:
            if row.what == "overlap_in_layers" and row.top == TOP:
                ends = "" if np.isnan(row.value.low) else f" ({row.value.low:.2f} to {row.value.high:.2f})"
                told = f"{row.value.estimate:.2f}{ends}, chance {row.chance.estimate:.2f}"
                yield f"{label}, {row.site}, seeds two by two: {row.twos}", told


def contrasts(run: Path, labels: Iterable[str]) -> dict[tuple[str, int], Contrast]:
    """Contrasts of labels by label and seed."""
    found = {}
    for path in sorted((run / "cells").glob("*/contrast.safetensors")):
        facts = json.loads((path.parent / "cell.json").read_text())
        if facts["label"] in labels:
            found[facts["label"], facts["seed"]] = Contrast.load(path)
    return found


def tasks_alike(run: Path, results: Part) -> Iterator[tuple[str, str]]:
    """The same of two tasks with one model, or with adapters that begin with one seed's weights; means over seeds."""
    cells, found = load_study(str(run / "study.yaml")).cells, contrasts(run, results.tasks)
    model = {label: cells[label].model.cell or cells[label].model.folder or label for label in results.tasks}
    for label, other in combinations(results.tasks, 2):
        seeds = [seed for seed in results.tasks[label].seeds if {(label, seed), (other, seed)} <= found.keys()]
        if model[label] != model[other] or not seeds:
            continue
        tops = [[found[name, seed].top_neurons(TOP) for name in (label, other)] for seed in seeds]
        shared, chance = ([measure(*each) for each in tops] for measure in (overlap, overlap_by_chance))
        by_chance = np.mean([one.estimate for one in chance])
        told = f"{np.mean(shared):.2f}, chance in layers {by_chance:.2f}"
        yield f"{label} and {other}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}", told


def kind_of(run: Path, label: str) -> str:
    """Whether a cell's model was trained from scratch, by the study of the run."""
    model = load_study(str(run / "study.yaml")).cells[label].model
    return kind_of(run, model.cell) if model.cell else PRETRAINED if model.folder else SMALL


def claimed(run: Path, results: Part) -> dict[str, Part]:
    """Tasks of which something is claimed: models that share first weights are there to compare their neurons."""
    cells = load_study(str(run / "study.yaml")).cells
    return {label: task for label, task in results.tasks.items() if cells[label].model.initialization is None}


def not_shown(results: Part) -> set[str]:
    """Labels with a seed that never showed both behaviours, or no pair."""
    whys = ("does not show both behaviours", "no pairs found")
    return {name.rpartition("-")[0] for name, why in results.failed.items() if any(words in why for words in whys)}


def sections(runs: Sequence[Path]) -> Sections:
    """The tables: all claims in short, each of them by task, and how alike seeds and tasks are."""
    if len({run.name for run in runs}) < len(runs):
        raise SystemExit("RUN: two folders have one name; name them apart")
    tasks, kinds, failed = dict[str, Part](), dict[str, str](), list[tuple[str, str]]()
    same, lacking = list[tuple[str, str]](), set[str]()
    for run in runs:
        results = parts_of(json.loads((run / "results.json").read_text()))
        of_run = claimed(run, results)
        tasks |= {f"{label} ({run.name})": task for label, task in of_run.items()}
        kinds |= {f"{label} ({run.name})": kind_of(run, label) for label in {*of_run, *not_shown(results)}}
        lacking |= {f"{label} ({run.name})" for label in not_shown(results)}
        failed += [(f"{name} ({run.name})", why) for name, why in results.failed.items()]
        alike = [*seeds_alike(results), *tasks_alike(run, results)]
        same += [(f"{what} ({run.name})", shared) for what, shared in alike]
    answers = {name: {label: decided(claim, task) for label, task in tasks.items()} for name, claim in claims().items()}
    for name, claim in claims().items():
        if claim.shown:
            untold = {label: "no figure" for label in lacking} | {
                label: said[0] for label, said in answers[name].items()
            }
            answers[name] |= {label: (f"{untold[label]}; not in every seed", False) for label in lacking}

    def row(name: str, claim: Claim) -> Iterator[str]:
        yield from (name, claim.given)
        for kind in (SMALL, PRETRAINED):
            yield counted([said[1] for label, said in answers[name].items() if kinds[label] == kind])

    by_claim = {
        name: [
            table(
                ("task", "seeds", "figure", ""),
                [
                    (label, len(tasks[label].seeds) if label in tasks else 0, figure, VERDICTS[holds])
                    for label, (figure, holds) in said.items()
                ],
            )
        ]
        for name, said in answers.items()
    }
    places = ("task", "layer of the largest mean NMD", "of the largest rho", "last layer")
    return {
        "In short": [table(("claim", "the paper", SMALL, PRETRAINED), [row(*item) for item in claims().items()])],
        "Cells that could not go on": [table(("cell", "why"), failed or [("none", "")])],
        **by_claim,
        "Where neurons tell most": [
            "By the paper in addition in the last layer, in inference in another.",
            table(places, [(label, *layers_of(task)) for label, task in tasks.items()]),
        ],
        f"The strongest {TOP:.0%} of neurons in common": [
            "Means over what is compared, with their range.",
            table(("what is compared", "shared"), same),
        ],
    }


def counted(verdicts: Sequence[Verdict]) -> str:
    """In how many tasks a claim holds."""
    if not verdicts:
        return "-"
    unknown = f", {verdicts.count(None)} cannot be told" if None in verdicts else ""
    return f"holds in {verdicts.count(True)} of {len(verdicts)}{unknown}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, help="file for the tables, docs/results/claims.json")
    asked = parser.parse_args()
    put("claims", sections(asked.runs), asked.write)
