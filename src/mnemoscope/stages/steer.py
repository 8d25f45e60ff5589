"""Choose steering vectors on the tune split and judge them, with their controls, on the test split."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, Batch, Scores, encode, mark_confabulations
from mnemoscope.cells import Cell, git_state
from mnemoscope.config import MethodName, SteeringConfig
from mnemoscope.directions import (
    ANSWERED,
    CONTROLS,
    SOURCE,
    TOWARD,
    Choice,
    Directions,
    Fit,
    Labels,
    Limits,
    Setting,
    Sources,
    TuneLists,
    control_draws,
    final,
    learned_together,
    ranked,
    share_of,
    shuffles,
    steered,
    with_prefixes,
)
from mnemoscope.models import Site, blocks_of
from mnemoscope.stages.common import Tell, cell_model, cell_task, save_bound, write_json, write_table
from mnemoscope.stages.lists import JudgedList, Records, judged_lists, sources_of, tune_lists

AIMS = {"pairs": "pairs", "conflict": "conflicts as drawn"}  # what a setting is chosen for: the list of that name
PARTS = len(AIMS) + 1  # of the stage's progress
JUDGED = 2_000_003  # added to the seed of controls on test
MAPPED = ("nmd",)  # methods whose whole sweep is measured on what should stay as it is too
CONFLICT_CONTROL, CONFLICT_COLLATERAL = 0.3, 0.1  # limits for conflicts as drawn: steering them takes larger norms

Row = dict[str, Any]
Tops = Mapping[tuple[str, str], float]  # by direction and method, the share of neurons where no other is to be tried
Placed = tuple[tuple[int, ...], pd.DataFrame]  # a table, and its place among all tables


@dataclass(frozen=True)
class _Chosen:
    """The setting that was chosen for an aim, a direction and a method; ``best``: no method gains more."""

    aim: str
    choice: Choice
    best: bool

    @property
    def setting(self) -> Setting:
        return self.choice.setting

    def draws(self, config: SteeringConfig, chosen: Sequence[_Chosen]) -> int:
        """Of each control on test; of conflicts only under the methods that are best for them or for pairs."""
        if self.aim == "pairs":
            return config.draws
        best = {(one.setting.direction, one.setting.method) for one in chosen if one.best}
        return config.conflict_draws if (self.setting.direction, self.setting.method) in best else 0


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune split, for pairs and for conflicts as drawn; judge them on the test split."""
    opened, config = _Opened(cell, {}, tell), cell.config.steering
    asked = list(product(TOWARD, config.sweeps))
    tell(0, PARTS, "fitting learned vectors")
    opened.fitted |= _fitted(opened, ((s, (ANSWERED,)) for key in asked for s in opened.settings(*key)))
    for_pairs, rows = _choose(opened, "pairs", {})
    # How many neurons a method takes is chosen once.
    tops = {(one.setting.direction, one.setting.method): one.setting.top for one in for_pairs}
    for_conflicts, more = _choose(opened, "conflict", tops)
    opened.forget_tune()  # the tune lists and their caches are gone before the test lists come
    chosen = [*for_pairs, *for_conflicts]
    tell(len(AIMS), PARTS, "fitting learned vectors to shuffled labels")
    drawn = ((one, four) for one in chosen for four in shuffles(one.draws(config, chosen), cell.seed + JUDGED))
    opened.fitted |= _fitted(opened, ((one.setting, four) for one, four in drawn))
    judged = cell.spread(partial(_judge_all, opened, chosen), asked)
    tables = [table for _, table in sorted(chain.from_iterable(judged), key=itemgetter(0))]
    rows = sorted(rows + more, key=lambda row: list(TOWARD).index(row["direction"]))
    return [
        write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)),
        write_table(cell.records / "sweep.parquet", pd.DataFrame(rows)),
        *_write_chosen(opened, chosen),
    ]


