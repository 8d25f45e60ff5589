"""Can it be steered: the vector beside its controls, every method, doses, and simpler ways.

Each method has two settings, chosen on the tune split: one for pairs, and one, with the same share of neurons, for
conflicts as they are drawn: pairs are among them, but most lie further from the tipping point. ``pairs`` and its
controls are judged under the first, ``conflict`` and its own under the second.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report import drawing, schema, words
from mnemoscope.report.cost import measure_collateral, measure_lost
from mnemoscope.report.detector import measure_gated, recall_by_family
from mnemoscope.report.drawing import DASHED, INK, OTHER, TONE, Dot, Line, Panel, dots_panel
from mnemoscope.report.intervals import shares
from mnemoscope.report.page import TOO_FEW, Answer, Chapter, Exhibit, Table, View, not_measured
from mnemoscope.report.records import Cell
from mnemoscope.report.schema import AIMS, CONTROLS, DIRECTIONS, Aim, Direction, Steered, TaskResults
from mnemoscope.report.words import CAPITAL, LISTS, NBSP, TOWARDS, percent, ranged
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import Estimate, mean, proportion, surely_more

KEYS = ["aim", "direction", "method", "role", "examples"]
MARKERS = dict(zip(CONTROLS, ("o", "v", "s", "^", "P", "*", "D"), strict=True))
Beyond = tuple[pd.Series, pd.Series, pd.Series]  # differences of hits, their groups, their draws
PAPERS = "nmd"  # the paper's own method


class Examples:
    """The steering table of a cell, cut once into the parts that numbers are computed from."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self._table = cell, cell.read_steering()
        self._places = self._table.groupby(KEYS, observed=True).indices
        self.lists = sorted(self._table.examples.unique())

    def rows(self, aim: str, direction: str, method: str, role: str, examples: str) -> pd.DataFrame:
        """Test examples of one list under one setting and role; no rows where there are none."""
        return self._table.iloc[self._places.get((aim, direction, method, role, examples), [])]

    def compared(self, aim: str, keys: list[str]) -> Any:
        """(values of ``keys``, rows) of settings that are compared and not used; none where they were left out."""
        return self._table[self._table.aim == aim].groupby(keys, observed=True)


def measure_steering(cell: Cell) -> dict[str, Any]:
    """Every method in every direction, the best one of each by the tune split, and what a uniform push would do."""
    examples = Examples(cell)
    settings = {aim: cell.chosen[aim]["methods"] for aim in AIMS}
    by_method = {
        method: {
            direction: measure_direction(examples, method, direction, {a: settings[a][method][direction] for a in AIMS})
            for direction in DIRECTIONS
            if direction in settings["pairs"][method]
        }
        for method in sorted(settings["pairs"])
    }
    best = {aim: cell.chosen[aim]["best"] for aim in AIMS}
    steering = {
        direction: by_method[best["pairs"][direction]][direction].model_copy(
            update={"best_conflict": by_method[best["conflict"][direction]][direction]}
        )
        for direction in DIRECTIONS
    }
    logit = {direction: _logit(examples, best["pairs"][direction], direction) for direction in DIRECTIONS}
    return {"steering": steering, "steering_by_method": by_method, "logit": logit, **_measure_norms(examples)}


def _measure_norms(examples: Examples) -> dict[str, Any]:
    """Every method at equal norms, and NMD without the penalty on controls."""
    found: dict[str, Any] = {"equal_norm": {d: {} for d in DIRECTIONS}, "unpenalized": {}}
    for (direction, method, strength), rows in examples.compared("equal_norm", ["direction", "method", "strength"]):
        found["equal_norm"][direction].setdefault(f"{strength:g}", {})[method] = _at_norm(
            examples.cell, rows, direction
        )
    for (direction,), rows in examples.compared("unpenalized", ["direction"]):
        found["unpenalized"][direction] = _at_norm(examples.cell, rows, direction)
    return found


def _at_norm(cell: Cell, rows: pd.DataFrame, direction: Direction) -> schema.AtNorm:
    """A setting beside the control that steers most of all that were drawn."""
    parts = {str(role): part for role, part in rows.groupby("role", observed=True)}
    vector, first = parts.pop("vector"), rows.iloc[0]
    shifts = {name: shares(part, direction, confabulated=False).shift for name, part in parts.items()}
    strongest = max(shifts, key=lambda name: shifts[name].estimate, default="")
    return schema.AtNorm(
        **{name: first[name] for name in ("site", "layers", "top", "strength")},
        shift=shares(vector, direction, confabulated=False).shift,
        control=shifts.get(strongest, Estimate.undefined()),
        strongest=strongest,
        difference=mean(*beyond(cell, vector, parts.get(strongest, vector.head(0)), direction)),
    )


