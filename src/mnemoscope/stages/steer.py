"""Choose steering vectors on the tune split and judge them, with their controls, on the test split."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, Batch, Scores, mark_confabulations
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
AIM_NAMES = {"pairs": "pairs", "conflict": "other conflicts"}


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune split, for pairs and for other conflicts; judge them on the test split."""
    asking, records = cell_model(cell), Records.of(cell)
    work = _Work(cell, asking, sources_of(cell, asking, records))
    _choose_all(work, tune_lists(cell, asking, records), tell)
    tables: list[pd.DataFrame] = []
    for number, direction in enumerate(TOWARD):
        lists = judged_lists(records, direction, cell.config.steering.judged_examples)
        for done, (name, entry) in enumerate(lists.items()):
            tell(2 + (number + done / len(lists)) / 2, 3, f"{direction}: {name} on test, vectors and controls")
            tables += work.judge(direction, name, entry)
    files = work.save()
    files.append(write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)))
    files.append(write_table(cell.records / "sweep.parquet", pd.DataFrame(work.swept)))
    files.append(write_json(cell.records / "chosen.json", work.chosen()))
    return files


def _choose_all(work: _Work, tune: Mapping[str, Mapping[str, TuneLists]], tell: Tell) -> None:
    """Every choice; the tune lists and their caches are gone before the test lists come."""
    sweeps = work.cell.config.steering.sweeps
    for number, (direction, aim) in enumerate(product(TOWARD, AIMS)):
        lists = {name: of_aim[direction] for name, of_aim in tune.items()}
        ranks: dict[str, list[Choice]] = {}
        for done, method in enumerate(sweeps):
            tell((number + done / len(sweeps)) / 2, 3, f"{direction}: choosing {method} for {AIM_NAMES[aim]} on tune")
            ranks[method] = work.rank(aim, direction, method, lists)
        work.choose(aim, direction, ranks, lists[aim])


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
class _Work:
    """The steering of one cell as it goes."""

    cell: Cell
    asking: Asking
    sources: Mapping[str, Sources]
    swept: list[dict[str, Any]] = field(default_factory=list)
    choices: dict[tuple[str, str, str], Choice] = field(default_factory=dict)
    best: dict[tuple[str, str], str] = field(default_factory=dict)  # the method that gains most, by aim and direction

    def rank(self, aim: str, direction: str, method: str, tune: Mapping[str, TuneLists]) -> list[Choice]:
        """A method's settings, best first; for conflicts those with the share of neurons that was chosen for pairs.

        Args:
            tune: the tune lists of this direction, by aim.
        """
        config, count = self.cell.config.steering, len(blocks_of(self.asking.model))
        grids = config.sweeps[method]  # type: ignore[index]
        settings = settings_of(direction, method, grids, count, config.positions)
        if aim == "conflict":
            top = self.choices["pairs", direction, method].setting.top
            settings = [setting for setting in settings if setting.top == top]
        rated = []
        for setting in settings:
            scores = self._sweep(aim, setting, tune[aim].turned)
            rated.append((setting, share_of(scores, TOWARD[setting.direction])))
            if setting.method in config.mapped:
                for name, (batches, label) in tune[aim].kept.items():
                    if aim == "pairs" or name not in tune["pairs"].kept:
                        self._sweep(name, setting, batches, label)
        return ranked(self.asking, tune[aim], self.sources, rated, self._limits(aim), self._seed)

    def choose(self, aim: str, direction: str, ranks: Mapping[str, Sequence[Choice]], tune: TuneLists) -> None:
        """Choose a setting for each method, and the method that gains most."""
        self.choices |= {(aim, direction, method): choices[0] for method, choices in ranks.items()}
        candidates = chain.from_iterable(ranks.values())
        choice = final(self.asking, tune, self.sources, candidates, self._limits(aim), self._seed)
        self.choices[aim, direction, choice.setting.method] = choice
        self.best[aim, direction] = choice.setting.method

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

    def _sweep(self, name: str, setting: Setting, batches: Sequence[Batch], label: str | None = None) -> Scores:
        """Try a setting on a list and note what became of it."""
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
        self.swept.append(row)
        return scores

    def judge(self, direction: str, name: str, entry: JudgedList) -> Iterator[pd.DataFrame]:
        """The chosen vectors on one list, and their controls where the list is what they were chosen for.

        Conflicts get controls under the methods that are best for them or for pairs only.
        """
        # One list at a time: the caches of a list's prompts are most of the memory that steering takes.
        batches = with_prefixes(self.asking, entry.examples)
        has_format = getattr(cell_task(self.cell), "has_memorized_format", None)
        for aim, method in product(AIMS, self.cell.config.steering.sweeps):
            if aim == "conflict" and name.startswith("pairs"):
                continue
            setting = self.choices[aim, direction, method].setting
            sources = self.sources[setting.site]
            vector = vector_of(sources, setting)
            scores = steered(self.asking, batches, vector)
            if has_format and entry.examples[0].kind == "conflict":
                applied = partial(vector.apply, self.asking.model)
                mark_confabulations(self.asking, entry.examples, scores, has_format, applied)
            yield _table(aim, setting, ("vector", 0), name, entry, scores)
            if name != aim or (aim == "conflict" and method not in {self.best[a, direction] for a in AIMS}):
                continue
            for control in CONTROLS:
                seed = [self.cell.seed, zlib.crc32(f"{aim}/{direction}/{method}/{control}".encode())]
                for number, shift_LD in control_draws(control, sources, setting, self.cell.config.steering.draws, seed):
                    scores = steered(self.asking, batches, vector.with_dense(shift_LD), margins=False)
                    yield _table(aim, setting, (control, number), name, entry, scores)

    def save(self) -> list[Path]:
        """Write the chosen vectors, bound to their model."""
        files: list[Path] = []
        for (aim, direction, method), choice in self.choices.items():
            vector = vector_of(self.sources[choice.setting.site], choice.setting)
            bound = vector.bound_to(self.asking.model, self.asking.tokenizer)
            bound = replace(
                bound, task=self.cell.label, commit=git_state()["commit"] or "", chat=self.asking.chat is not None
            )
            name = f"{direction}-{method}" + ("" if aim == "pairs" else f"-{aim}")
            files += save_bound(self.cell.folder / "vectors", name, bound)
        return files

    def chosen(self) -> dict[str, Any]:
        """What was chosen, per aim, method and direction, and the best method of each by the tune split."""
        chosen: dict[str, Any] = {}
        for (aim, direction, method), choice in self.choices.items():
            entry = chosen.setdefault(aim, {"best": {}, "methods": {}})
            facts = _chosen(choice.setting, self.sources[choice.setting.site]) | {"within_limits": choice.within}
            entry["methods"].setdefault(method, {})[direction] = facts
        for aim, entry in chosen.items():
            entry["best"] = {direction: self.best[aim, direction] for direction in TOWARD}
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
