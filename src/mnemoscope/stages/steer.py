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
from mnemoscope.models import blocks_of
from mnemoscope.stages.common import Tell, cell_model, cell_task, save_bound, write_json, write_table
from mnemoscope.stages.lists import JudgedList, Records, judged_lists, sources_of, tune_lists

AIMS = {"pairs": "pairs", "conflict": "conflicts as drawn"}  # what a setting is chosen for: the list of that name
PARTS = len(AIMS) + 1  # of the stage's progress
JUDGED = 2_000_003  # added to the seed of controls on test
MAPPED = ("nmd",)  # methods whose whole sweep is measured on what should stay as it is too
# What conflicts as drawn may cost: steering them takes larger norms.
CONFLICT_CONTROL, CONFLICT_COLLATERAL = 0.3, 0.1

Plan = Mapping[tuple[str, str, str], tuple[Setting, int]]  # by aim, direction, method; with draws of each control
Placed = tuple[tuple[int, ...], pd.DataFrame]  # a table, and its place among all tables


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune split, for pairs and for conflicts as drawn; judge them on the test split."""
    opened, sweeps = _Opened(cell, {}, tell), cell.config.steering.sweeps
    swept = (setting for key in product(TOWARD, sweeps) for setting in opened.settings(*key))
    opened.fitted |= _fitted(opened, ((setting, (ANSWERED,)) for setting in swept))
    chosen: dict[str, _Chosen] = {"pairs": _choose(opened, "pairs", {})}
    # How many neurons a method takes is chosen once.
    tops = {key: choice.setting.top for key, choice in chosen["pairs"].choices.items()}
    chosen["conflict"] = _choose(opened, "conflict", tops)
    opened.forget_tune()  # the tune lists and their caches are gone before the test lists come
    plan = _plan(cell, chosen)
    opened.fitted |= _fitted(
        opened, ((setting, four) for setting, draws in plan.values() for four in shuffles(draws, cell.seed + JUDGED))
    )
    judged = cell.spread(partial(_judge_all, opened, plan), list(product(TOWARD, sweeps)))
    tables = [table for _, table in sorted(chain.from_iterable(judged), key=itemgetter(0))]
    rows = [row for direction, aim in product(TOWARD, AIMS) for row in chosen[aim].rows[direction]]
    return [
        *_save(opened, plan),
        write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)),
        write_table(cell.records / "sweep.parquet", pd.DataFrame(rows)),
        write_json(cell.records / "chosen.json", {aim: _facts_chosen(opened, found) for aim, found in chosen.items()}),
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
    def sources(self) -> dict[str, Sources]:
        """By site."""
        grids = chain.from_iterable(self.cell.config.steering.sweeps.values())
        return sources_of(self.cell, self.asking, self.records, chain.from_iterable(grid.sites for grid in grids))

    def directions(self) -> dict[str, Directions]:
        """By site."""
        return {site: Directions(sources, self.fitted) for site, sources in self.sources.items()}

    def settings(self, direction: str, method: MethodName) -> list[Setting]:
        """What is tried of a method."""
        return settings_of(self.cell.config.steering, direction, method, len(blocks_of(self.asking.model)))

    @cached_property
    def tune(self) -> dict[str, dict[str, TuneLists]]:
        """By aim and direction."""
        return tune_lists(self.cell, self.asking, self.records)

    def forget_tune(self) -> None:
        self.__dict__.pop("tune", None)

    @cached_property
    def begin_alike(self) -> float:
        """Share of the phrasings of fit pairs whose two answers begin with the same tokens."""
        pairs = self.records.both_sides("fit", self.cell.config.steering.fit_pairs)
        encoded = encode(self.asking, [example for pair in pairs for example in pair])
        return float(np.mean([one.shared > 0 for one in encoded]))


def _fitted(opened: _Opened, wanted: Iterable[tuple[Setting, tuple[Labels, ...]]]) -> dict[Fit, np.ndarray]:
    """The learned shifts among those that are wanted, fitted in parallel."""
    fits = list(dict.fromkeys((s.same_direction()[0], several) for s, several in wanted if s.method == "learned"))
    found = opened.cell.spread(partial(_fit_all, opened), fits)
    return {
        (setting, labels): shift_LD
        for (setting, several), shifts in zip(fits, found, strict=True)
        for labels, shift_LD in zip(several, shifts, strict=True)
    }


def _fit_all(opened: _Opened, fits: Sequence[tuple[Setting, tuple[Labels, ...]]]) -> list[list[np.ndarray]]:
    return [learned_together(opened.sources[setting.site], setting, several) for setting, several in fits]


@dataclass(frozen=True)
class _Chosen:
    """What was chosen for an aim.

    Attributes:
        choices: by direction and method.
        best: by direction, the method that gains most.
        rows: of ``records/sweep.parquet``, by direction.
    """

    choices: dict[tuple[str, str], Choice]
    best: dict[str, str]
    rows: dict[str, list[dict[str, Any]]]


def _choose(opened: _Opened, aim: str, tops: Mapping[tuple[str, str], float]) -> _Chosen:
    """Choose a setting for each method and direction, and the method that gains most.

    Args:
        tops: shares of neurons by direction and method, where only those are to be tried.
    """
    cell, directions = opened.cell, opened.directions()
    asked = list(product(TOWARD, cell.config.steering.sweeps))
    found = dict(zip(asked, cell.spread(partial(_rank_all, opened, aim, tops), asked), strict=True))
    choices, best, rows = {key: candidates[0] for key, (candidates, _) in found.items()}, {}, {}
    for direction in TOWARD:
        mine = [entry for (d, _), entry in found.items() if d == direction]
        candidates = chain.from_iterable(candidates for candidates, _ in mine)
        lists = opened.tune[aim][direction]
        choice = final(lists, directions, candidates, _limits(cell, aim), [cell.seed, 1])
        best[direction] = choice.setting.method
        choices[direction, choice.setting.method] = choice
        rows[direction] = list(chain.from_iterable(found_rows for _, found_rows in mine))
    return _Chosen(choices, best, rows)


def _rank_all(
    opened: _Opened, aim: str, tops: Mapping[tuple[str, str], float], asked: Sequence[tuple[str, str]]
) -> list[tuple[list[Choice], list[dict[str, Any]]]]:
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
    facts = {"again": config.tune_draws_again, "excess_cost": config.excess_cost}
    if aim == "conflict":
        return Limits(CONFLICT_CONTROL, CONFLICT_COLLATERAL, refits=0, **facts)
    return Limits(config.control_limit, config.collateral_limit, refits=config.tune_refits, **facts)


def _row(name: str, setting: Setting, scores: Scores, label: str | None = None) -> dict[str, Any]:
    """A row of the sweep: what became of examples that a setting is to steer, or how many keep their label."""
    row = {"examples": name, "n": len(scores.behaviour_N), **_columns(setting)}
    row |= dict.fromkeys(("shift", "stay", "other", "kept", "margin", "margin_sd"), np.nan)
    if label is not None:
        return row | {"kept": share_of(scores, label)}
    shares = {"shift": setting.toward, "stay": SOURCE[setting.direction], "other": "other"}
    row |= {"margin": float(scores.margin_N.mean()), "margin_sd": float(scores.margin_N.std())}
    return row | {column: share_of(scores, behaviour) for column, behaviour in shares.items()}


def _plan(cell: Cell, chosen: Mapping[str, _Chosen]) -> Plan:
    """What is judged on test; conflicts get controls under the methods that are best for them or for pairs only."""
    config, plan = cell.config.steering, {}
    for aim, found in chosen.items():
        for (direction, method), choice in found.choices.items():
            draws = config.draws if aim == "pairs" else config.conflict_draws
            judged = aim == "pairs" or method in {other.best[direction] for other in chosen.values()}
            plan[aim, direction, method] = choice.setting, draws if judged else 0
    return plan


def _judge_all(opened: _Opened, plan: Plan, asked: Sequence[tuple[str, str]]) -> list[list[Placed]]:
    """Of each direction and method: its tables of all lists, with their places among all tables."""
    config, directions = opened.cell.config.steering, opened.directions()
    found: dict[tuple[str, str], list[Placed]] = {one: [] for one in asked}
    for number, direction in enumerate(TOWARD):
        mine = [method for d, method in asked if d == direction]
        lists = judged_lists(opened.records, direction, config.judged_examples) if mine else {}
        for done, (name, entry) in enumerate(lists.items()):
            note = f"{direction}: {name} on test, vectors and controls"
            opened.tell(len(AIMS) + (number + done / len(lists)) / 2, PARTS, note)
            # One list at a time: the caches of a list's prompts are most of the memory that steering takes.
            batches = with_prefixes(opened.asking, entry.examples)
            aims = [aim for aim in AIMS if aim == "pairs" or not name.startswith("pairs")]
            for aim, method in product(aims, mine):
                setting, draws = plan[aim, direction, method]
                controls = (aim, draws if name == aim else 0)
                place = (number, done, list(AIMS).index(aim), list(config.sweeps).index(method))
                for n, (role, scores) in enumerate(_judge(opened, directions, setting, entry, batches, controls)):
                    found[direction, method].append(((*place, n), _table(aim, setting, role, name, entry, scores)))
            del batches  # before the next list's are made
    return list(found.values())


def _judge(
    opened: _Opened,
    directions: Mapping[str, Directions],
    setting: Setting,
    entry: JudgedList,
    batches: Sequence[Batch],
    controls: tuple[str, int],
) -> Iterator[tuple[tuple[str, int], Scores]]:
    """A vector on one list, then the draws of its controls: by role and draw, the scores.

    Args:
        controls: the aim, and how many draws of each there are.
    """
    cell, asking, (aim, draws) = opened.cell, opened.asking, controls
    vector = directions[setting.site].vector(setting)
    scores = steered(asking, batches, vector)
    has_format = getattr(cell_task(cell), "has_memorized_format", None)
    if has_format and entry.examples[0].kind == "conflict":
        applied = partial(vector.apply, asking.model)
        mark_confabulations(asking, entry.examples, scores, has_format, applied)
    yield ("vector", 0), scores
    for control in CONTROLS if draws else ():
        # Shuffles go by the first number, and those that settings were ranked by are to be no part of this.
        stream = zlib.crc32(f"{aim}/{setting.direction}/{setting.method}/{control}".encode())
        drawn = control_draws(control, directions[setting.site], setting, draws, [cell.seed + JUDGED, stream])
        for number, shift_LD in drawn:
            yield (control, number), steered(asking, batches, vector.with_dense(shift_LD), margins=False)


def _save(opened: _Opened, plan: Plan) -> list[Path]:
    """Write the chosen vectors, bound to their model."""
    files, directions = list[Path](), opened.directions()
    for (aim, direction, method), (setting, _) in plan.items():
        bound = directions[setting.site].vector(setting).bound_to(opened.asking.model, opened.asking.tokenizer)
        facts = opened.asking.put | {"begin_alike": opened.begin_alike}
        bound = replace(bound, task=opened.cell.label, commit=git_state()["commit"] or "", **facts)
        name = f"{direction}-{method}" + ("" if aim == "pairs" else f"-{aim}")
        files += save_bound(opened.cell.folder / "vectors", name, bound)
    return files


def _facts_chosen(opened: _Opened, chosen: _Chosen) -> dict[str, Any]:
    """What was chosen, per method and direction, and the best method of each by the tune split."""
    methods: dict[str, dict[str, Any]] = {}
    directions = opened.directions()
    for (direction, method), choice in chosen.choices.items():
        setting = choice.setting
        facts = {name: getattr(setting, name) for name in ("method", "site", "positions", "top", "strength")}
        facts |= {"layers": list(setting.layers), "alpha": directions[setting.site].alpha(setting)}
        facts |= {"within_limits": choice.within, "begin_alike": opened.begin_alike}
        methods.setdefault(method, {})[direction] = facts
    return {"best": chosen.best, "methods": methods}


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


def _columns(setting: Setting) -> dict[str, Any]:
    """A setting in the columns of the records."""
    facts = {name: getattr(setting, name) for name in ("direction", "method", "site", "layers", "top", "strength")}
    return facts | {"layers": layers_name(setting.layers)}


def layers_name(layers: Sequence[int]) -> str:
    """``0-3`` for a range, ``2`` for one layer, else the layers between commas."""
    first, last = layers[0], layers[-1]
    if list(layers) == list(range(first, last + 1)):
        return str(first) if first == last else f"{first}-{last}"
    return ",".join(map(str, layers))


def _table(
    aim: str, setting: Setting, role: tuple[str, int], name: str, entry: JudgedList, scores: Scores
) -> pd.DataFrame:
    """One row per steered test example."""
    columns: dict[str, Any] = {"aim": aim, **_columns(setting), "role": role[0], "draw": role[1], "examples": name}
    columns |= {"example": np.arange(len(entry.examples)), "split": "test", "before": entry.before}
    columns |= {key: [getattr(example, key) for example in entry.examples] for key in ("group", "family")}
    columns |= {"after": scores.behaviour_N, "margin_before": entry.margin_N, "margin": scores.margin_N}
    table = pd.DataFrame(columns | {"confabulated": scores.confabulated_N})
    words = ("aim", "direction", "method", "site", "layers", "role", "examples", "split", "before", "group", "family")
    return table.astype({word: "str" for word in (*words, "after")})