def measure_direction(examples: Examples, method: str, direction: Direction, chosen: dict[Aim, Any]) -> Steered:
    """One method in one direction, under its settings by aim: shifts, controls, what is left of them, collateral."""
    cell = examples.cell

    def vector(aim: str, name: str) -> pd.DataFrame:
        return examples.rows(aim, direction, method, "vector", name)

    def measured(aim: str, name: str) -> schema.Shares:
        return shares(vector(aim, name), direction)

    pairs = measured("pairs", "pairs")
    controls = {name: {aim: examples.rows(aim, direction, method, name, aim) for aim in AIMS} for name in CONTROLS}
    more = {
        name: {aim: beyond(cell, vector(aim, aim), part, direction) for aim, part in parts.items()}
        for name, parts in controls.items()
    }
    of_controls = {name: _control(parts, more[name], direction) for name, parts in controls.items()}
    minus = {name: {aim: mean(*rows) for aim, rows in by_aim.items()} for name, by_aim in more.items()}
    held_out = [name for name in examples.lists if name.startswith("pairs_") and name != "pairs_unreachable"]
    kept = {aim: {name: vector(aim, name) for name in ("memory", "novel", "conflict_rest")} for aim in AIMS}
    return Steered(
        chosen=chosen["pairs"],
        chosen_conflict=chosen["conflict"],
        pairs=pairs,
        conflict=measured("conflict", "conflict"),
        confabulated=pairs.confabulated,
        pairs_unreachable=measured("pairs", "pairs_unreachable"),
        held_out={name.removeprefix("pairs_"): measured("pairs", name) for name in held_out},
        conflict_at_chosen=measured("pairs", "conflict"),
        controls=of_controls,
        minus_control=minus,
        beside={aim: found for aim in AIMS if (found := _strongest(of_controls, minus, aim))},
        collateral=measure_collateral(cell, direction, kept["pairs"]),
        collateral_conflict=measure_collateral(cell, direction, kept["conflict"]),
        lost_right={aim: measure_lost(cell, direction, kept[aim]) for aim in AIMS},
        recall_by_family=recall_by_family(cell, vector("pairs", "memory")),
        gated=measure_gated(cell, direction, {name: vector("pairs", name) for name in examples.lists}),
    )


def _strongest(
    controls: dict[str, schema.Control], minus: dict[str, dict[Aim, Estimate]], aim: Aim
) -> schema.Strongest | None:
    """The control that steers most of those that were drawn; None without any."""
    drawn = {name: shift for name, one in controls.items() if (shift := getattr(one, aim).shift).known}
    if not drawn:
        return None
    name = max(drawn, key=lambda name: drawn[name].estimate)
    exceeded = all(controls[one].exceeded[aim] for one in drawn)
    return schema.Strongest(shift=drawn[name], difference=minus[name][aim], names={name: 1}, exceeded=exceeded)


def _control(parts: dict[Aim, pd.DataFrame], more: dict[Aim, Beyond], direction: Direction) -> schema.Control:
    """All draws of a control pooled, the draw that shifts most, and whether the vector does surely more."""
    draws, pooled, worst, exceeded = {}, {}, {}, {}
    for aim, rows in parts.items():
        by_draw = (rows.after == DIRECTIONS[direction][0]).groupby(rows.draw).mean()
        most = rows[rows.draw == by_draw.idxmax()] if len(by_draw) else rows
        draws[aim] = len(by_draw)
        exceeded[aim] = surely_more(*more[aim])
        pooled[aim], worst[aim] = (shares(one, direction, confabulated=False) for one in (rows, most))
    return schema.Control(**pooled, draws=draws, worst=worst, exceeded=exceeded)


def beyond(cell: Cell, vector: pd.DataFrame, control: pd.DataFrame, direction: Direction) -> Beyond:
    """Hit of the vector minus hit of a control's draw, for each example and draw, with their groups and draws."""
    target = DIRECTIONS[direction][0]
    if not vector.empty and not control.empty and set(vector.example) != set(control.example):
        raise InputError(
            f"{cell.folder / 'records' / 'steering.parquet'}: {direction}, {vector.examples.iloc[0]}: the vector and "
            f"the control {control.role.iloc[0]!r} were not tried on the same examples"
        )
    control = control if len(vector) else control.head(0)
    hit = (vector.after == target).astype(np.float64).set_axis(vector.example)
    return control.example.map(hit) - (control.after == target), control.group, control.draw


