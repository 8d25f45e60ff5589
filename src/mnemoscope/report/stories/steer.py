"""Can it be steered, in numbers: every method beside its controls; ``steer_page`` shows them.

Each method has two settings, chosen on the tune split: one for pairs, and one, with the same share of neurons, for
conflicts as they are drawn: pairs are among them, but most lie further from the tipping point. ``pairs`` and its
controls are judged under the first, ``conflict`` and its own under the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.records import Cell
from mnemoscope.report.rows import Over, Part, each_once, first_of, scalar, shares
from mnemoscope.report.stories.cost import measure_kept
from mnemoscope.report.stories.detector import measure_gated, recall_by_family
from mnemoscope.report.words import AIMS, CONTROLS, DIRECTIONS, Aim, Direction
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import Estimate, mean, proportion, surely_more

KEYS = ["aim", "direction", "method", "role", "examples"]
Rows = Callable[[str, str, str], pd.DataFrame]  # of one method in one direction, by aim, role and list of examples


def measure(cell: Cell) -> dict[str, Any]:
    """Every method in every direction, the best one of each by the tune split, at equal norms, and a uniform push."""
    table: Any = cell.read_steering()
    places, lists = table.groupby(KEYS, observed=True).indices, sorted(table.examples.unique())
    best = {aim: cell.chosen[aim]["best"] for aim in AIMS}

    def rows_of(method: str, direction: Direction) -> Rows:
        return lambda aim, role, examples: table.iloc[places.get((aim, direction, method, role, examples), [])]

    by_method = {
        m: {d: measure_direction(cell, (m, d), lists, rows_of(m, d)) for d in DIRECTIONS}
        for m in sorted(cell.chosen["pairs"]["methods"])
    }
    equal_norm: dict[Direction, dict[str, dict[str, Any]]] = {direction: {} for direction in DIRECTIONS}
    compared = table[table.aim == "equal_norm"].groupby(["direction", "method", "strength"], observed=True)
    for (direction, method, strength), rows in compared:
        equal_norm[direction].setdefault(f"{strength:g}", {})[method] = _at_norm(cell, rows, direction)
    free = table[table.aim == "unpenalized"].groupby("direction", observed=True)
    return {
        "steering": {
            d: by_method[best["pairs"][d]][d] | {"best_conflict": by_method[best["conflict"][d]][d]} for d in DIRECTIONS
        },
        "steering_by_method": by_method,
        "equal_norm": equal_norm,
        "unpenalized": {direction: _at_norm(cell, rows, direction) for direction, rows in free},
        "logit": {d: _push(best["pairs"][d], rows_of(best["pairs"][d], d), d) for d in DIRECTIONS},
    }


def _at_norm(cell: Cell, rows: pd.DataFrame, direction: Direction) -> dict[str, Any]:
    """A setting beside the control that steers most of all that were drawn."""
    parts = {str(role): part for role, part in rows.groupby("role", observed=True)}
    shifts = {role: shares(part, direction, confabulated=False)["shift"] for role, part in parts.items()}
    shift, vector = shifts.pop("vector"), parts["vector"]
    strongest = max(shifts, key=lambda name: shifts[name].estimate, default="")
    setting = {key: scalar(rows[key].iloc[0]) for key in ("site", "layers", "top", "strength")}
    return setting | {
        "top": Over(first_of, setting["top"]),
        "strength": Over(first_of, setting["strength"]),
        "strengths": Over(each_once, [setting["strength"]]),
        "shift": shift,
        "control": shifts.get(strongest, Estimate.undefined()),
        "strongest": strongest,
        "difference": mean(*beyond(cell, vector, parts.get(strongest, vector.head(0)), direction)),
    }


def _setting(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The first seed's, within the limits where all are."""
    return settings[0] | {"within_limits": all(one["within_limits"] for one in settings)}


def _most(draws: list[dict[str, Estimate]]) -> dict[str, Estimate]:
    """The draw that shifts most."""
    return max(draws, key=lambda draw: float(np.nan_to_num(draw["shift"].estimate, nan=-1)))


