"""Print the review, what runs answer of the eleven gaps: ``python docs/review.py RUN... [--write FILE]``.

The first run is that of small models, the others are those of point 11. ``--again RUN...`` are later runs of the
same studies, ``--roundings RUN...`` trainings of one seed under settings that round otherwise; without other
runs their sections are added to what FILE has. What is published is kept in ``docs/results/review.json``; the README
has its table "In short".
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import printing
from printing import Sections, put, table

from mnemoscope.config import load_study
from mnemoscope.report.page import Table
from mnemoscope.report.records import Run, read_run
from mnemoscope.report.rows import Part, parts_of
from mnemoscope.report.stories.holds import overlaps, transfer
from mnemoscope.report.stories.read import UNCERTAINTIES
from mnemoscope.report.words import (
    CONTROLS,
    DIRECTIONS,
    LISTS,
    REFITTED,
    RIVALS,
    Aim,
    Direction,
    control_names,
    for_aim,
    listed,
)
from mnemoscope.report.words import layers as layer_names
from mnemoscope.statistics import Estimate, over_seeds

NOT = "-"
ROUNDINGS = "One seed, other roundings"
TOWARD = {direction: direction.replace("_", " ") for direction in DIRECTIONS}
SITES = ("block", "attention", "mlp", "neuron")
DOSES = ("-1", "0", "0.5", "1", "2")
Tasks = dict[str, Part]


def sections(folders: list[Path], later: list[Path], roundings: list[Path]) -> Sections:
    """The tables, by point."""
    found = [read(run) for run in folders]
    if len({results.study for results in found}) < len(found):
        raise SystemExit("RUN: two runs are of one study")
    points = answers(found, folders) if found else {}
    if roundings:
        points[ROUNDINGS] = [rounded([read(run).tasks for run in roundings])]
    for folder in later:
        results = read(folder)
        points[f"Run again, `{results.study}`"] = [*again(analysed(results, folder))]
    return {title: list(parts(tables)) for title, tables in points.items()}


def answers(found: list[Part], folders: list[Path]) -> dict[str, list[Table]]:
    """The tables of what is published, by point."""
    first, *others = found
    tasks, *others_tasks = [analysed(*each) for each in zip(found, folders, strict=True)]
    by_study = {results.study: of for results, of in zip(found, [tasks, *others_tasks], strict=True)}
    points = {
        "In short": [short(by_study)],
        "1 and 3: what the models do, and how many pairs there are": [behaviours(first), *failures(first)],
        "2: what steers, beside controls of equal norm": [
            *(steering(tasks, direction) for direction in DIRECTIONS),
            *(controls(tasks, direction) for direction in DIRECTIONS),
            *(methods(tasks, direction) for direction in DIRECTIONS),
            *(at_one_norm(tasks, direction) for direction in DIRECTIONS),
        ],
        "4: could the input alone predict it?": [probes(tasks)],
        "5: which layers, which neurons?": [differences(tasks), layers(tasks), held_at_mean(tasks)],
        "6: from seed to seed, from task to task": [alike(first), *filter(None, [transfer(first.transfer)])],
        "7: what was chosen": [chosen(tasks)],
        "8: by degrees?": [doses(tasks)],
        "9: what steering costs": [costs(tasks)],
        "10: the same input twice": [draws(read_run(folders[0]))],
    }
    for results, of in zip(others, others_tasks, strict=True):
        points[f"11: pretrained models, `{results.study}`"] = [*pretrained(results, of)]
    return points


def parts(tables: list[Table]) -> Iterator[str | printing.Table]:
    """Tables with their captions."""
    for one in tables:
        yield f"{one.caption}:"
        yield table(one.columns, [[cell.replace("\u00a0", " ") for cell in row] for row in one.rows])
    if not tables:
        yield NOT


def read(run: Path) -> Part:
    """What a run found."""
    results: Part = parts_of(json.loads((run / "results.json").read_text()))
    return results


def analysed(results: Part, folder: Path) -> Tasks:
    """Tasks of which something was steered; models that share first weights are there to compare their neurons only."""
    cells = load_study(str(folder / "study.yaml")).cells
    steered = {label: task for label, task in results.tasks.items() if task.steering}
    return {label: task for label, task in steered.items() if cells[label].model.initialization is None}


def behaviours(results: Part) -> Table:
    """What a model answers before anything is done to it, and how many pairs flip."""
    columns = ["task", "seeds", "memorized / generalized / other", "confabulated", "novel, recall"]
    rows = []
    for label, task in results.tasks.items():
        said, pairs = task.behaviour, task.pairs
        shares = " / ".join(three(said.conflict[name]) for name in ("memorized", "generalized", "other"))
        row = [label, ", ".join(map(str, task.seeds)), shares, three(said.conflict["confabulated"])]
        yielded = f"{pairs.pairs:,}, {pairs.groups:,}, {three(pairs['yield'])}"
        rows.append([*row, f"{three(said.novel_accuracy)}, {three(said.recall)}", yielded])
    return Table("Test split, unsteered", [*columns, "test pairs and groups of all seeds, yield"], rows)


def failures(results: Part) -> list[Table]:
    """Cells that could not go on."""
    rows = [[label, why] for label, why in results.failed.items()]
    return [Table("Cells that could not go on", ["cell", "why"], rows)] if rows else []


def steering(tasks: Tasks, direction: Direction) -> Table:
    """The shift of the best method with each seed's, its strongest controls, and what becomes of the rest."""
    columns = ["task", "shift", "by", "strongest control", "strongest random one", "other / confabulated"]
    rows = []
    for label, task in tasks.items():
        block, seeds = task.steering[direction], of_seeds(task, direction)
        each = f"; {', '.join(three(seed.pairs.shift) for seed in seeds)}" if len(seeds) > 1 else ""
        beyond = "" if block.chosen.within_limits else " (beyond its limits on tune in some seed)"
        row = [label, f"**{ranged(block.pairs.shift)}** of {block.pairs.shift.n:,}{each}{beyond}", by(seeds)]
        row += [strongest(block), strongest_random(seeds), f"{three(block.pairs.other)} / {three(block.confabulated)}"]
        drawn = for_aim(block, "conflict")
        methods = by([for_aim(seed, "conflict") for seed in seeds])
        row.append(f"{ranged(drawn.conflict.shift)} by {methods}; {strongest(drawn, 'conflict')}")
        kept = block.pairs_unreachable
        rows.append([*row, f"{three(kept.shift)} / {three(kept.other)}" if kept.shift.known else NOT])
    columns += ["conflicts as drawn; their control", "phrasings without the key: shift / other"]
    kind = "test pairs" if direction == "to_generalized" else "test pairs that keep the stored key"
    return Table(f"Part {TOWARD[direction]}, {kind}, the best method by the tune split", columns, rows)


