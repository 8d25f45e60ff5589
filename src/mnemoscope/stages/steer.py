"""Choose steering vectors on the tune split and judge them, with their controls, on the test split."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, Batch, Scores, encode, mark_confabulations
from mnemoscope.cells import Cell, git_state
from mnemoscope.config import SweepConfig
from mnemoscope.directions import (
    CONTROLS,
    TOWARD,
    Choice,
    Limits,
    Setting,
    Sources,
    TuneLists,
    alpha_of,
    control_draws,
    final,
    ranked,
    read_sources,
    share_of,
    steered,
    vector_of,
    with_prefixes,
)
from mnemoscope.errors import InputError
from mnemoscope.models import blocks_of
from mnemoscope.stages.common import Tell, cell_model, cell_task, save_bound, write_json, write_table
from mnemoscope.stages.lists import JudgedList, Records, fit_lists, judged_lists, tune_lists
from mnemoscope.steering import Positions

AIMS = ("pairs", "conflict")  # what a setting is chosen for; controls are drawn on the list of that name
JUDGED = 2_000_003  # added to the seed of controls on test
AIM_NAMES = {"pairs": "pairs", "conflict": "conflicts as drawn"}


# Aim, direction and method whose settings are to be ranked, and the share of neurons where that was chosen before.
Asked = tuple[str, str, str, float | None]
Ranked = tuple[list[Choice], list[dict[str, Any]]]  # settings, best first, and rows of the sweep
Judged = tuple[str, str, str, str]  # direction, list, aim and method


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune split, for pairs and for conflicts as drawn; judge them on the test split."""
    work = _Work(cell)
    made = _Made()
    for aim in AIMS:
        _choose(work, made, aim, tell)
    work.forget_tune()  # the tune lists and their caches are gone before the test lists come
    judged, tables = work.judged(), list[pd.DataFrame]()
    for done, found in enumerate(cell.map(partial(work.judge, made), judged)):
        tell(len(AIMS) + done / len(judged), len(AIMS) + 1, "vectors and controls on test")
        tables += found
    files = work.save(made)
    files.append(write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)))
    rows = [row for _, of_one in sorted(made.swept, key=itemgetter(0)) for row in of_one]
    files.append(write_table(cell.records / "sweep.parquet", pd.DataFrame(rows)))
    files.append(write_json(cell.records / "chosen.json", work.chosen(made)))
    return files


def _choose(work: _Work, made: _Made, aim: str, tell: Tell) -> None:
    """Choose a setting for each method and direction, and the method that gains most."""
    asked: list[Asked] = []
    for direction, method in product(TOWARD, list[str](work.cell.config.steering.sweeps)):
        top = made.choices["pairs", direction, method].setting.top if aim == "conflict" else None
        asked.append((aim, direction, method, top))
    found: list[Ranked] = []
    for one in work.cell.map(work.rank, asked):
        found.append(one)
        tell(AIMS.index(aim) + len(found) / len(asked), len(AIMS) + 1, f"choosing for {AIM_NAMES[aim]} on tune")
    for (_, direction, method, _), (choices, rows) in zip(asked, found, strict=True):
        made.choices[aim, direction, method] = choices[0]
        made.swept.append(((list(TOWARD).index(direction), AIMS.index(aim)), rows))
    for direction in TOWARD:
        of_methods = (choices for (_, d, *_), (choices, _) in zip(asked, found, strict=True) if d == direction)
        choice = work.final(aim, direction, list(chain.from_iterable(of_methods)))
        made.choices[aim, direction, choice.setting.method] = choice
        made.best[aim, direction] = choice.setting.method


def sources_of(cell: Cell, asking: Asking, records: Records) -> dict[str, Sources]:
    """The sources of every site that a sweep of the cell names."""
    lists = fit_lists(cell, asking, records)
    pairs = records.both_sides("fit", cell.config.steering.fit_pairs)
    grids = [grid for grids in cell.config.steering.sweeps.values() for grid in grids]
    sites = dict.fromkeys(site for grid in grids for site in grid.sites)
    return {site: read_sources(site, pairs, lists) for site in sites}


def layers_name(layers: Sequence[int]) -> str:
    """``0-3`` for a range, ``2`` for one layer, else the layers between commas."""
    first, last = layers[0], layers[-1]
    if list(layers) == list(range(first, last + 1)):
        return str(first) if first == last else f"{first}-{last}"
    return ",".join(map(str, layers))


@dataclass
class _Made:
    """What the stage has come to so far.

    Attributes:
        choices: by aim, direction and method.
        best: the method that gains most, by aim and direction.
        swept: rows of ``records/sweep.parquet``, with the places of direction and aim.
    """

    choices: dict[tuple[str, str, str], Choice] = field(default_factory=dict)
    best: dict[tuple[str, str], str] = field(default_factory=dict)
    swept: list[tuple[tuple[int, int], list[dict[str, Any]]]] = field(default_factory=list)