def measure_direction(cell: Cell, of: tuple[str, Direction], lists: list[str], rows: Rows) -> dict[str, Any]:
    """One method in one direction, under its settings by aim: shifts, controls, what is left of them, collateral."""
    method, direction = of
    chosen = {aim: cell.chosen[aim]["methods"][method][direction] for aim in AIMS}

    def measured(aim: str, name: str) -> dict[str, Estimate]:
        return shares(rows(aim, "vector", name), direction)

    of_controls = {name: _control(cell, name, direction, rows) for name in CONTROLS}
    controls = {name: found for name, (found, _) in of_controls.items()}
    minus = {name: difference for name, (_, difference) in of_controls.items()}
    held_out = [name for name in lists if name.startswith("pairs_") and name != "pairs_unreachable"]
    kept = {
        aim: measure_kept(cell, direction, {n: rows(aim, "vector", n) for n in ("memory", "novel", "conflict_rest")})
        for aim in AIMS
    }
    pairs = measured("pairs", "pairs")
    of_lists = {name: rows("pairs", "vector", name) for name in lists}
    of_test = {name: of[of.split == "test"] for name, of in of_lists.items()}  # of few groups tune is judged as well
    return {
        "chosen": Over(_setting, chosen["pairs"]),
        "chosen_conflict": Over(_setting, chosen["conflict"]),
        "pairs": pairs,
        "conflict": measured("conflict", "conflict"),
        "confabulated": pairs["confabulated"],
        "pairs_unreachable": measured("pairs", "pairs_unreachable"),
        "held_out": {name.removeprefix("pairs_"): measured("pairs", name) for name in held_out},
        "conflict_at_chosen": measured("pairs", "conflict"),
        "controls": controls,
        "minus_control": minus,
        "beside": {aim: one for aim in AIMS if (one := _strongest(controls, minus, aim))},
        "collateral": kept["pairs"][0],
        "collateral_conflict": kept["conflict"][0],
        "lost_right": {aim: kept[aim][1] for aim in AIMS},
        "recall_by_family": recall_by_family(cell, rows("pairs", "vector", "memory")),
        "gated": measure_gated(cell, direction, of_test),
    }


def _control(cell: Cell, name: str, direction: Direction, rows: Rows) -> tuple[dict[str, Any], dict[Aim, Estimate]]:
    """By aim all draws of a control pooled, the draw that shifts most, and what the vector does beyond it."""
    found: dict[str, Any] = {**dict.fromkeys(AIMS), "draws": {}, "exceeded": {}, "worst": {}}
    minus: dict[Aim, Estimate] = {}
    for aim in AIMS:
        drawn = rows(aim, name, aim)
        more = beyond(cell, rows(aim, "vector", aim), drawn, direction)
        by_draw = (drawn.after == Toward.of(direction)).groupby(drawn.draw).mean()
        worst = drawn[drawn.draw == by_draw.idxmax()] if len(by_draw) else drawn
        found[aim] = shares(drawn, direction, confabulated=False)
        found["draws"][aim] = len(by_draw)
        found["exceeded"][aim] = surely_more(*more)
        found["worst"][aim] = Over(_most, shares(worst, direction, confabulated=False))
        minus[aim] = mean(*more)
    return found, minus


def _strongest(controls: dict[str, Any], minus: dict[str, dict[Aim, Estimate]], aim: Aim) -> dict[str, Any] | None:
    """The control that steers most of those that were drawn; None without any."""
    drawn = {name: one[aim]["shift"] for name, one in controls.items() if one[aim]["shift"].known}
    if not drawn:
        return None
    name = max(drawn, key=lambda name: drawn[name].estimate)
    exceeded = all(controls[one]["exceeded"][aim] for one in drawn)
    return {"shift": drawn[name], "difference": minus[name][aim], "names": {name: 1}, "exceeded": exceeded}


def beyond(
    cell: Cell, vector: pd.DataFrame, control: pd.DataFrame, direction: Direction
) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Hit of the vector minus hit of a control's draw, for each example and draw, with their groups and draws."""
    target = Toward.of(direction)
    if not vector.empty and not control.empty and set(vector.example) != set(control.example):
        raise InputError(
            f"{cell.folder / 'records' / 'steering.parquet'}: {direction}, {vector.examples.iloc[0]}: the vector and "
            f"the control {control.role.iloc[0]!r} were not tried on the same examples"
        )
    control = control if len(vector) else control.head(0)
    hit = (vector.after == target).astype(np.float64).set_axis(vector.example)
    return control.example.map(hit) - (control.after == target), control.group, control.draw


def _push(method: str, of: Rows, direction: Direction) -> dict[str, Any]:
    """What the vector's mean effect on the margin would shift if every pair got exactly that push, whatever it asks.

    A shift that moves all margins alike is no more than a bias on the two answers.
    """
    sign = 1 if direction == "to_generalized" else -1
    rows = of("pairs", "vector", "pairs")
    effect = rows.margin - rows.margin_before
    # Whether the target's answer is the likelier one; NaN where that is not known.
    margins = (rows.margin_before + effect.mean(), rows.margin)
    pushed, shifted = ((sign * margin > 0).astype(float).where(margin.notna()) for margin in margins)
    return {
        "method": method,
        "push": mean(effect, rows.group),
        "shift": proportion(pushed, rows.group),
        "vector": proportion(shifted, rows.group),
        "vector_minus_logit": mean(shifted - pushed, rows.group),
    }


def other_ways(task: Part, direction: Direction) -> dict[str, Estimate]:
    """What a user would try first: words, and decoding that contrasts a prompt with its question alone."""
    found = {"asking in words": task.prompt[direction]} if direction in task.prompt else {}
    contrasts = task.context_aware.get(direction, {}).items()
    found |= {f"contrastive decoding {float(w):+g} (two passes)": each for w, each in contrasts}
    return {name: each.shift for name, each in found.items() if each.shift.known}
