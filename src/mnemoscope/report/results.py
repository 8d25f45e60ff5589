"""``results.json``: the numbers of a run, cell by cell and over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mnemoscope.report import behaviour, cost, detector, differ, holds, read, steer, where
from mnemoscope.report.records import Cell, Run
from mnemoscope.report.schema import (
    AIMS,
    AtNorm,
    CellResults,
    Chosen,
    Control,
    Halves,
    Learning,
    Result,
    Results,
    Shares,
    TaskResults,
)
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.processes import Map, in_order
from mnemoscope.statistics import Estimate, averaged, over_draws, over_seeds


def compute_results(run: Run, parallel: Map = in_order) -> Results:
    """The results of a run from its records; undefined numbers are NaN.

    Raises:
        InputError: cells of one label have the same seed or different layers, or their records contradict each other.
    """
    labels = run.by_label()
    for label, cells in labels.items():
        seeds, depths = [cell.seed for cell in cells], {cell.name: len(cell.contrast.nmd_LD) for cell in cells}
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{cells[0].folder.parent}: two cells of {label!r} have the same seed ({seeds})")
        if len(set(depths.values())) > 1:
            raise InputError(f"{cells[0].folder.parent}: cells of one name differ in their layers ({depths})")
    measured = iter(parallel(measure, [cell for cells in labels.values() for cell in cells]))
    tasks = {label: over_all(cells, list(islice(measured, len(cells)))) for label, cells in labels.items()}
    across = {"seeds": holds.measure_seeds(run), "transfer": holds.measure_transfer(run, run.probe_layers())}
    names = {name: str(run.study.get(name, "")) for name in ("study", "left_out")}
    return Results(**names, tasks=tasks, failed=run.failed, **across)


def to_json(results: Results) -> str:
    """The text of ``results.json``; NaN is written as the literal ``NaN``, which ``json.load`` gives back."""
    found = results.model_dump(by_alias=True, exclude_none=True)
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=True) + "\n"


@threadpool_limits.wrap(1)  # processes beside each other have a processor each, and rounding is the same in all
def measure(cell: Cell) -> CellResults:
    """The results of one cell."""
    return CellResults(
        training={key: cell.training_time.get(key, math.nan) for key in ("seconds", "steps")},
        behaviour=behaviour.measure_behaviour(cell),
        pairs=behaviour.measure_pairs(cell),
        contrast=differ.measure_contrast(cell.contrast),
        probe=read.measure_probes(cell),
        learning=read.measure_learning(cell),
        consistency={"halves": holds.measure_halves(cell)},
        **steer.measure_steering(cell),
        **where.measure_effects(cell),
        detection=detector.measure_detector(cell),
        no_detector=cell.no_detector if cell.detection is None and cell.no_detector else None,
        neutral=cost.measure_neutral(cell),
    )


def over_all(cells: Sequence[Cell], found: list[CellResults]) -> TaskResults:
    """One label over its seeds, from the results of each cell; the settings shown are the first seed's."""
    common = dict(merged(found))
    common["training"] = {key: [one.training[key] for one in found] for key in ("seconds", "steps")}
    sweep, aim = where.measure_sweep(cells), cells[0].chosen.get("aim", "pairs")
    task = TaskResults(
        **common,
        seeds=[cell.seed for cell in cells],
        aim=aim,
        memory_is_conflict=bool(cells[0].info["memory_is_conflict"]),
        weights=cells[0].info.get("weights"),
        sweep=sweep,
        by_layer=where.measure_layers(sweep, common["contrast"], aim),
        chosen_by_seed={str(cell.seed): {aim: cell.chosen[aim]["best"] for aim in AIMS} for cell in cells},
        per_seed={str(cell.seed): one for cell, one in zip(cells, found, strict=True)},
    )
    for direction in task.steering:
        if all(best["pairs"][direction] == best["conflict"][direction] for best in task.chosen_by_seed.values()):
            for part in (task, *found):
                part.steering[direction].best_conflict = None
    return task


def _not_averaged(values: Sequence[Result]) -> dict[str, Any]:
    """Fields of which a mean over seeds would be nothing that was tried or drawn."""
    first = values[0]
    if isinstance(first, AtNorm):
        strengths = sorted({one.strength for one in values if isinstance(one, AtNorm)})
        return {"top": first.top, "strength": first.strength, "strengths": strengths}
    if isinstance(first, Control):
        worst = {aim: [one.worst[aim] for one in values if isinstance(one, Control)] for aim in AIMS}
        return {"worst": {aim: max(draws, key=_shift_of) for aim, draws in worst.items()}}
    return {}


def _shift_of(draw: Shares) -> float:
    return float(np.nan_to_num(draw.shift.estimate, nan=-1))


def merged(values: Sequence[Any], together: Callable[[Sequence[Estimate]], Estimate] = over_seeds) -> Any:
    """One value for all seeds that have it, by its type: of settings the first, of lists of numbers the union.

    What is a range of draws in a seed stays one, and what chance gives keeps the ends of its distribution.
    """
    first = values[0]
    if isinstance(first, Estimate):
        return together(values)
    if isinstance(first, str):
        return first
    if isinstance(first, Chosen):
        return first.model_copy(update={"within_limits": all(one.within_limits for one in values)})
    if isinstance(first, Result):
        fields = {name: [getattr(part, name) for part in values] for name in type(first).model_fields}
        known = {name: [value for value in found if value is not None] for name, found in fields.items()}
        kind = over_draws if isinstance(first, (Halves, Learning)) else together
        found: dict[str, Any] = {name: merged(of_seeds, kind) if of_seeds else None for name, of_seeds in known.items()}
        return type(first).model_construct(**found | _not_averaged(values))
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        of = {key: [value[key] for value in values if key in value] for key in keys}
        return {key: merged(of[key], averaged if str(key).startswith("chance") else together) for key in keys}
    if isinstance(first, list):
        if all(isinstance(number, int) for value in values for number in value):
            return sorted({number for value in values for number in value})
        return [merged(parts, together) for parts in zip(*values, strict=True)]
    if isinstance(first, bool):
        return all(values)
    if isinstance(first, int):
        return sum(values)
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan
