"""Print docs/REVIEW.md, what runs answer of the eleven gaps: ``python docs/review.py RUN... > docs/REVIEW.md``.

The first run is that of small models, the others are those of point 11. The README has the table "In short".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mnemoscope.report.holds import overlaps, transfer
from mnemoscope.report.page import Table
from mnemoscope.report.read import UNCERTAINTIES
from mnemoscope.report.records import Run, read_run
from mnemoscope.report.schema import DIRECTIONS, REFITTED, Direction, Estimate, Results, Steered, TaskResults
from mnemoscope.report.words import CONTROLS, LISTS, RIVALS, listed

HEAD = Path(__file__).with_name("review.head.md")
NOT = "-"
TOWARD = {direction: direction.replace("_", " ") for direction in DIRECTIONS}
DOSES = ("-1", "0", "0.5", "1", "2")
Tasks = dict[str, TaskResults]


def main(runs: list[Path]) -> None:
    """Print the page."""
    found = [Results.model_validate(json.loads((run / "results.json").read_text())) for run in runs]
    print(HEAD.read_text())
    first, *others = found
    tasks = analysed(first)
    points = {
        "In short": [short(found)],
        "1 and 3: what the models do, and how many pairs there are": [behaviours(first), *failures(first)],
        "2: what steers, beside controls of equal norm": [
            *(steering(tasks, direction) for direction in DIRECTIONS),
            *(controls(tasks, direction) for direction in DIRECTIONS),
            *(methods(tasks, direction) for direction in DIRECTIONS),
            *(at_one_norm(tasks, direction) for direction in DIRECTIONS),
        ],
        "4: could the input alone predict it?": [probes(tasks)],
        "5: which layers, which neurons?": [layers(tasks), held_at_mean(tasks)],
        "6: from seed to seed, from task to task": [alike(first), *filter(None, [transfer(first.transfer)])],
        "7: what was chosen": [chosen(tasks)],
        "8: by degrees?": [doses(tasks)],
        "9: what steering costs": [costs(tasks)],
        "10: the same input twice": [draws(read_run(runs[0]))],
        "11: pretrained models": [table for results in others for table in pretrained(results)],
    }
    for title, tables in points.items():
        print("\n\n".join([f"## {title}", *(map(markdown, tables) if tables else [NOT])]), end="\n\n")


def analysed(results: Results) -> Tasks:
    """Tasks of which something was steered."""
    return {label: task for label, task in results.tasks.items() if task.steering}


def behaviours(results: Results) -> Table:
    """What a model answers before anything is done to it, and how many pairs flip."""
    columns = ["task", "seeds", "memorized / generalized / other", "confabulated", "novel, recall"]
    rows = []
    for label, task in results.tasks.items():
        said, pairs = task.behaviour, task.pairs
        shares = " / ".join(three(said.conflict[name]) for name in ("memorized", "generalized", "other"))
        row = [label, ", ".join(map(str, task.seeds)), shares, three(said.conflict["confabulated"])]
        yielded = f"{pairs.pairs:,}, {pairs.groups:,}, {three(pairs.yield_)}"
        rows.append([*row, f"{three(said.novel_accuracy)}, {three(said.recall)}", yielded])
    return Table("Test split, unsteered", [*columns, "test pairs, groups, yield"], rows)


def failures(results: Results) -> list[Table]:
    """Cells that could not go on."""
    rows = [[label, why] for label, why in results.failed.items()]
    return [Table("Cells that could not go on", ["cell", "why"], rows)] if rows else []


def steering(tasks: Tasks, direction: Direction) -> Table:
    """The shift of the best method with each seed's, its strongest controls, and what becomes of the rest."""
    columns = ["task", "shift", "by", "strongest control", "strongest random one", "other / confabulated"]
    rows = []
    for label, task in tasks.items():
        block, seeds = task.steering[direction], [seed.steering[direction] for seed in task.per_seed.values()]
        each = f"; {', '.join(three(seed.pairs.shift) for seed in seeds)}" if len(seeds) > 1 else ""
        row = [label, f"**{ranged(block.pairs.shift)}**{each}"]
        row.append(listed(list(dict.fromkeys(seed.chosen.method for seed in seeds))))
        row += [strongest(block, names) for names in (set(CONTROLS), set(CONTROLS) - set(REFITTED))]
        row.append(f"{three(block.pairs.other)} / {three(block.confabulated)}")
        drawn = block.for_aim("conflict")
        control = three(drawn.beside["conflict"].shift) if "conflict" in drawn.beside else NOT
        rows.append([*row, f"{ranged(drawn.conflict.shift)}; {control}", three(block.pairs_unreachable.shift)])
    columns += ["conflicts as drawn; their control", "pairs that do not keep the key"]
    return Table(f"Steered {TOWARD[direction]}, test pairs, the best method by the tune split", columns, rows)