class _Opened:
    """What the parts of the stage work with, opened when it is first needed, and anew in another process.

    Attributes:
        fitted: the learned shifts so far.
    """

    def __init__(self, cell: Cell, fitted: dict[Fit, np.ndarray], tell: Tell = lambda *_: None) -> None:
        self.cell, self.fitted, self.tell = cell, fitted, tell

    def __reduce__(self) -> tuple[type[_Opened], tuple[Cell, dict[Fit, np.ndarray]]]:
        return _Opened, (self.cell, self.fitted)

    @cached_property
    def asking(self) -> Asking:
        return cell_model(self.cell)

    @cached_property
    def records(self) -> Records:
        return Records.of(self.cell)

    @cached_property
    def sources(self) -> dict[Site, Sources]:
        """By site."""
        sites = (s for grids in self.cell.config.steering.sweeps.values() for grid in grids for s in grid.sites)
        return sources_of(self.cell, self.asking, self.records, sites)

    @cached_property
    def tune(self) -> dict[str, dict[str, TuneLists]]:
        """By aim and direction."""
        return tune_lists(self.cell, self.asking, self.records)

    def forget_tune(self) -> None:
        self.__dict__.pop("tune", None)

    def begin_alike(self) -> float:
        """Share of the phrasings of fit pairs whose two answers begin with the same tokens."""
        pairs = self.records.both_sides("fit", self.cell.config.steering.fit_pairs)
        encoded = encode(self.asking, [example for pair in pairs for example in pair])
        return float(np.mean([one.shared > 0 for one in encoded]))

    def directions(self) -> dict[Site, Directions]:
        """By site; what is computed anew is forgotten with them."""
        return {site: Directions(sources, self.fitted) for site, sources in self.sources.items()}

    def settings(self, direction: str, method: MethodName) -> list[Setting]:
        """What is tried of a method."""
        return settings_of(self.cell.config.steering, direction, method, len(blocks_of(self.asking.model)))


def _fitted(opened: _Opened, wanted: Iterable[tuple[Setting, tuple[Labels, ...]]]) -> dict[Fit, np.ndarray]:
    """The learned shifts among those that are wanted, fitted in parallel."""
    fits = list(dict.fromkeys((s.same_direction()[0], several) for s, several in wanted if s.method == "learned"))
    return dict(chain.from_iterable(opened.cell.spread(partial(_fit_all, opened), fits)))


def _fit_all(opened: _Opened, fits: Sequence[tuple[Setting, tuple[Labels, ...]]]) -> list[list[tuple[Fit, np.ndarray]]]:
    return [
        list(zip(product([s], several), learned_together(opened.sources[s.site], s, several), strict=True))
        for s, several in fits
    ]


def _choose(opened: _Opened, aim: str, tops: Tops) -> tuple[list[_Chosen], list[Row]]:
    """A setting for each direction and method, and the rows of the sweep."""
    cell, directions, chosen = opened.cell, opened.directions(), list[_Chosen]()
    asked = list(product(TOWARD, cell.config.steering.sweeps))
    found = dict(zip(asked, cell.spread(partial(_rank_all, opened, aim, tops), asked), strict=True))
    for direction in TOWARD:
        mine = [choices for (d, _), (choices, _) in found.items() if d == direction]
        candidates, lists = chain.from_iterable(mine), opened.tune[aim][direction]
        best = final(lists, directions, candidates, _limits(cell, aim), [cell.seed, 1])
        for choices in mine:
            is_best = choices[0].setting.method == best.setting.method
            chosen.append(_Chosen(aim, best if is_best else choices[0], is_best))
    return chosen, [row for _, rows in found.values() for row in rows]