class _Work:
    """The steering of one cell: what it needs is opened when it is first needed, and anew on another machine."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._batches: tuple[tuple[str, str], list[Batch]] | None = None

    def __reduce__(self) -> tuple[type[_Work], tuple[Cell]]:
        return _Work, (self.cell,)

    @cached_property
    def asking(self) -> Asking:
        return cell_model(self.cell)

    @cached_property
    def records(self) -> Records:
        return Records.of(self.cell)

    @cached_property
    def sources(self) -> dict[str, Sources]:
        """By site."""
        return sources_of(self.cell, self.asking, self.records)

    @cached_property
    def begin_alike(self) -> float:
        """Share of the phrasings of fit pairs whose two answers begin with the same tokens."""
        pairs = self.records.both_sides("fit", self.cell.config.steering.fit_pairs)
        encoded = encode(self.asking, [example for pair in pairs for example in pair])
        return float(np.mean([one.shared > 0 for one in encoded]))

    @cached_property
    def tune(self) -> dict[str, dict[str, TuneLists]]:
        """By aim and direction."""
        return tune_lists(self.cell, self.asking, self.records)

    def forget_tune(self) -> None:
        self.__dict__.pop("tune", None)

    def rank(self, asked: Asked) -> Ranked:
        """The settings, best first, and the rows of the sweep."""
        aim, direction, method, top = asked
        config, count = self.cell.config.steering, len(blocks_of(self.asking.model))
        grids = config.sweeps[method]  # type: ignore[index]
        settings = settings_of(direction, method, grids, count, config.positions)
        lists, of_pairs = (self.tune[name][direction] for name in (aim, "pairs"))
        rated, rows = [], []
        for setting in settings:
            if top not in (None, setting.top):
                continue
            row, scores = self._swept(aim, setting, lists.turned)
            rows.append(row)
            rated.append((setting, share_of(scores, TOWARD[setting.direction])))
            if setting.method in config.mapped:
                for name, (batches, label) in lists.kept.items():
                    if aim == "pairs" or name not in of_pairs.kept:
                        rows.append(self._swept(name, setting, batches, label)[0])
        return ranked(self.asking, lists, self.sources, rated, self._limits(aim), self._seed), rows

    def final(self, aim: str, direction: str, candidates: Sequence[Choice]) -> Choice:
        """The best of all methods."""
        lists = self.tune[aim][direction]
        return final(self.asking, lists, self.sources, candidates, self._limits(aim), self._seed)

    @property
    def _seed(self) -> list[int]:
        return [self.cell.seed, 1]

    def _limits(self, aim: str) -> Limits:
        config = self.cell.config.steering
        limits = Limits(
            config.control_limit,
            config.collateral_limit,
            refits=config.tune_refits,
            again=config.tune_draws_again,
            excess_cost=config.excess_cost,
        )
        if aim == "pairs":
            return limits
        return replace(
            limits, control=config.conflict_control_limit, collateral=config.conflict_collateral_limit, refits=0
        )

    def _swept(
        self, name: str, setting: Setting, batches: Sequence[Batch], label: str | None = None
    ) -> tuple[dict[str, Any], Scores]:
        """Try a setting on a list: a row that says what became of it, and the scores."""
        turned = label is None
        scores = steered(self.asking, batches, vector_of(self.sources[setting.site], setting), margins=turned)
        row = {"examples": name, "n": len(scores.behaviour_N), **_facts(setting)}
        if label is None:
            target = TOWARD[setting.direction]
            source = next(t for t in TOWARD.values() if t != target)
            row |= {"shift": share_of(scores, target), "stay": share_of(scores, source)}
            row |= {"other": share_of(scores, "other"), "kept": np.nan}
            row |= {"margin": float(scores.margin_N.mean()), "margin_sd": float(scores.margin_N.std())}
        else:
            row |= dict.fromkeys(("shift", "stay", "other", "margin", "margin_sd"), np.nan)
            row |= {"kept": share_of(scores, label)}
        return row, scores

    @cached_property
    def lists(self) -> dict[str, dict[str, JudgedList]]:
        """By direction and name."""
        limit = self.cell.config.steering.judged_examples
        return {direction: judged_lists(self.records, direction, limit) for direction in TOWARD}

    def judged(self) -> list[Judged]:
        """What is judged, list by list."""
        methods = list[str](self.cell.config.steering.sweeps)
        return [
            (direction, name, aim, method)
            for direction, lists in self.lists.items()
            for name, aim, method in product(lists, AIMS, methods)
        ]

    def judge(self, made: _Made, judged: Judged) -> list[pd.DataFrame]:
        """The tables of a chosen vector on one list."""
        direction, name, aim, method = judged
        entry = self.lists[direction][name]
        if self._batches is None or self._batches[0] != (direction, name):
            # One list at a time: the caches of a list's prompts are most of the memory that steering takes.
            self._batches = None
            self._batches = (direction, name), with_prefixes(self.asking, entry.examples)
        return list(self._judge(made, aim, direction, method, name, entry, self._batches[1]))

    def _judge(
        self, made: _Made, aim: str, direction: str, method: str, name: str, entry: JudgedList, batches: Sequence[Batch]
    ) -> Iterator[pd.DataFrame]:
        """A chosen vector on one list, and its controls where the list is what it was chosen for.

        Conflicts get controls under the methods that are best for them or for pairs only.
        """
        if aim == "conflict" and name.startswith("pairs"):
            return
        has_format = getattr(cell_task(self.cell), "has_memorized_format", None)
        setting = made.choices[aim, direction, method].setting
        sources = self.sources[setting.site]
        vector = vector_of(sources, setting)
        scores = steered(self.asking, batches, vector)
        if has_format and entry.examples[0].kind == "conflict":
            applied = partial(vector.apply, self.asking.model)
            mark_confabulations(self.asking, entry.examples, scores, has_format, applied)
        yield _table(aim, setting, ("vector", 0), name, entry, scores)
        if name != aim or (aim == "conflict" and method not in {made.best[a, direction] for a in AIMS}):
            return
        config = self.cell.config.steering
        draws = config.draws if aim == "pairs" else config.conflict_draws
        for control in CONTROLS:
            # Shuffles go by the first number, and those that settings were ranked by are to be no part of this.
            seed = [self.cell.seed + JUDGED, zlib.crc32(f"{aim}/{direction}/{method}/{control}".encode())]
            for number, shift_LD in control_draws(control, sources, setting, draws, seed):
                scores = steered(self.asking, batches, vector.with_dense(shift_LD), margins=False)
                yield _table(aim, setting, (control, number), name, entry, scores)

    def save(self, made: _Made) -> list[Path]:
        """Write the chosen vectors, bound to their model."""
        files: list[Path] = []
        for (aim, direction, method), choice in made.choices.items():
            vector = vector_of(self.sources[choice.setting.site], choice.setting)
            bound = vector.bound_to(self.asking.model, self.asking.tokenizer)
            facts = self.asking.put | {"begin_alike": self.begin_alike}
            bound = replace(bound, task=self.cell.label, commit=git_state()["commit"] or "", **facts)
            name = f"{direction}-{method}" + ("" if aim == "pairs" else f"-{aim}")
            files += save_bound(self.cell.folder / "vectors", name, bound)
        return files

    def chosen(self, made: _Made) -> dict[str, Any]:
        """What was chosen, per aim, method and direction, and the best method of each by the tune split."""
        chosen: dict[str, Any] = {}
        for (aim, direction, method), choice in made.choices.items():
            entry = chosen.setdefault(aim, {"best": {}, "methods": {}})
            facts = _chosen(choice.setting, self.sources[choice.setting.site])
            facts |= {"within_limits": choice.within, "begin_alike": self.begin_alike}
            entry["methods"].setdefault(method, {})[direction] = facts
        for aim, entry in chosen.items():
            entry["best"] = {direction: made.best[aim, direction] for direction in TOWARD}
        return chosen


def settings_of(
    direction: str, method: str, grids: Sequence[SweepConfig], count: int, positions: Positions = "decision"
) -> list[Setting]:
    """Every combination of each grid in a model of ``count`` layers, once.

    Raises:
        InputError: the sweep names a layer that the model does not have.
    """
    try:
        layer_sets = [grid.layer_sets(count) for grid in grids]
    except ValueError as error:
        raise InputError(str(error)) from error
    settings = (
        Setting(direction, method, site, layers, top, strength, positions)
        for grid, sets in zip(grids, layer_sets, strict=True)
        for site, layers, top, strength in product(grid.sites, sets, grid.tops, grid.strengths)
    )
    return list(dict.fromkeys(settings))


def _facts(setting: Setting) -> dict[str, Any]:
    """A setting in the columns of the records."""
    facts = {name: getattr(setting, name) for name in ("direction", "method", "site", "layers", "top", "strength")}
    return facts | {"layers": layers_name(setting.layers)}


def _chosen(setting: Setting, sources: Sources) -> dict[str, Any]:
    """A setting as ``results.json`` shows it."""
    facts = {name: getattr(setting, name) for name in ("method", "site", "positions", "top", "strength")}
    return facts | {"layers": list(setting.layers), "alpha": alpha_of(sources, setting)}


def _table(
    aim: str, setting: Setting, role: tuple[str, int], name: str, entry: JudgedList, scores: Scores
) -> pd.DataFrame:
    """One row per steered test example."""
    columns: dict[str, Any] = {"aim": aim, **_facts(setting), "role": role[0], "draw": role[1], "examples": name}
    columns |= {"example": np.arange(len(entry.examples)), "split": "test", "before": entry.before}
    columns |= {key: [getattr(example, key) for example in entry.examples] for key in ("group", "family")}
    columns |= {"after": scores.behaviour_N, "margin_before": entry.margin_N, "margin": scores.margin_N}
    table = pd.DataFrame(columns | {"confabulated": scores.confabulated_N})
    words = ("aim", "direction", "method", "site", "layers", "role", "examples", "split", "before", "group", "family")
    return table.astype({word: "str" for word in (*words, "after")})
