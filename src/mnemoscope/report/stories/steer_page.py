"""Can it be steered: the vector beside its controls, every method, doses, and simpler ways."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from mnemoscope.report import drawing, words
from mnemoscope.report.drawing import DASHED, INK, OTHER, TONE, Dot, Line, Panel, dots_panel
from mnemoscope.report.page import TOO_FEW, Answer, Chapter, Exhibit, Table, View, not_measured
from mnemoscope.report.rows import Part
from mnemoscope.report.stories.steer import other_ways
from mnemoscope.report.stories.where import PAPERS
from mnemoscope.report.summary import NAMES, VECTORS, of_direction
from mnemoscope.report.words import AIMS, CONTROLS, LISTS, NBSP, Aim, Direction, changes, for_aim, percent, ranged

MARKERS = dict(zip(CONTROLS, ("o", "v", "s", "^", "P", "*", "D"), strict=True))


def chapter(view: View) -> Chapter:
    """The vector beside its controls, methods, doses, simpler ways."""
    task, steering = view.task, view.task.steering
    if not any(block[aim].shift.known for block in steering.values() for aim in AIMS):
        return Chapter(answer(task))
    pushes = [_push_sentence(task.logit[d], words.TOWARDS[task.documents][d]) for d in steering]
    anchors: dict[Aim, str] = {"pairs": "methods", "conflict": "methods-conflict"}
    by_aim = {aim: (anchor, [_methods_panel(task, d, aim) for d in steering]) for aim, anchor in anchors.items()}
    shown, folded = by_aim.pop(task.aim), by_aim.popitem()[1]
    exhibits = [
        Exhibit("switch", [_switch_panel(task, direction) for direction in steering]),
        Exhibit(*shown, table=methods_table(task)),
        Exhibit("dose", [panel for d in steering for panel in _dose_panels(task, d)]),
        Exhibit("simpler", [simpler_panel(task, direction) for direction in steering], pushes),
        Exhibit(*folded, folded=True),
    ]
    return Chapter(answer(task), exhibits, [table(task), *norms_table(task)])


def answer(task: Part) -> Answer:
    """The verdict on both directions, and each with its number."""
    question, aim = "Can it be steered?", task.aim
    steering = {direction: for_aim(block, aim) for direction, block in task.steering.items()}
    shifts = {d: share for d, block in steering.items() if (share := block[aim].shift).known}
    if not shifts:
        return not_measured("steer", question, task)
    to, of = words.TOWARDS[task.documents], "test pairs" if aim == "pairs" else "test conflicts"
    briefs = {d: of_direction(task, d) for d in shifts} if task.get("levers") else {}
    works = [d for d in shifts if _surely_steers(task, steering[d].beside.get(aim))]
    if briefs:
        works = [d for d, brief in briefs.items() if brief.verdict.startswith("works")]
    found = dict[Direction, Answer]()
    for d, share in shifts.items():
        control, loss = steering[d].beside.get(aim), words.largest_loss(changes(steering[d], aim), d)
        beside = f"strongest control: {words.strongest_control(steering[d], aim)}"
        mark = (control.shift.estimate, "strongest control") if control else (math.nan, "")
        by, lever = "", briefs[d].lever if briefs else "shift"
        if lever not in VECTORS:
            best, by, mark = briefs[d].levers[lever], f" by {NAMES.get(lever, lever)}", (math.nan, "")
            beside, loss = f"{percent(share.estimate)} by the best vector", percent(best.lost.estimate)
            share = best.shift
        note = f"95{NBSP}% interval: {words.interval(share)}. Largest loss: {loss}."
        sentence = f"of {of} are steered {to[d]}{by}; {beside}."
        found[d] = Answer("steer", question, "", percent(share.estimate), sentence, note, share, mark)
    verdict = "Steering does not surely work"
    if works:
        where = "in both directions" if len(works) == 2 else to[works[0]]
        in_part = any(one.share.estimate < 0.5 for d, one in found.items() if d in works and one.share)
        verdict = f"Steering works{' in part,' if in_part else ''} {where}"
    if all(share.too_few for share in shifts.values()):
        verdict = TOO_FEW
    first, *others = found.values()
    return replace(first, verdict=verdict, others=others)


def _surely_steers(task: Part, beside: Part | None) -> bool:
    """Whether a vector does surely more than its controls.

    That is, than any other draw of each, in every seed, as an interval over a few seeds says little; or over the seeds
    than the one that steers most in each.
    """
    if beside is None:
        return False
    return bool(beside.exceeded) or (len(task.seeds) > 1 and beside.difference.sign > 0)


def _switch_panel(task: Part, direction: Direction) -> Panel:
    """The vector, then its controls, on pairs and on any conflict: shift, and the share that gives neither answer."""
    block, seeds, dots = task.steering[direction], [seed.steering[direction] for seed in task.per_seed.values()], []
    for aim in AIMS:
        found = block[aim]
        single = [(".", seed[aim].shift.estimate) for seed in seeds] if len(seeds) > 1 else []
        beside = (("x", found.other.estimate), *single)
        dots.append(Dot(LISTS[aim].capitalize(), found.shift, TONE[direction], beside=beside))
        for name, control in block.controls.items():
            found, worst = control[aim], control.worst[aim].shift.estimate
            row = Dot(words.CONTROLS[name], found.shift, OTHER, True, worst, (("x", found.other.estimate),))
            dots += [row] if found.shift.known else []
    several = [("single seeds", ".")] if len(seeds) > 1 else []
    return dots_panel(direction, dots, legend=[("neither answer", "x"), ("worst draw", "|"), *several])


def table(task: Part) -> Table:
    """The best vector and its controls: what was steered, what was not, with intervals."""
    rows, to = [], words.TOWARDS[task.documents]
    for (direction, block), aim in product(task.steering.items(), AIMS):
        found = {"vector": (block[aim], "")}
        for name, control in block.controls.items():
            found[words.CONTROLS[name]] = (control[aim], percent(control.worst[aim].shift.estimate))
        for who, (each, worst) in found.items():
            numbers = [ranged(share) for share in (each.shift, each.stay, each.other)]
            what = f"{to[direction].capitalize()}, {LISTS[aim]}: {who}"
            rows.append([what, *numbers, worst, f"{each.shift.n:,}"])
    return Table("Steering, test split", ["", "steered", "unmoved", "neither", "worst draw", "answers"], rows)


def _methods_panel(task: Part, direction: Direction, aim: Aim) -> Panel:
    """Each method's shift as a dot, its five controls as small marks, the worst draw of any as a tick."""
    dots = []
    for method, blocks in task.steering_by_method.items():
        block = blocks[direction]
        worst = [control.worst[aim].shift for control in block.controls.values()]
        mark = max((share.estimate for share in worst if share.known), default=math.nan)
        marks = tuple((MARKERS[name], c[aim].shift.estimate) for name, c in block.controls.items())
        dots.append(Dot(method, block[aim].shift, TONE[direction], mark=mark, beside=marks))
    dots.sort(key=lambda dot: -np.nan_to_num(dot.value.estimate, nan=-1))
    legend = [(words.CONTROLS[name], marker) for name, marker in MARKERS.items()]
    return dots_panel(direction, dots, legend=[*legend, ("worst draw of any", "|")])


