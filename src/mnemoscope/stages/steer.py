"""Choose steering vectors on the tune split and judge them, with their controls, on the test split."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, product
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
from mnemoscope.stages.common import Tell, cell_model, read_binding, write_json, write_table
from mnemoscope.stages.lists import JudgedList, Records, judged_lists, sources_of, tune_lists

AIMS = {"pairs": "pairs", "conflict": "conflicts as drawn"}  # what a setting is chosen for: the list of that name
PARTS = len(AIMS) + 1  # of the stage's progress
JUDGED = 2_000_003  # added to the seed of controls on test
MAPPED = ("nmd",)  # methods whose whole sweep is measured on what should stay as it is too
CONFLICT_CONTROL, CONFLICT_COLLATERAL = 0.3, 0.1  # limits for conflicts as drawn: steering them takes larger norms

Row = dict[str, Any]
Tops = Mapping[tuple[str, str], float]  # by direction and method, the share of neurons where no other is to be tried


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
    opened, config = _Opened(cell, {}), cell.config.steering
    asked = list(product(TOWARD, config.sweeps))
    opened.fitted |= _fitted(opened, ((s, (ANSWERED,)) for key in asked for s in opened.settings(*key)))
    for_pairs, rows = _choose(opened, "pairs", {}, tell)
    # How many neurons a method takes is chosen once.
    tops = {(one.setting.direction, one.setting.method): one.setting.top for one in for_pairs}
    for_conflicts, more = _choose(opened, "conflict", tops, tell)
    opened.forget_tune()  # the tune lists and their caches are gone before the test lists come
    chosen = [*for_pairs, *for_conflicts]
    drawn = ((one, four) for one in chosen for four in shuffles(one.draws(config, chosen), cell.seed + JUDGED))
    opened.fitted |= _fitted(opened, ((one.setting, four) for one, four in drawn))
    lists, tables = [(d, name) for d in TOWARD for name in opened.judged(d)], list[pd.DataFrame]()
    for done, judged in enumerate(cell.map(partial(_judge_list, opened, chosen), lists)):
        tell(len(AIMS) + (done + 1) / len(lists), PARTS, "vectors and controls on test")
        tables += judged
    rows = sorted(rows + more, key=lambda row: list(TOWARD).index(row["direction"]))
    return [
        *_save(opened, chosen),
        write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)),
        write_table(cell.records / "sweep.parquet", pd.DataFrame(rows)),
        write_json(cell.records / "chosen.json", _facts_chosen(opened, chosen)),
    ]


class _Opened:
    """What the parts of the stage work with, opened when it is first needed, and anew in another process.

    Attributes:
        fitted: the learned shifts so far.
    """

    def __init__(self, cell: Cell, fitted: dict[Fit, np.ndarray]) -> None:
        self.cell, self.fitted = cell, fitted

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
        sites = (s for grids in self.cell.config.steering.sweeps.values() for grid in grids for s in grid.sites)
        return sources_of(self.cell, self.asking, self.records, sites)

    @cached_property
    def tune(self) -> dict[str, dict[str, TuneLists]]:
        """By aim and direction."""
        return tune_lists(self.cell, self.asking, self.records)

    def forget_tune(self) -> None:
        self.__dict__.pop("tune", None)

    def judged(self, direction: str) -> dict[str, JudgedList]:
        """The test lists of a direction, by name."""
        return judged_lists(self.records, direction, self.cell.config.steering.judged_examples)

    @cached_property
    def begin_alike(self) -> float:
        """Share of the phrasings of fit pairs whose two answers begin with the same tokens."""
        pairs = self.records.both_sides("fit", self.cell.config.steering.fit_pairs)
        encoded = encode(self.asking, [example for pair in pairs for example in pair])
        return float(np.mean([one.shared > 0 for one in encoded]))

    def directions(self) -> dict[str, Directions]:
        """By site; what is computed anew is forgotten with them."""
        return {site: Directions(sources, self.fitted) for site, sources in self.sources.items()}

    def settings(self, direction: str, method: MethodName) -> list[Setting]:
        """What is tried of a method."""
        return settings_of(self.cell.config.steering, direction, method, len(blocks_of(self.asking.model)))


def _fitted(opened: _Opened, wanted: Iterable[tuple[Setting, tuple[Labels, ...]]]) -> dict[Fit, np.ndarray]:
    """The learned shifts among those that are wanted, fitted in parallel."""
    fits = list(dict.fromkeys((s.same_direction()[0], several) for s, several in wanted if s.method == "learned"))
    found = opened.cell.map(partial(_fit, opened), fits)
    return {
        (setting, labels): shift_LD
        for (setting, several), shifts in zip(fits, found, strict=True)
        for labels, shift_LD in zip(several, shifts, strict=True)
    }


def _fit(opened: _Opened, fit: tuple[Setting, tuple[Labels, ...]]) -> list[np.ndarray]:
    setting, several = fit
    return learned_together(opened.sources[setting.site], setting, several)


def _choose(opened: _Opened, aim: str, tops: Tops, tell: Tell) -> tuple[list[_Chosen], list[Row]]:
    """A setting for each direction and method, and the rows of the sweep."""
    cell, directions, chosen = opened.cell, opened.directions(), list[_Chosen]()
    asked = list(product(TOWARD, cell.config.steering.sweeps))
    found: dict[tuple[str, MethodName], tuple[list[Choice], list[Row]]] = {}
    for key, ranking in zip(asked, cell.map(partial(_rank, opened, aim, tops), asked), strict=True):
        found[key] = ranking
        tell(list(AIMS).index(aim) + len(found) / len(asked), PARTS, f"choosing for {AIMS[aim]} on tune")
    for direction in TOWARD:
        mine = [choices for (d, _), (choices, _) in found.items() if d == direction]
        candidates, lists = chain.from_iterable(mine), opened.tune[aim][direction]
        best = final(lists, directions, candidates, _limits(cell, aim), [cell.seed, 1])
        for choices in mine:
            is_best = choices[0].setting.method == best.setting.method
            chosen.append(_Chosen(aim, best if is_best else choices[0], is_best))
    return chosen, [row for _, rows in found.values() for row in rows]


def _rank(opened: _Opened, aim: str, tops: Tops, asked: tuple[str, MethodName]) -> tuple[list[Choice], list[Row]]:
    """The settings of a direction and method, best first, and the rows of the sweep."""
    cell, directions, (direction, _) = opened.cell, opened.directions(), asked
    rated, rows = [], []
    lists, of_pairs = (opened.tune[name][direction] for name in (aim, "pairs"))
    for setting in opened.settings(*asked):
        if setting.top != tops.get(asked, setting.top):
            continue
        vector = directions[setting.site].vector(setting)
        scores = steered(opened.asking, lists.targets, vector)
        rated.append((setting, share_of(scores, setting.toward)))
        rows.append(_row(aim, setting, scores))
        for name, (batches, label) in lists.kept.items() if setting.method in MAPPED else ():
            if aim == "pairs" or name not in of_pairs.kept:
                rows.append(_row(name, setting, steered(opened.asking, batches, vector, margins=False), label))
    return ranked(lists, directions, rated, _limits(cell, aim), [cell.seed, 1]), rows


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


def _judge_list(opened: _Opened, chosen: Sequence[_Chosen], asked: tuple[str, str]) -> list[pd.DataFrame]:
    """Tables of all vectors of a direction on one list, and of the controls of those that were chosen for it."""
    (direction, name), config, directions = asked, opened.cell.config.steering, opened.directions()
    entry, tables = opened.judged(direction)[name], []
    batches = with_prefixes(opened.asking, entry.examples)
    for one in chosen:
        if one.setting.direction != direction or (one.aim == "conflict" and name.startswith("pairs")):
            continue
        draws = one.draws(config, chosen) if name == one.aim else 0
        judged = _judge(opened, directions[one.setting.site], one, entry, batches, draws)
        tables += [_table(one, role, name, entry, scores) for role, scores in judged]
    return tables


def _judge(
    opened: _Opened, directions: Directions, one: _Chosen, entry: JudgedList, batches: Sequence[Batch], draws: int
) -> Iterator[tuple[tuple[str, int], Scores]]:
    """The scores of a vector on one list, then those of the draws of its controls, with role and draw."""
    cell, asking, setting = opened.cell, opened.asking, one.setting
    vector = directions.vector(setting)
    scores = steered(asking, batches, vector)
    if entry.examples[0].kind == "conflict":
        applied = partial(vector.apply, asking.model)
        mark_confabulations(asking, entry.examples, scores, opened.records.task.has_memorized_format, applied)
    yield ("vector", 0), scores
    for control in CONTROLS if draws else ():
        # Shuffles go by the first number, and those that settings were ranked by are to be no part of this.
        stream = zlib.crc32(f"{one.aim}/{setting.direction}/{setting.method}/{control}".encode())
        for number, shift_LD in control_draws(control, directions, setting, draws, [cell.seed + JUDGED, stream]):
            yield (control, number), steered(asking, batches, vector.with_dense(shift_LD), margins=False)


def _save(opened: _Opened, chosen: Sequence[_Chosen]) -> list[Path]:
    """Write the chosen vectors, bound to their model."""
    files, directions = list[Path](), opened.directions()
    prompting = opened.asking.prompting
    facts: dict[str, Any] = {"task": opened.cell.label, "commit": git_state()["commit"] or "", "prompting": prompting}
    facts |= {"binding": read_binding(opened.cell), "begin_alike": opened.begin_alike}
    facts["opening"] = tuple(prompting.opening(opened.asking.tokenizer))
    for one in chosen:
        vector = directions[one.setting.site].vector(one.setting)
        name = f"{one.setting.direction}-{one.setting.method}" + ("" if one.aim == "pairs" else f"-{one.aim}")
        # The JSON beside it is written again once there is a card.
        files.append(replace(vector, **facts).save(opened.cell.folder / "vectors" / f"{name}.safetensors")[0])
    return files


def _facts_chosen(opened: _Opened, chosen: Sequence[_Chosen]) -> dict[str, Any]:
    """``chosen.json``: what was chosen, by aim, method and direction, and the best method of each on tune."""
    found: dict[str, Any] = {aim: {"best": {}, "methods": {}} for aim in AIMS}
    directions = opened.directions()
    for one in chosen:
        setting = one.setting
        facts = {name: getattr(setting, name) for name in ("method", "site", "positions", "top", "strength")}
        facts |= {"layers": list(setting.layers), "alpha": directions[setting.site].alpha(setting)}
        facts |= {"within_limits": one.choice.within, "begin_alike": opened.begin_alike}
        found[one.aim]["methods"].setdefault(setting.method, {})[setting.direction] = facts
        if one.best:
            found[one.aim]["best"][setting.direction] = setting.method
    return found


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
