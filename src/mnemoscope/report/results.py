"""``results.json``: the numbers of a run, cell by cell and over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mnemoscope.errors import InputError
from mnemoscope.processes import Map, in_order
from mnemoscope.report.intervals import Tree
from mnemoscope.report.measures import measure
from mnemoscope.report.measures_across import measure_seeds, measure_transfer
from mnemoscope.report.measures_detection import statements
from mnemoscope.report.measures_sweep import measure_layers, measure_sweep
from mnemoscope.report.records import AIMS, Cell, Run
from mnemoscope.statistics import Estimate, over_seeds

SCHEMA = 1


def compute_results(run: Run, parallel: Map = in_order) -> Tree:
    """What ``results.json`` holds: plain dictionaries, lists, text and numbers; undefined numbers are NaN."""
    labels = run.by_label()
    for cells in labels.values():
        _check_alike(cells)
    trees = iter(parallel(_measured, [cell for cells in labels.values() for cell in cells]))
    tasks = {label: _summarised(cells, list(islice(trees, len(cells)))) for label, cells in labels.items()}
    results = {"schema": SCHEMA, "study": str(run.study.get("study", "")), "tasks": tasks, "failed": run.failed}
    return dict(_plain({**results, "seeds": measure_seeds(run), "transfer": measure_transfer(run, run.probe_layers())}))


def to_json(results: Tree) -> str:
    """The text of ``results.json``; NaN is written as the literal ``NaN``, which ``json.load`` gives back."""
    return json.dumps(results, indent=1, ensure_ascii=False, allow_nan=True) + "\n"


def _check_alike(cells: Sequence[Cell]) -> None:
    """Raises InputError where two cells of a task have the same seed, or differ in their layers."""
    seeds = [cell.seed for cell in cells]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{cells[0].folder.parent}: two cells of {cells[0].label!r} have the same seed ({seeds})")
    depths = {cell.name: len(cell.contrast.nmd) for cell in cells}
    if len(set(depths.values())) > 1:
        raise InputError(f"{cells[0].folder.parent}: cells of one name differ in their layers ({depths})")


def _measured(cell: Cell) -> Tree:
    with threadpool_limits(1):  # processes beside each other have a processor each, and rounding is the same in all
        return measure(cell)


def _summarised(cells: Sequence[Cell], trees: list[Tree]) -> Tree:
    """One task over its seeds: estimates by ``over_seeds``, counts added up, other numbers averaged.

    The chosen settings shown are the first seed's; ``chosen_by_seed`` names the methods, ``per_seed`` has the settings.

    Args:
        trees: what was measured of each cell.
    """
    merged: Tree = {"seeds": [cell.seed for cell in cells], **_merge(trees, "")}
    merged["probe"] |= statements(merged["probe"])  # words of the first seed say nothing about all
    merged["training"] = {key: [tree["training"][key] for tree in trees] for key in ("seconds", "steps")}
    merged["memory_is_conflict"] = bool(cells[0].info["memory_is_conflict"])
    if "weights" in cells[0].info:
        merged["weights"] = cells[0].info["weights"]
    merged["sweep"] = measure_sweep(cells)
    merged["by_layer"] = measure_layers(merged["sweep"], merged["contrast"])
    merged["chosen_by_seed"] = {str(cell.seed): {aim: cell.chosen[aim]["best"] for aim in AIMS} for cell in cells}
    merged["per_seed"] = {str(cell.seed): tree for cell, tree in zip(cells, trees, strict=True)}
    for tree in (merged, *trees):
        _drop_same(tree["steering"], merged["chosen_by_seed"])
    return merged


def _drop_same(steering: Tree, chosen_by_seed: Tree) -> None:
    """Leave ``best_conflict`` only where some seed turns conflicts best with another method than pairs."""
    for direction, block in steering.items():
        if all(best["pairs"][direction] == best["conflict"][direction] for best in chosen_by_seed.values()):
            del block["best_conflict"]


def _merge(values: list[Any], key: str) -> Any:
    """One value for all seeds, by its type; settings and layers are the first seed's."""
    first = values[0]
    if isinstance(first, Estimate):
        return over_seeds(values)
    if key in ("chosen", "chosen_conflict", "layers") or isinstance(first, str):
        return first
    if key == "worst":  # of all seeds, not their mean: by list, the draw that turned most
        aims = dict.fromkeys(aim for value in values for aim in value)
        return {aim: max((value[aim] for value in values if aim in value), key=_turned) for aim in aims}
    if key in ("picked", "offsets"):
        return sorted({number for value in values for number in value})
    if isinstance(first, dict):
        keys = dict.fromkeys(name for value in values for name in value)
        return {name: _merge([value[name] for value in values if name in value], name) for name in keys}
    if isinstance(first, list):
        return [_merge(list(parts), key) for parts in zip(*values, strict=True)]
    if isinstance(first, int):
        return sum(values)
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _turned(shares: Tree) -> float:
    shift = float(shares["shift"].estimate)
    return -1.0 if np.isnan(shift) else shift


def _plain(value: Any) -> Any:
    """Estimates as dictionaries, numpy numbers as Python's."""
    if isinstance(value, Estimate):
        return {
            "estimate": float(value.estimate),
            "low": float(value.low),
            "high": float(value.high),
            "n": int(value.n),
        }
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value