def of_seeds(task: Part, direction: Direction) -> list[Part]:
    """The best method of each seed."""
    return [seed.steering[direction] for seed in task.per_seed.values()]


def of_best(task: Part, direction: Direction, what: Literal["ablation", "dose"]) -> list[dict[str, Any]]:
    """What was measured of each seed's best method."""
    return [
        seed[what].get(seed.steering[direction].chosen.method, {}).get(direction, {}) for seed in task.per_seed.values()
    ]


def by(blocks: list[Part]) -> str:
    """The methods of several seeds."""
    counts = Counter(block.chosen.method for block in blocks)
    return next(iter(counts)) if len(counts) == 1 else listed([f"{name} in {n}" for name, n in counts.items()])


def strongest(block: Part, aim: Aim = "pairs") -> str:
    """Each seed's control that steers most, its draws pooled; their mean over seeds."""
    beside = block.beside.get(aim)
    return f"{three(beside.shift)}, {control_names(beside)}" if beside else NOT


def strongest_random(seeds: list[Part]) -> str:
    """The same among those that are not fitted again."""
    found = [[one.pairs.shift for name, one in seed.controls.items() if name not in REFITTED] for seed in seeds]
    most = [
        max((shift for shift in drawn if shift.known), key=lambda shift: shift.estimate, default=None)
        for drawn in found
    ]
    return three(over_seeds([shift for shift in most if shift])) if any(most) else NOT