def methods_table(task: Part) -> Table:
    """The setting of each method, what it steers, its strongest control and its largest loss; then other ways."""
    rows, to = [], words.TOWARDS[task.documents]
    for direction in task.steering:
        for method, blocks in task.steering_by_method.items():
            block = blocks[direction]
            chosen, shift = block.chosen, block.pairs.shift
            best = " (chosen)" if method == task.steering[direction].chosen.method else ""
            alpha = "" if math.isnan(chosen.alpha) else f", alpha{NBSP}{chosen.alpha:.2g}"
            where = f"{chosen.site}, {words.layers(chosen.layers)}, {100 * chosen.top:g}{NBSP}% of neurons"
            strength = f"{chosen.strength:g}{alpha}{'' if chosen.within_limits else ' (beyond the limits)'}"
            row = [f"{method}, {to[direction]}{best}", where, strength, ranged(shift), f"{shift.n:,}"]
            row += [words.strongest_control(block), ranged(block.conflict.shift)]
            rows.append([*row, words.largest_loss(block.collateral, direction)])
        for way, shift in other_ways(task, direction).items():
            of_pairs, of_conflicts = (ranged(shift), "") if task.aim == "pairs" else ("", ranged(shift))
            n = f"{shift.n:,}" if of_pairs else ""
            rows.append([f"{way}, {to[direction]}", "", "", of_pairs, n, "", of_conflicts, ""])
    columns = ["", "where", "strength", "pairs steered", "N", "strongest control", "conflicts steered", "largest loss"]
    return Table("Settings chosen on the tune split, and what they do on the test split", columns, rows)


