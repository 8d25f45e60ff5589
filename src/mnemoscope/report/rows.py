"""Estimates are rows: what the stories measure of each cell and over its seeds; ``results.json`` is a view of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mnemoscope.report.words import CONTROLS, DIRECTIONS, LISTS, Direction
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import Estimate, averaged, group_index, over_draws, over_seeds, proportion

ESTIMATE = {field.name for field in fields(Estimate)}
# Of the long table, beside the measure.
COLUMNS: dict[str, Collection[str]] = {"list": LISTS, "toward": DIRECTIONS, "role": CONTROLS}
Place = tuple[str | int, ...]
Together = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Over:
    """A value, and what becomes of it over several seeds where that is not the rule for its type."""

    together: Together
    value: Any


class Row(NamedTuple):
    """An estimate, or a count, a number or a name that belongs to it, at its ``place`` in ``results.json``."""

    task: str  # empty: of the whole run
    seed: int | None  # None: over all seeds
    place: Place
    value: Any
    together: Together  # the value of all seeds from those of each


def first_of(values: list[Any]) -> Any:
    """The first seed's."""
    return values[0]


def each_once(values: list[list[Any]]) -> list[Any]:
    """What any seed has, sorted."""
    return sorted(set(chain(*values)))


def mean_of_known(values: list[float]) -> float:
    """The mean of what is not NaN; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


RULES: dict[type, Together] = {Estimate: over_seeds, float: mean_of_known, int: sum, bool: all, str: first_of}
RULES |= {list: each_once, dict: first_of}


def drawn(tree: Any) -> Any:
    """The same, whose estimates are ranges of draws: over seeds they stay that, and what chance gives is averaged."""
    if isinstance(tree, dict):
        return {
            key: Over(averaged, part) if str(key).startswith("chance") else drawn(part) for key, part in tree.items()
        }
    if isinstance(tree, list):
        return [drawn(part) for part in tree]
    return Over(over_draws, tree) if isinstance(tree, Estimate) else tree


def rows_of(tree: Any, task: str = "", seed: int | None = None, place: Place = ()) -> Iterator[Row]:
    """A row for each value of what a story measured: dictionaries and lists within each other; None is left out."""
    if isinstance(tree, Over):
        yield Row(task, seed, place, tree.value, tree.together)
    elif isinstance(tree, dict) and tree:
        for key, part in tree.items():
            yield from rows_of(part, task, seed, (*place, key))
    elif isinstance(tree, list) and not all(type(one) is int for one in tree):  # a list of integers is one value
        for number, part in enumerate(tree):
            yield from rows_of(part, task, seed, (*place, number))
    elif tree is not None:
        yield Row(task, seed, place, tree, RULES[type(tree)])


def over_all(seeds: Iterable[Sequence[Row]]) -> list[Row]:
    """One row over all seeds for each place that any of them has."""
    by_place: dict[Place, list[Row]] = {}
    for row in chain(*seeds):
        by_place.setdefault(row.place, []).append(row)
    of_each = ((rows[0], [row.value for row in rows]) for rows in by_place.values())
    return [row._replace(seed=None, value=row.together(values)) for row, values in of_each]


class Part(dict[str, Any]):
    """A part of ``results.json``, whose entries are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"results: no {name!r} among {', '.join(map(str, self)) or 'nothing'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def parts_of(tree: Any) -> Any:
    """Plain data as ``Part``, with an ``Estimate`` where one is written; TypeError where it holds something else."""
    if isinstance(tree, list):
        return [parts_of(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if {"estimate", "low", "high", "n"} <= tree.keys() <= ESTIMATE:
        if not all(isinstance(number, int | float) for number in tree.values()):
            raise TypeError(f"results: {tree} is no estimate")
        return Estimate(**tree)
    if tree and all(type(key) is int for key in tree):
        return [parts_of(part) for part in tree.values()]
    return Part({key: parts_of(part) for key, part in tree.items()})


def view(rows: Iterable[Row]) -> Part:
    """The content of ``results.json``."""
    tree: dict[str | int, Any] = {}
    for row in rows:
        of_seed = () if row.seed is None else ("per_seed", str(row.seed))
        of_task = ("tasks", row.task, *of_seed) if row.task else ()
        way: Place = (*of_task, *row.place)
        at = tree
        for key in way[:-1]:
            at = at.setdefault(key, {})
        at.setdefault(way[-1], row.value)
    return parts_of(tree)


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """The long table of all estimates: task, seed, measure, list, toward, role, estimate, low, high, n, groups."""
    found = []
    for row in (one for whole in rows for one in rows_of(whole.value, whole.task, whole.seed, whole.place)):
        if isinstance(row.value, Estimate):
            of = {column: next((k for k in row.place if k in names), "") for column, names in COLUMNS.items()}
            measure = ".".join(str(key) for key in row.place if key not in of.values())
            found.append({"task": row.task, "seed": row.seed, "measure": measure, **of, **asdict(row.value)})
    return pd.DataFrame(found)


def to_json(found: Any) -> str:
    """The text of results; NaN is written as the literal ``NaN``, which ``json.load`` gives back."""
    return json.dumps(found, indent=1, ensure_ascii=False, default=asdict) + "\n"


def scalar(value: Any) -> Any:
    """A value of a table as plain data."""
    return value.item() if isinstance(value, np.generic) else value


def shares(rows: pd.DataFrame, direction: Direction, *, confabulated: bool = True) -> dict[str, Estimate]:
    """Shares of steered examples that answer with the target behaviour, keep the source's, or do neither.

    By group, and by draw where a control has several.
    """
    target = Toward.of(direction)
    groups, draws = group_index(rows.group, len(rows)), rows.draw if "draw" in rows else None  # names are sorted once
    answers = {"shift": target, "stay": target.opposite, "other": "other"}
    found = {key: proportion(rows.after == after, groups, draws) for key, after in answers.items()}
    if confabulated and "confabulated" in rows:
        found["confabulated"] = proportion(rows.confabulated, groups, draws)
    return found