def controls(tasks: Tasks, direction: Direction) -> Table:
    """Every control's share, the vector less the strongest, and less what its mean push on the margin would do."""
    rows = []
    for label, task in tasks.items():
        block, seeds, push = task.steering[direction], of_seeds(task, direction), task.logit.get(direction)
        row = [label]
        for name in CONTROLS:
            drawn = sum(seed.controls[name].pairs.shift.known for seed in seeds)
            few = f" ({drawn} of {len(seeds)} seeds)" if 0 < drawn < len(seeds) else ""
            row.append(three(block.controls[name].pairs.shift) + few)
        row.append(ranged(block.beside["pairs"].difference, sign=True) if "pairs" in block.beside else NOT)
        rows.append([*row, ranged(push.vector_minus_logit, sign=True) if push else NOT])
    columns = ["task", *CONTROLS.values(), "vector minus each seed's strongest"]
    columns.append("pairs whose margin flips: vector minus one push on all margins, its mean")
    return Table(f"Controls {TOWARD[direction]}, share of test pairs", columns, rows)


def methods(tasks: Tasks, direction: Direction) -> Table:
    """Every method at the setting chosen for it, and NMD as the paper chooses it."""
    names = list(dict.fromkeys(name for task in tasks.values() for name in task.steering_by_method))
    rows = []
    for label, task in tasks.items():
        of = {name: blocks[direction] for name, blocks in task.steering_by_method.items() if direction in blocks}
        row = [label, *(three(of[name].pairs.shift) if name in of else NOT for name in names)]
        nmd = task.unpenalized.get(direction)
        rows.append([*row, f"{three(nmd.shift)}, {three(nmd.control)}" if nmd else NOT])
    columns = ["task", *names, "NMD whatever its controls do; its strongest"]
    return Table(f"Methods {TOWARD[direction]}, each at its own setting, share of test pairs", columns, rows)


def at_one_norm(tasks: Tasks, direction: Direction) -> Table:
    """All methods at each strength that all were tried at, each where it does most on tune."""
    names = list(dict.fromkeys(name for task in tasks.values() for name in task.steering_by_method))
    rows = []
    for label, task in tasks.items():
        for strength, of in task.equal_norm.get(direction, {}).items():
            row = [f"{three(of[name].shift)}, {three(of[name].control)}" if name in of else NOT for name in names]
            rows.append([label, strength, *row])
    caption = f"Methods {TOWARD[direction]}, all of one norm: share of test pairs, strongest control"
    return Table(caption, ["task", "norm", *names], rows)


def probes(tasks: Tasks) -> Table:
    """A probe of the states beside what reads the prompt alone, and what the model's own doubt gives."""
    rivals = [*RIVALS]
    rows = []
    for label, task in tasks.items():
        probe = task.probe
        row = [label, ranged(probe.best.accuracy), three(probe.input_only), three(probe.input_repeats)]
        row += [three(probe.baselines[name]) for name in UNCERTAINTIES]
        row.append(three(probe.shuffled))
        row += [ranged(probe.best[f"minus_{name}"], sign=True) for name in ("input_only", "input_repeats")]
        rows.append(row)
    columns = ["task", "probe of the best layer", *(RIVALS[name] for name in rivals), "shuffled labels, all layers"]
    return Table("Accuracy on test pairs", [*columns, "minus the input", "minus the input with repeats"], rows)