def _logit(examples: Examples, method: str, direction: Direction) -> schema.Push:
    """What the vector's mean effect on the margin would shift if every pair got exactly that push, whatever it asks.

    A shift that moves all margins alike is no more than a bias on the two answers.
    """
    sign = 1 if direction == "to_generalized" else -1
    rows = examples.rows("pairs", direction, method, "vector", "pairs")
    effect = rows.margin - rows.margin_before
    # Whether the target's answer is the likelier one; NaN where that is not known.
    margins = (rows.margin_before + effect.mean(), rows.margin)
    pushed, shifted = ((sign * margin > 0).astype(float).where(margin.notna()) for margin in margins)
    return schema.Push(
        method=method,
        push=mean(effect, rows.group),
        shift=proportion(pushed, rows.group),
        vector=proportion(shifted, rows.group),
        vector_minus_logit=mean(shifted - pushed, rows.group),
    )


def chapter(view: View) -> Chapter:
    """The vector beside its controls, methods, doses, simpler ways."""
    task, steering = view.task, view.task.steering
    if not any(getattr(block, aim).shift.known for block in steering.values() for aim in AIMS):
        return Chapter(answer(task))
    pushes = [_push_sentence(task.logit[direction], direction) for direction in steering]
    by_aim = {
        "pairs": ("methods", [_methods_panel(task, d, "pairs") for d in steering]),
        "conflict": ("methods-conflict", [_methods_panel(task, d, "conflict") for d in steering]),
    }
    shown, folded = by_aim.pop(task.aim), by_aim.popitem()[1]
    exhibits = [
        Exhibit("switch", [_switch_panel(task, direction) for direction in steering]),
        Exhibit(*shown, table=methods_table(task)),
        Exhibit("dose", [panel for d in steering for panel in _dose_panels(task, d)]),
        Exhibit("simpler", [simpler_panel(task, direction) for direction in steering], pushes),
        Exhibit(*folded, folded=True),
    ]
    return Chapter(answer(task), exhibits, [table(task), *norms_table(task)])


def answer(task: TaskResults) -> Answer:
    """Verdict and number are of the same directions: of two that work, the number is the smaller one."""
    question, aim = "Can it be steered?", task.aim
    steering = {direction: block.for_aim(aim) for direction, block in task.steering.items()}
    shifts = {d: share for d, block in steering.items() if (share := getattr(block, aim).shift).known}
    measured = sorted(shifts, key=lambda d: shifts[d].estimate)
    if not measured:
        return not_measured("steer", question, task)
    works = [d for d in measured if surely_steers(task, d)]
    verdict = "Steering does not surely work"
    if works:
        where = "in both directions" if len(works) == 2 else TOWARDS[works[0]]
        verdict = f"Steering works{'' if all(shifts[d].estimate >= 0.5 for d in works) else ' in part,'} {where}"
    if all(share.too_few for share in shifts.values()):
        verdict = TOO_FEW
    shown, *others = dict.fromkeys([*works, *measured])
    beside = {d: f"strongest control: {words.strongest_control(steering[d], aim)}" for d in measured}
    of = "test pairs" if aim == "pairs" else "test conflicts"
    sentence = f"of {of} are steered {TOWARDS[shown]}; {beside[shown]}."
    notes = [f"95{NBSP}% interval: {words.interval(shifts[shown])}."]
    notes += [f"{CAPITAL[d]}: {ranged(shifts[d])}, {beside[d]}." for d in others]
    losses = [f"{words.largest_loss(steering[d].lost(aim), d)} {TOWARDS[d]}" for d in measured]
    notes.append(f"Largest loss: {words.listed(losses)}.")
    control = steering[shown].beside.get(aim)
    mark = (control.shift.estimate, "strongest control") if control else (math.nan, "")
    share = shifts[shown]
    return Answer("steer", question, verdict, percent(share.estimate), sentence, " ".join(notes), share, mark)


def surely_steers(task: TaskResults, direction: Direction) -> bool:
    """Whether a vector does surely more than its controls.

    That is, than any other draw of each, in every seed, as an interval over a few seeds says little; or over the seeds
    than the one that steers most in each.
    """
    beside = task.steering[direction].for_aim(task.aim).beside.get(task.aim)
    if beside is None:
        return False
    return beside.exceeded or (len(task.seeds) > 1 and beside.difference.sign > 0)