def strongest(block: Steered, names: set[str]) -> str:
    """The control of these that steers most, its draws pooled, mean over seeds."""
    drawn = {name: one.pairs.shift for name, one in block.controls.items() if name in names and one.pairs.shift.known}
    if not drawn:
        return NOT
    name = max(drawn, key=lambda name: drawn[name].estimate)
    return f"{three(drawn[name])}, {CONTROLS[name]}"


def controls(tasks: Tasks, direction: Direction) -> Table:
    """Every control's share, the vector less the strongest, and less what its mean push on the margin would do."""
    rows = []
    for label, task in tasks.items():
        block, push = task.steering[direction], task.logit.get(direction)
        row = [label, *(three(block.controls[name].pairs.shift) for name in CONTROLS)]
        row.append(ranged(block.beside["pairs"].difference, sign=True) if "pairs" in block.beside else NOT)
        rows.append([*row, ranged(push.vector_minus_logit, sign=True) if push else NOT])
    columns = ["task", *CONTROLS.values(), "vector minus each seed's strongest", "minus its mean push on the margin"]
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
    """All methods at the strength at which any of them steers most, each where it does most on tune."""
    names = list(dict.fromkeys(name for task in tasks.values() for name in task.steering_by_method))
    rows = []
    for label, task in tasks.items():
        by_strength = task.equal_norm.get(direction, {})
        if by_strength:
            most = {key: max(one.shift.estimate for one in of.values()) for key, of in by_strength.items()}
            strength = max(most, key=lambda key: np.nan_to_num(most[key]))
            of = by_strength[strength]
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
        row += [ranged(getattr(probe.best, f"minus_{name}"), sign=True) for name in ("input_only", "input_repeats")]
        rows.append(row)
    columns = ["task", "probe of the best layer", *(RIVALS[name] for name in rivals), "shuffled labels"]
    return Table("Accuracy on test pairs", [*columns, "minus the input", "minus the input with repeats"], rows)


def layers(tasks: Tasks) -> Table:
    """Where the difference is, where one layer's shift acts on tune, and what the other side's state does there."""
    rows = []
    for label, task in tasks.items():
        found = task.by_layer
        row = [label, " ".join(f"{x:.4f}" for x in found.mean_abs_nmd), " ".join(f"{x:.2f}" for x in found.max_abs_rho)]
        for direction in DIRECTIONS:
            sites = {name: of["block"] for name, of in found.shift[direction].methods.items() if "block" in of}
            name = max(sites, key=lambda name: np.nanmax([0.0, *(each.estimate for each in sites[name])]), default="")
            row.append(f"{' '.join(f'{each.estimate:.2f}' for each in sites[name])}, {name}" if name else NOT)
            patched = task.patch.get(direction, {}).get("block", [])
            row.append(" ".join(f"{each.shift.estimate:.2f}" for each in patched) or NOT)
        rows.append(row)
    columns = ["task", "mean absolute NMD", "largest absolute rho"]
    for towards in TOWARD.values():
        columns += [f"{towards}: one layer shifted (tune)", f"{towards}: patched in"]
    return Table("By layer, from the first to the last", columns, rows)


def held_at_mean(tasks: Tasks) -> Table:
    """What is lost of a pair's separation when the best method's neurons are held at their mean, beside random ones."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            shares = task.ablation.get(task.steering[direction].chosen.method, {}).get(direction, {})
            for share, one in shares.items():
                lost = [
                    f"{each.lost.estimate:.2f} of {each.before.estimate:.2f}"
                    for each in (one.vector, one.random_neurons)
                ]
                rows.append([label, towards, share, *lost, ranged(one.minus_random, sign=True)])
    columns = ["task", "direction", "share of neurons", "the vector's", "random", "difference"]
    return Table("Neurons held at their mean: separation of a pair's sides lost, nats", columns, rows)


def alike(results: Results) -> Table:
    """The strongest neurons in common, between halves of the pairs and between seeds, beside chance within layers."""
    rows = []
    for label, task in results.tasks.items():
        for between, top, share, chance in overlaps(task, results.seeds.get(label, [])):
            by_chance = f"{three(chance)}, up to {chance.high:.3f}"
            rows.append([label, between, f"{top:g}", ranged(share), by_chance])
    return Table("The same neurons again", ["task", "between", "share of neurons", "in common", "by chance"], rows)


def chosen(tasks: Tasks) -> Table:
    """The first seed's setting, each seed's method, and whether the limits were kept on tune."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            best = [seed.steering[direction].chosen for seed in task.per_seed.values()]
            each = [f"{one.method}, {one.site} {one.layers[0]}-{one.layers[-1]}, {one.strength:g}" for one in best]
            rows.append(
                [label, towards, "; ".join(each), ", ".join("yes" if one.within_limits else "no" for one in best)]
            )
    columns = ["task", "direction", "method, place, strength by seed", "within the limits on tune"]
    return Table("Chosen on tune by shift minus what its worst control costs", columns, rows)