def differences(tasks: Tasks) -> Table:
    """Where the difference is, on the fit pairs."""
    rows = []
    for label, task in tasks.items():
        found = task.contrast
        of = [(found.mean_abs_nmd, 4), (found.in_norms, 4), (found.max_abs_rho, 2)]
        rows.append([label, *(" ".join(f"{value:.{places}f}" for value in values) or NOT for values, places in of)])
    columns = ["task", "mean absolute NMD", "the same over the mean norm of the states", "largest absolute rho"]
    return Table("By layer, from the first to the last", columns, rows)


def layers(tasks: Tasks) -> Table:
    """Where one layer's shift acts on tune, and what the other side's state does there on test."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            alone = task.by_layer.shift[direction]
            for site in SITES:
                sites = {name: of[site] for name, of in alone.methods.items() if site in of}
                most = {
                    name: max((one.estimate for one in each if one.known), default=-1) for name, each in sites.items()
                }
                name = max(most, key=lambda name: most[name], default="")
                shifted = f"{' '.join(map(two, sites[name]))}, {name} at {alone.strength:g}" if name else NOT
                patched = " ".join(two(each.shift) for each in task.patch.get(direction, {}).get(site, []))
                if name or patched:
                    rows.append([label, towards, site, shifted, patched or NOT])
    columns = ["task", "direction", "site", "one layer shifted, the method that does most (tune)", "patched in (test)"]
    return Table("By layer, from the first to the last: share of pairs", columns, rows)


def held_at_mean(tasks: Tasks) -> Table:
    """What is lost of a pair's separation when the best method's neurons are held at their mean, beside random ones."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            of = of_best(task, direction, "ablation")
            for share in dict.fromkeys(share for shares in of for share in shares):
                found = [shares[share] for shares in of if share in shares]
                before = over_seeds([one.vector.before for one in found])
                lost = [
                    over_seeds([one.vector.lost for one in found]),
                    over_seeds([one.random_neurons.lost for one in found]),
                ]
                told = [f"{one.estimate:.2f} of {before.estimate:.2f}" for one in lost]
                difference = ranged(over_seeds([one.minus_random for one in found]), sign=True)
                rows.append([label, towards, share, *told, difference])
    columns = ["task", "direction", "share of neurons", "the vector's", "random", "difference"]
    return Table("Neurons held at their mean: separation of a pair's sides lost, nats", columns, rows)


def alike(results: Part) -> Table:
    """The strongest neurons in common, between halves of the pairs and between seeds, beside chance within layers."""
    rows = []
    for label, task in results.tasks.items():
        for between, top, share, chance in overlaps(task, results.seeds.get(label, [])):
            by_chance = f"{three(chance)}, up to {chance.high:.3f}"
            rows.append([label, between, f"{top:g}", ranged(share), by_chance])
    columns = ["task", "between", "share of neurons", "in common (range)", "by chance within layers"]
    return Table("The same neurons again", columns, rows)


def chosen(tasks: Tasks) -> Table:
    """Each seed's setting, and whether the limits were kept on tune."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            best = [seed.chosen for seed in of_seeds(task, direction)]
            each = [
                f"{one.method}, {one.site}, {layer_names(one.layers)}, {one.top:g}, {one.strength:g}" for one in best
            ]
            alphas = [f"{one.alpha:.2g}" for one in best if not np.isnan(one.alpha)]
            kept = ", ".join("yes" if one.within_limits else "no" for one in best)
            rows.append([label, towards, "; ".join(each), ", ".join(alphas) or NOT, kept])
    columns = ["task", "direction", "method, place, share of neurons, strength; by seed", "alpha, where it is NMD"]
    columns.append("within the limits on tune (to memorized, new questions do not count)")
    return Table("Chosen on tune by shift minus what its worst control costs", columns, rows)


def doses(tasks: Tasks) -> Table:
    """Shift and margin at multiples of the chosen strength, each seed's best method."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            of = [found.get("vector", {}) for found in of_best(task, direction, "dose")]
            row, n = [], 0
            for dose in DOSES:
                found = [at[dose] for at in of if dose in at]
                shift, margin = over_seeds([one.shift for one in found]), over_seeds([one.margin for one in found])
                row.append(f"{three(shift)}, {margin.estimate:+.1f}" if shift.known else NOT)
                n = max(n, shift.n)
            rows.append([label, towards, f"{n:,}", *row])
    columns = ["task", "direction", "pairs", *(f"{dose} times" for dose in DOSES)]
    caption = "Each seed's best method: share of test pairs, mean margin (generalized minus memorized) in nats"
    return Table(caption, columns, rows)