def _switch_panel(task: TaskResults, direction: Direction) -> Panel:
    """The vector, then its controls, on pairs and on any conflict: shift, and the share that gives neither answer."""
    block, seeds, dots = task.steering[direction], [seed.steering[direction] for seed in task.per_seed.values()], []
    for aim in AIMS:
        found = getattr(block, aim)
        single = [(".", getattr(seed, aim).shift.estimate) for seed in seeds] if len(seeds) > 1 else []
        beside = (("x", found.other.estimate), *single)
        dots.append(Dot(LISTS[aim].capitalize(), found.shift, TONE[direction], beside=beside))
        for name, control in block.controls.items():
            found, worst = getattr(control, aim), control.worst[aim].shift.estimate
            row = Dot(words.CONTROLS[name], found.shift, OTHER, True, worst, (("x", found.other.estimate),))
            dots += [row] if found.shift.known else []
    several = [("single seeds", ".")] if len(seeds) > 1 else []
    return dots_panel(direction, dots, legend=[("neither answer", "x"), ("worst draw", "|"), *several])


def table(task: TaskResults) -> Table:
    """The best vector and its controls: what was steered, what was not, with intervals."""
    rows = []
    for (direction, block), aim in product(task.steering.items(), AIMS):
        found = {"vector": (getattr(block, aim), "")}
        for name, control in block.controls.items():
            found[words.CONTROLS[name]] = (getattr(control, aim), percent(control.worst[aim].shift.estimate))
        for who, (each, worst) in found.items():
            numbers = [ranged(share) for share in (each.shift, each.stay, each.other)]
            rows.append([f"{CAPITAL[direction]}, {LISTS[aim]}: {who}", *numbers, worst, f"{each.shift.n:,}"])
    return Table("Steering, test split", ["", "steered", "unmoved", "neither", "worst draw", "answers"], rows)


def _of_direction(task: TaskResults, direction: Direction) -> dict[str, Steered]:
    return {name: block[direction] for name, block in task.steering_by_method.items() if direction in block}


def _methods_panel(task: TaskResults, direction: Direction, aim: Aim) -> Panel:
    """Each method's shift as a dot, its five controls as small marks, the worst draw of any as a tick."""
    dots = []
    for method, block in _of_direction(task, direction).items():
        worst = [control.worst[aim].shift for control in block.controls.values()]
        mark = max((share.estimate for share in worst if share.known), default=math.nan)
        marks = tuple((MARKERS[name], getattr(c, aim).shift.estimate) for name, c in block.controls.items())
        dots.append(Dot(method, getattr(block, aim).shift, TONE[direction], mark=mark, beside=marks))
    dots.sort(key=lambda dot: -np.nan_to_num(dot.value.estimate, nan=-1))
    legend = [(words.CONTROLS[name], marker) for name, marker in MARKERS.items()]
    return dots_panel(direction, dots, legend=[*legend, ("worst draw of any", "|")])


def methods_table(task: TaskResults) -> Table:
    """The setting of each method, what it steers, its strongest control and its largest loss; then other ways."""
    rows = []
    for direction in task.steering:
        for method, block in _of_direction(task, direction).items():
            chosen, shift = block.chosen, block.pairs.shift
            best = " (chosen)" if method == task.steering[direction].chosen.method else ""
            alpha = "" if math.isnan(chosen.alpha) else f", alpha{NBSP}{chosen.alpha:.2g}"
            where = f"{chosen.site}, {words.layers(chosen.layers)}, {100 * chosen.top:g}{NBSP}% of neurons"
            strength = f"{chosen.strength:g}{alpha}{'' if chosen.within_limits else ' (beyond the limits)'}"
            row = [f"{method}, {TOWARDS[direction]}{best}", where, strength, ranged(shift), f"{shift.n:,}"]
            row += [words.strongest_control(block), ranged(block.conflict.shift)]
            rows.append([*row, words.largest_loss(block.collateral, direction)])
        for way, shift in other_ways(task, direction).items():
            of_pairs, of_conflicts = (ranged(shift), "") if task.aim == "pairs" else ("", ranged(shift))
            n = f"{shift.n:,}" if of_pairs else ""
            rows.append([f"{way}, {TOWARDS[direction]}", "", "", of_pairs, n, "", of_conflicts, ""])
    columns = ["", "where", "strength", "pairs steered", "N", "strongest control", "conflicts steered", "largest loss"]
    return Table("Settings chosen on the tune split, and what they do on the test split", columns, rows)