def _rank_all(
    opened: _Opened, aim: str, tops: Tops, asked: Sequence[tuple[str, MethodName]]
) -> list[tuple[list[Choice], list[Row]]]:
    """Of each direction and method: the settings, best first, and the rows of the sweep."""
    found, cell, directions = [], opened.cell, opened.directions()
    for done, (direction, method) in enumerate(asked):
        note = f"{direction}: choosing {method} for {AIMS[aim]} on tune"
        opened.tell(list(AIMS).index(aim) + done / len(asked), PARTS, note)
        rated, rows = [], []
        lists, of_pairs = (opened.tune[name][direction] for name in (aim, "pairs"))
        for setting in opened.settings(direction, method):
            if setting.top != tops.get((direction, method), setting.top):
                continue
            vector = directions[setting.site].vector(setting)
            scores = steered(opened.asking, lists.targets, vector)
            rated.append((setting, share_of(scores, setting.toward)))
            rows.append(_row(aim, setting, scores))
            for name, (batches, label) in lists.kept.items() if method in MAPPED else ():
                if aim == "pairs" or name not in of_pairs.kept:
                    rows.append(_row(name, setting, steered(opened.asking, batches, vector, margins=False), label))
        found.append((ranked(lists, directions, rated, _limits(cell, aim), [cell.seed, 1]), rows))
    return found


def _limits(cell: Cell, aim: str) -> Limits:
    config = cell.config.steering
    again, excess_cost = config.tune_draws_again, config.excess_cost
    if aim == "conflict":
        return Limits(CONFLICT_CONTROL, CONFLICT_COLLATERAL, refits=0, again=again, excess_cost=excess_cost)
    limits = config.control_limit, config.collateral_limit
    return Limits(*limits, refits=config.tune_refits, again=again, excess_cost=excess_cost)


def _row(name: str, setting: Setting, scores: Scores, label: str | None = None) -> Row:
    """A row of the sweep: what became of examples that a setting is to steer, or how many keep their label."""
    row = {"examples": name, "n": len(scores.behaviour_N), **_columns(setting)}
    row |= dict.fromkeys(("shift", "stay", "other", "kept", "margin", "margin_sd"), np.nan)
    if label is not None:
        return row | {"kept": share_of(scores, label)}
    shares = {"shift": setting.toward, "stay": SOURCE[setting.direction], "other": "other"}
    row |= {"margin": float(scores.margin_N.mean()), "margin_sd": float(scores.margin_N.std())}
    return row | {column: share_of(scores, behaviour) for column, behaviour in shares.items()}


def _judge_all(opened: _Opened, chosen: Sequence[_Chosen], asked: Sequence[tuple[str, str]]) -> list[list[Placed]]:
    """Of each direction and method: its tables of all lists, with their places among all tables."""
    config, directions = opened.cell.config.steering, opened.directions()
    found: dict[tuple[str, str], list[Placed]] = {one: [] for one in asked}
    for number, direction in enumerate(TOWARD):
        mine = [
            (place, one)
            for place, one in enumerate(chosen)
            if one.setting.direction == direction and (direction, one.setting.method) in found
        ]
        lists = judged_lists(opened.records, direction, config.judged_examples) if mine else {}
        for done, (name, entry) in enumerate(lists.items()):
            note = f"{direction}: {name} on test, vectors and controls"
            opened.tell(len(AIMS) + (number + done / len(lists)) / 2, PARTS, note)
            # One list at a time: the caches of a list's prompts are most of the memory that steering takes.
            batches = with_prefixes(opened.asking, entry.examples)
            for place, one in mine:
                if one.aim == "conflict" and name.startswith("pairs"):
                    continue
                draws = one.draws(config, chosen) if name == one.aim else 0
                judged = _judge(opened, directions[one.setting.site], one, entry, batches, draws)
                found[direction, one.setting.method] += [
                    ((number, done, place, n), _table(one, role, name, entry, scores))
                    for n, (role, scores) in enumerate(judged)
                ]
            del batches  # before the next list's are made
    return list(found.values())