def costs(tasks: Tasks) -> Table:
    """The change in accuracy on what should stay, under both aims."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            block = task.steering[direction]
            of_pairs, of_conflicts = changes(block.collateral), changes(for_aim(block, "conflict").collateral_conflict)
            rows.append([label, towards, of_pairs, "the same" if of_conflicts == of_pairs else of_conflicts])
    return Table("Change in accuracy", ["task", "direction", "chosen for pairs", "chosen for conflicts as drawn"], rows)


def changes(collateral: dict[str, Estimate]) -> str:
    """Each list's change; memory examples that are the conflicts themselves are no cost."""
    known = [f"{LISTS[name]} {change.estimate:+.3f}" for name, change in collateral.items() if change.known]
    return ", ".join(known) or NOT


def draws(run: Run) -> Table:
    """How often a draw between the two answers would differ from the greedy one of them: 1 / (1 + exp |margin|)."""
    rows = []
    for label, cells in run.by_label().items():
        of = [cell.behaviour[cell.behaviour.kind == "conflict"] for cell in cells]
        one_of_two = [each[each.behaviour != "other"] for each in of]
        differ = float(np.mean([np.mean(1 / (1 + np.exp(np.abs(each.margin)))) for each in one_of_two]))
        rows.append([label, f"{differ:.3f}", f"{sum(int(each.tie.sum()) for each in of)} of {sum(map(len, of)):,}"])
    return Table("Test conflicts", ["task", "a draw would differ", "ties, all seeds"], rows)


def pretrained(results: Part, tasks: Tasks) -> Iterator[Table]:
    """The same of a pretrained model, in short."""
    yield behaviours(results)
    yield from failures(results)
    yield from (steering(tasks, direction) for direction in DIRECTIONS)
    yield from (controls(tasks, direction) for direction in DIRECTIONS)
    yield from kept_apart(tasks)
    yield from (methods(tasks, direction) for direction in DIRECTIONS)
    yield probes(tasks)
    yield costs(tasks)


def kept_apart(tasks: Tasks) -> Iterator[Table]:
    """The shares of all tasks on what they hold out."""
    held = [row for label, task in tasks.items() for row in held_out(label, task)]
    if held:
        yield Table("Test pairs of what was held out", ["task", *TOWARD.values()], held)


def held_out(label: str, task: Part) -> Iterator[list[str]]:
    """What a task holds out, such as a frame or a relation, by its name."""
    for name in dict.fromkeys(name for block in task.steering.values() for name in block.held_out):
        shifts = [task.steering[direction].held_out[name].shift for direction in DIRECTIONS]
        if any(shift.known for shift in shifts):
            yield [f"{label}, another {name}", *map(ranged, shifts)]


def again(later: Tasks) -> Iterator[Table]:
    """What a later run found: the shift, of each seed too, the strongest control, by what, and what was held out."""
    rows = []
    for label, task in later.items():
        for direction, towards in TOWARD.items():
            block, seeds = task.steering[direction], of_seeds(task, direction)
            each = ", ".join(three(seed.pairs.shift) for seed in seeds)
            by = ", ".join(f"{seed.chosen.method}, {layer_names(seed.chosen.layers)}" for seed in seeds)
            row = [label, towards, ", ".join(map(str, task.seeds))]
            rows.append([*row, f"{ranged(block.pairs.shift)} ({each})", strongest(block), by])
    columns = ["task", "direction", "seeds", "shift (by seed)", "strongest control", "method and layers, by seed"]
    yield Table("Test pairs, the best method by the tune split", columns, rows)
    yield from kept_apart(later)