def norms_table(task: TaskResults) -> list[Table]:
    """All methods at equal norms: what each steers, its strongest control, and the difference; [] where left out."""

    def cell(found: schema.AtNorm | None) -> str:
        if found is None:
            return ""
        return f"{percent(found.shift.estimate)}, {percent(found.control.estimate)}: {words.beyond(found.difference)}"

    rows, norms = [], list(dict.fromkeys(norm for found in task.equal_norm.values() for norm in found))
    for direction, found in task.equal_norm.items():
        methods = dict.fromkeys(method for by_method in found.values() for method in by_method)
        rows += [
            [f"{method}, {TOWARDS[direction]}", *(cell(found.get(norm, {}).get(method)) for norm in norms), "", ""]
            for method in methods
        ]
        free = task.unpenalized.get(direction)
        if free:  # its norm may be one of another site, and another in each seed
            own = ", ".join(f"{strength:g}" for strength in free.strengths or [free.strength])
            rows.append(
                [f"{PAPERS}, {TOWARDS[direction]}, whatever its controls do", *[""] * len(norms), cell(free), own]
            )
    if not any(row[-1] for row in rows):
        rows = [row[:-2] for row in rows]
    columns = ["", *(f"norm {norm}" for norm in norms), "at a norm of its own", "which is"]
    title = "Test pairs steered at equal norms, strongest control: difference"
    return [Table(title, columns[: len(rows[0])], rows)] if rows else []


def _dose_panels(task: TaskResults, direction: Direction) -> list[Panel]:
    """Mean margin and share steered: the best method, the paper's, and Gaussian shifts of the norm of the best."""
    best = task.steering[direction].chosen.method
    lines: dict[str, list[Line]] = {}
    for method in dict.fromkeys((best, PAPERS)):
        for role, doses in task.dose.get(method, {}).get(direction, {}).items():
            if role != "vector" and method != best:
                continue
            x, tone = sorted(doses, key=float), TONE[direction] if method == best else INK
            looks: tuple[str, str, Any] = (method, tone, "-") if role == "vector" else ("Gaussian", OTHER, DASHED)
            for key in ("margin", "shift"):
                values = [getattr(doses[dose], key) for dose in x]
                lines.setdefault(key, []).append(Line(looks[0], [float(dose) for dose in x], values, *looks[1:]))
    axes: dict[str, dict[str, Any]] = {"margin": {"ylabel": "margin, nats", "chance": 0}, "shift": {"axis": "share"}}
    return [drawing.lines_panel(direction, found, "dose", **axes[key]) for key, found in lines.items()]


def other_ways(task: TaskResults, direction: Direction) -> dict[str, Estimate]:
    """What a user would try first: words, and decoding that contrasts a prompt with its question alone."""
    found = {"asking in words": task.prompt[direction]} if direction in task.prompt else {}
    contrasts = task.context_aware.get(direction, {}).items()
    found |= {f"contrastive decoding {float(w):+g} (two passes)": each for w, each in contrasts}
    return {name: each.shift for name, each in found.items() if each.shift.known}


def simpler_panel(task: TaskResults, direction: Direction) -> Panel:
    """The vector beside its strongest control, words and other decoding, on what is aimed at.

    Of pairs also a uniform push and a whole state put in, which are measured on these.
    """
    block, aim = task.steering[direction].for_aim(task.aim), task.aim
    found, control = {"the vector": getattr(block, aim).shift}, block.beside.get(aim)
    if control:
        found[words.control_names(control) if len(control.names) == 1 else "strongest control"] = control.shift
    found |= other_ways(task, direction)
    if aim != "pairs":
        return dots_panel(f"{direction}, test conflicts", drawing.against("the vector", found, TONE[direction]))
    found["same push to all"] = task.logit[direction].shift
    patched = [each.shift for by_layer in task.patch.get(direction, {}).values() for each in by_layer]
    bound = max((shift for shift in patched if shift.known), key=lambda shift: shift.estimate, default=None)
    found |= {"whole state put in": bound} if bound else {}
    return dots_panel(direction, drawing.against("the vector", found, TONE[direction]))


def _push_sentence(found: schema.Push, direction: Direction) -> str:
    """A vector that does no more than one push for all is a bias on the answers."""
    if not found.shift.known:
        return ""
    sure = "" if found.vector_minus_logit.sign else ", no sure difference"
    return (
        f"{CAPITAL[direction]}: the same {abs(found.push.estimate):.1f} nats for every pair steer "
        f"{percent(found.shift.estimate)}; the vector steers {words.beyond(found.vector_minus_logit)}{sure}."
    )