def _judge(
    opened: _Opened, directions: Directions, one: _Chosen, entry: JudgedList, batches: Sequence[Batch], draws: int
) -> Iterator[tuple[tuple[str, int], Scores]]:
    """The scores of a vector on one list, then those of the draws of its controls, with role and draw."""
    cell, asking, setting = opened.cell, opened.asking, one.setting
    vector = directions.vector(setting)
    scores = steered(asking, batches, vector)
    has_format = getattr(cell_task(cell), "has_memorized_format", None)
    if has_format and entry.examples[0].kind == "conflict":
        applied = partial(vector.apply, asking.model)
        mark_confabulations(asking, entry.examples, scores, has_format, applied)
    yield ("vector", 0), scores
    for control in CONTROLS if draws else ():
        # Shuffles go by the first number, and those that settings were ranked by are to be no part of this.
        stream = zlib.crc32(f"{one.aim}/{setting.direction}/{setting.method}/{control}".encode())
        for number, shift_LD in control_draws(control, directions, setting, draws, [cell.seed + JUDGED, stream]):
            yield (control, number), steered(asking, batches, vector.with_dense(shift_LD), margins=False)


def _write_chosen(opened: _Opened, chosen: Sequence[_Chosen]) -> list[Path]:
    """Write the chosen vectors, bound to their model, and ``chosen.json``: what was chosen for what, and the best."""
    cell, asking, directions, files = opened.cell, opened.asking, opened.directions(), list[Path]()
    found: dict[str, Any] = {aim: {"best": {}, "methods": {}} for aim in AIMS}
    begin_alike = opened.begin_alike()
    for one in chosen:
        setting, site = one.setting, directions[one.setting.site]
        name = f"{setting.direction}-{setting.method}" + ("" if one.aim == "pairs" else f"-{one.aim}")
        bound = site.vector(setting).bound_to(asking.model, asking.tokenizer)
        commit = git_state()["commit"] or ""
        bound = replace(bound, task=cell.label, commit=commit, begin_alike=begin_alike, **asking.put)
        files += save_bound(cell.folder / "vectors", name, bound)
        facts = {name: getattr(setting, name) for name in ("method", "site", "positions", "top", "strength")}
        facts |= {"layers": list(setting.layers), "alpha": site.alpha(setting), "within_limits": one.choice.within}
        found[one.aim]["methods"].setdefault(setting.method, {})[setting.direction] = facts | {
            "begin_alike": begin_alike
        }
        if one.best:
            found[one.aim]["best"][setting.direction] = setting.method
    return [*files, write_json(cell.records / "chosen.json", found)]


def settings_of(config: SteeringConfig, direction: str, method: MethodName, count: int) -> list[Setting]:
    """Every combination of each grid of a method in a model of ``count`` layers, once.

    Raises:
        InputError: a sweep names a layer that the model does not have.
    """
    settings = (
        Setting(direction, method, site, layers, top, strength, config.positions)
        for grid in config.sweeps[method]
        for site, layers, top, strength in product(grid.sites, grid.layer_sets(count), grid.tops, grid.strengths)
    )
    return list(dict.fromkeys(settings))


def _columns(setting: Setting) -> Row:
    """A setting in the columns of the records; layers as ``0-3`` for a range, ``2`` for one, else between commas."""
    row = {name: getattr(setting, name) for name in ("direction", "method", "site", "layers", "top", "strength")}
    first, last = setting.layers[0], setting.layers[-1]
    if setting.layers == tuple(range(first, last + 1)):
        return row | {"layers": str(first) if first == last else f"{first}-{last}"}
    return row | {"layers": ",".join(map(str, setting.layers))}


def _table(one: _Chosen, role: tuple[str, int], name: str, entry: JudgedList, scores: Scores) -> pd.DataFrame:
    """One row per steered test example."""
    columns: Row = {"aim": one.aim, **_columns(one.setting), "role": role[0], "draw": role[1], "examples": name}
    columns |= {"example": np.arange(len(entry.examples)), "split": "test", "before": entry.before}
    columns |= {key: [getattr(example, key) for example in entry.examples] for key in ("group", "family")}
    columns |= {"after": scores.behaviour_N, "margin_before": entry.margin_N, "margin": scores.margin_N}
    table = pd.DataFrame(columns | {"confabulated": scores.confabulated_N})
    words = ("aim", "direction", "method", "site", "layers", "role", "examples", "split", "before", "group", "family")
    return table.astype({word: "str" for word in (*words, "after")})