def short(found: dict[str, Tasks]) -> Table:
    """Each task's shift, strongest control and largest loss, both ways; of all studies."""
    rows, first = [], next(iter(found))
    for study, label, task in ((study, *item) for study, tasks in found.items() for item in tasks.items()):
        row = [f"`{label}`" if study == first else f"`{label}` of `{study}`", str(len(task.seeds))]
        for direction in DIRECTIONS:
            block = task.steering[direction]
            beside, known = block.beside.get("pairs"), {key: one for key, one in block.collateral.items() if one.known}
            worst = min(known, key=lambda key: known[key].estimate, default=None)
            cost = f"{known[worst].estimate:+.3f} ({LISTS[worst]})" if worst else NOT
            row.append(f"{ranged(block.pairs.shift)}, {three(beside.shift) if beside else NOT}, {cost}")
        rows.append(row)
    columns = ["task", "seeds", *(f"{towards}: shift, control, cost" for towards in TOWARD.values())]
    return Table(
        "Test pairs, means over seeds: share steered, strongest control, largest loss of accuracy", columns, rows
    )


def rounded(trained: list[Tasks]) -> Table:
    """How far shares of one seed lie apart where its trainings round otherwise."""
    rows = []
    for label in trained[0]:
        row = [label, str(sum(label in tasks for tasks in trained))]
        for direction in DIRECTIONS:
            blocks = [tasks[label].steering[direction] for tasks in trained if label in tasks]
            shares = sorted(block.pairs.shift.estimate for block in blocks)
            controls = sorted(block.beside["pairs"].shift.estimate for block in blocks)
            taken = Counter(block.chosen.method for block in blocks).most_common()
            row += [f"{shares[0]:.3f} to {shares[-1]:.3f}", f"{controls[0]:.3f} to {controls[-1]:.3f}"]
            row.append(" and ".join(f"{method} in {count}" for method, count in taken))
        rows.append(row)
    columns = [f"{towards}{what}" for towards in TOWARD.values() for what in (": shift", ": control", ": by")]
    caption = "Test pairs, lowest and highest share of one seed's trainings, and of their strongest controls"
    return Table(caption, ["task", "trainings", *columns], rows)


def three(found: Estimate) -> str:
    """A share to three places."""
    return f"{found.estimate:.3f}" if found.known else NOT


def ranged(found: Estimate, sign: bool = False) -> str:
    """The same with its interval: over seeds, or of one seed over groups; a share's is cut to what a share can be."""
    if not found.known or np.isnan(found.low):
        return three(found)
    low, high = (found.low, found.high) if sign else (max(0.0, found.low), min(1.0, found.high))
    return f"{found.estimate:{'+' if sign else ''}.3f} ({low:.2f} to {high:.2f})"


def two(found: Estimate) -> str:
    """A share to two places."""
    return f"{found.estimate:.2f}" if found.known else NOT


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--again", nargs="+", type=Path, default=[], help="later runs of studies that are published")
    parser.add_argument("--roundings", nargs="+", type=Path, default=[], help="of scripts/anywhere.sh, one seed each")
    parser.add_argument("--write", type=Path, help="file for the tables, docs/results/review.json")
    asked = parser.parse_args()
    if not asked.runs + asked.again + asked.roundings:
        parser.error("give RUN..., --again or --roundings")
    found = sections(asked.runs, asked.again, asked.roundings)
    kept = json.loads(asked.write.read_text()) if asked.write and not asked.runs else {}
    put("review", kept | found, asked.write)