def norms_table(task: Part) -> list[Table]:
    """All methods at equal norms: what each steers, its strongest control, and the difference; [] where left out."""
    norms = list(dict.fromkeys(norm for found in task.equal_norm.values() for norm in found))
    columns, rows = ["", *(f"norm {norm}" for norm in norms), "at a norm of its own", "which is"], []
    to = words.TOWARDS[task.documents]
    for direction, found in task.equal_norm.items():
        for method in dict.fromkeys(method for by_method in found.values() for method in by_method):
            at_norms = [_at_norm_in_words(found.get(norm, {}).get(method)) for norm in norms]
            rows.append([f"{method}, {to[direction]}", *at_norms, "", ""])
        if free := task.unpenalized.get(direction):  # its norm may be one of another site, and another in each seed
            own = ", ".join(f"{strength:g}" for strength in free.strengths)
            heading = f"{PAPERS}, {to[direction]}, whatever its controls do"
            rows.append([heading, *[""] * len(norms), _at_norm_in_words(free), own])
    last = None if any(row[-1] for row in rows) else -2
    title = "Test pairs steered at equal norms, strongest control: difference"
    return [Table(title, columns[:last], [row[:last] for row in rows])] if rows else []


def _at_norm_in_words(found: Part | None) -> str:
    if found is None:
        return ""
    return f"{percent(found.shift.estimate)}, {percent(found.control.estimate)}: {words.beyond(found.difference)}"


def _dose_panels(task: Part, direction: Direction) -> list[Panel]:
    """Mean margin and share steered: the best method, the paper's, and Gaussian shifts of the norm of the best."""
    best = task.steering[direction].chosen.method
    looks: dict[tuple[str, str], tuple[str, str, Any]] = {
        (PAPERS, "vector"): (PAPERS, INK, "-"),
        (best, "vector"): (best, TONE[direction], "-"),
        (best, "gaussian"): ("Gaussian", OTHER, DASHED),
    }
    lines: dict[str, list[Line]] = {}
    for method in dict.fromkeys((best, PAPERS)):
        for role, doses in task.dose.get(method, {}).get(direction, {}).items():
            if look := looks.get((method, role)):
                x = sorted(doses, key=float)
                for key in ("margin", "shift"):
                    values = [doses[dose][key] for dose in x]
                    lines.setdefault(key, []).append(Line(look[0], list(map(float, x)), values, *look[1:]))
    axes: dict[str, dict[str, Any]] = {"margin": {"ylabel": "margin, nats", "chance": 0}, "shift": {"axis": "share"}}
    return [drawing.lines_panel(direction, found, "dose", **axes[key]) for key, found in lines.items()]


def simpler_panel(task: Part, direction: Direction) -> Panel:
    """The vector beside its strongest control, words and other decoding, on what is aimed at.

    Of pairs also a uniform push and a whole state put in, which are measured on these.
    """
    block, aim = for_aim(task.steering[direction], task.aim), task.aim
    found, control = {"the vector": block[aim].shift}, block.beside.get(aim)
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


def _push_sentence(found: Part, towards: str) -> str:
    """A vector that does no more than one push for all is a bias on the answers."""
    if not found.shift.known:
        return ""
    sure = "" if found.vector_minus_logit.sign else ", no sure difference"
    return (
        f"{towards.capitalize()}: the same {abs(found.push.estimate):.1f} nats for every pair steer "
        f"{percent(found.shift.estimate)}; the vector steers {words.beyond(found.vector_minus_logit)}{sure}."
    )