def doses(tasks: Tasks) -> Table:
    """Shift and margin at multiples of the chosen strength."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            at = task.dose.get(task.steering[direction].chosen.method, {}).get(direction, {}).get("vector", {})
            row = [f"{three(at[dose].shift)}, {at[dose].margin.estimate:+.1f}" if dose in at else NOT for dose in DOSES]
            rows.append([label, towards, *row])
    columns = ["task", "direction", *(f"{dose} times" for dose in DOSES)]
    return Table("The first seed's best method: share of test pairs, mean margin in nats", columns, rows)


def costs(tasks: Tasks) -> Table:
    """The change in accuracy on what should stay, under both aims."""
    rows = []
    for label, task in tasks.items():
        for direction, towards in TOWARD.items():
            block = task.steering[direction]
            row = [changes(block.collateral), changes(block.for_aim("conflict").collateral_conflict)]
            rows.append([label, towards, *row])
    return Table("Change in accuracy", ["task", "direction", "chosen for pairs", "chosen for conflicts as drawn"], rows)


def changes(collateral: dict[str, Estimate]) -> str:
    """Each list's change."""
    known = [f"{LISTS[name]} {change.estimate:+.3f}" for name, change in collateral.items() if change.known]
    return ", ".join(known) or NOT


def draws(run: Run) -> Table:
    """How often a draw between the two answers would differ from the greedy one: 1 / (1 + exp |margin|)."""
    rows = []
    for label, cells in run.by_label().items():
        of = [cell.behaviour[cell.behaviour.kind == "conflict"] for cell in cells]
        differ = float(np.mean([np.mean(1 / (1 + np.exp(np.abs(each.margin)))) for each in of]))
        rows.append([label, f"{differ:.3f}", f"{sum(int(each.tie.sum()) for each in of)} of {sum(map(len, of)):,}"])
    return Table("Test conflicts", ["task", "a draw would differ", "ties"], rows)


def pretrained(results: Results) -> Iterator[Table]:
    """The same of a pretrained model, in short."""
    tasks = analysed(results)
    yield behaviours(results)
    yield from failures(results)
    yield from (steering(tasks, direction) for direction in DIRECTIONS)
    held = [row for label, task in tasks.items() for row in held_out(label, task)]
    if held:
        yield Table("Test pairs of what was held out", ["task", *TOWARD.values()], held)
    yield from (methods(tasks, direction) for direction in DIRECTIONS)
    yield probes(tasks)
    yield costs(tasks)


def held_out(label: str, task: TaskResults) -> Iterator[list[str]]:
    """What a task holds out, such as a frame or a relation, by its name."""
    for name in dict.fromkeys(name for block in task.steering.values() for name in block.held_out):
        shifts = [task.steering[direction].held_out[name].shift for direction in DIRECTIONS]
        if any(shift.known for shift in shifts):
            yield [f"{label}, another {name}", *map(ranged, shifts)]


def short(found: list[Results]) -> Table:
    """Each task's shift, strongest control and largest loss, both ways."""
    rows = []
    for study, label, task in ((r.study, label, task) for r in found for label, task in analysed(r).items()):
        row = [f"`{label}`" if study == found[0].study else f"`{label}` of `{study}`", str(len(task.seeds))]
        for direction in DIRECTIONS:
            block = task.steering[direction]
            control = strongest(block, set(CONTROLS)).partition(",")[0]
            lost = min((change.estimate for change in block.collateral.values() if change.known), default=np.nan)
            row.append(f"{ranged(block.pairs.shift)}, {control}, {lost:+.3f}")
        rows.append(row)
    columns = ["task", "seeds", *(f"{towards}: shift, control, cost" for towards in TOWARD.values())]
    return Table(
        "Test pairs, means over seeds: share steered, strongest control, largest loss of accuracy", columns, rows
    )


def three(found: Estimate) -> str:
    """A share to three places."""
    return f"{found.estimate:.3f}" if found.known else NOT


def ranged(found: Estimate, sign: bool = False) -> str:
    """The same with its interval: over seeds, or of one seed over groups; a share's is cut to what a share can be."""
    if not found.known or np.isnan(found.low):
        return three(found)
    low, high = (found.low, found.high) if sign else (max(0.0, found.low), min(1.0, found.high))
    return f"{found.estimate:{'+' if sign else ''}.3f} ({low:.2f} to {high:.2f})"


def markdown(table: Table) -> str:
    """A table of the page as Markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"{table.caption}:\n", *lines]).replace("\u00a0", " ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    main(parser.parse_args().runs)
