"""Choose steering vectors on the tune split and measure them, with their controls, on the test split."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Scores, encode, mark_confabulations
from mnemoscope.cells import Cell, Tell
from mnemoscope.config import SteeringConfig
from mnemoscope.interventions.controls import (
    INDIFFERENCE,
    LEARNED,
    PERMUTED,
    control_draws,
    refitted,
    shared_neurons,
    shuffles,
)
from mnemoscope.interventions.directions import steered
from mnemoscope.interventions.sources import LOW_RANK, TOWARD, Fit, Labels, Setting
from mnemoscope.models import blocks_of
from mnemoscope.stages import common
from mnemoscope.stages.choose import (
    AIMS,
    PARTS,
    Chosen,
    Row,
    SteeredCell,
    choose,
    columns,
    compared,
    fit_directions,
    halved,
    settings_of,
)
from mnemoscope.stages.lists import JudgedList

JUDGED = 2_000_003  # added to the seed of controls on test


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune split, for pairs and for conflicts as drawn; measure them on the test split."""
    opened, config = SteeredCell(cell), cell.config.steering
    count = len(blocks_of(opened.asking.model))
    tried: dict[tuple[str, str], list[Setting]] = {
        key: settings_of(config, *key, count) for key in product(TOWARD, config.methods)
    }
    if config.halving:
        tried, screened = halved(opened, tried, tell)
        for_aim, rates, rows = choose(opened, config.aim, tried, tell)
        both = [[one._replace(aim=aim) for one in for_aim] for aim in AIMS]
        rows += screened
    else:
        for_pairs, rates, rows = choose(opened, "pairs", tried, tell)
        tops = {one.setting.key: one.setting.top for one in for_pairs}  # chosen once for both aims
        again = {key: [setting for setting in some if setting.top == tops[key]] for key, some in tried.items()}
        for_conflicts, _, more = choose(opened, "conflict", again, tell)
        both, rows = [for_pairs, for_conflicts], rows + more
    chosen = [*chain.from_iterable(both)]
    free = compared(rates) if config.norm_draws else []
    tables = _judge_all(opened, [*chosen, *free], tell)
    rows = sorted(rows, key=lambda row: list(TOWARD).index(row["direction"]))
    return [
        common.write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)),
        common.write_table(cell.records / "sweep.parquet", pd.DataFrame(rows)),
        *_write_chosen(opened, chosen),
    ]


def _judge_all(opened: SteeredCell, chosen: Sequence[Chosen], tell: Tell) -> list[pd.DataFrame]:
    """The tables of all chosen vectors and their controls on every test list."""
    config, best = opened.cell.config.steering, {one.setting.key for one in chosen if one.best}

    def draws(one: Chosen) -> int:  # of each control; of conflicts only under methods that are best for either aim
        if one.aim not in AIMS:
            return config.norm_draws
        drawn = one.best if config.controls_of == "best" else one.aim == "pairs" or one.setting.key in best
        return (config.draws if one.aim == "pairs" else config.conflict_draws) if drawn else 0

    tell(len(AIMS), PARTS, "learning from shuffled labels")
    of_learned = [one for one in chosen if one.setting.method in LEARNED]
    drawn = (
        tuple((one.setting.same_direction()[0], labels) for labels in part)
        for one, (permuted, name) in product(of_learned, enumerate((INDIFFERENCE, PERMUTED)))
        if name in config.controls
        for part in _refits(one.setting, config, draws(one), opened.cell.seed + JUDGED, bool(permuted))
    )
    fits = list(dict.fromkeys(drawn))
    for found in opened.map(_fit_again, [(part,) for part in fits], [[] for _ in fits]):
        opened.shifts.update(found)

    def judges(one: Chosen, name: str) -> bool:
        if config.halving and one.aim != config.aim:  # the same vectors, so that lists are judged once; pairs: the best
            return one.best and name.startswith("pairs") if one.aim == "pairs" else name == one.aim
        if one.aim in AIMS:
            return one.aim == "pairs" or not name.startswith("pairs")
        return name == "pairs"

    parts = [
        (one, name, draws(one) if name == one.aim or one.aim not in AIMS else 0)
        for direction, lists in opened.judged.items()
        for name in lists
        for one in chosen
        if one.setting.direction == direction and judges(one, name)
    ]
    tables = list[pd.DataFrame]()
    judged = opened.map(_judge, parts, [[one.setting] for one, *_ in parts])
    for done, ((one, name, _), found) in enumerate(zip(parts, judged, strict=True), 1):
        tell(len(AIMS) + done / len(parts), PARTS, f"{one.setting.direction}: {name} on test, vectors and controls")
        tables += found
    if config.halving:
        (other,) = set(AIMS) - {config.aim}
        mine = {name for one, name, _ in parts if one.aim == other}
        same = (table for table in tables if table["aim"][0] == config.aim and table["role"][0] == "vector")
        tables += [table.assign(aim=other) for table in same if table["examples"][0] not in mine]
    return tables


def _refits(
    setting: Setting, config: SteeringConfig, draws: int, seed: int, permuted: bool
) -> Sequence[tuple[Labels, ...]]:
    """Labels that a learned setting is learned again on: in fours, but low-rank shifts one by one."""
    if setting.method != LOW_RANK:
        return shuffles(draws, seed, permuted)
    draws = min(draws, config.low_rank.refits)
    return [(labels,) for labels in chain.from_iterable(shuffles(draws, seed, permuted))][:draws]


def _fit_again(opened: SteeredCell, fits: Sequence[Fit]) -> dict[Fit, np.ndarray]:
    """Learned directions under several labels, when choosing is over."""
    opened.forget_tune()
    return fit_directions(opened, fits)


def _judge(opened: SteeredCell, one: Chosen, name: str, draws: int) -> list[pd.DataFrame]:
    """Tables of a vector and of the draws of its controls on one test list."""
    cell, asking, setting = opened.cell, opened.asking, one.setting
    entry, batches = opened.judged[setting.direction][name], opened.batches(setting.direction, name)
    directions = opened.directions[setting.site]
    vector = directions.vector(setting)
    scores = steered(asking, batches, vector)
    if entry.examples[0].kind == "conflict":
        applied = partial(vector.apply, asking.model)
        mark_confabulations(asking, entry.examples, scores, opened.records.task.has_memorized_format, applied)
    tables = [_table(one, ("vector", 0), name, entry, scores)]
    for control in cell.config.steering.controls if draws else ():
        # Shuffles depend on the first number of the seed; none that ranked settings is used again.
        stream = zlib.crc32(f"{one.aim}/{setting.direction}/{setting.method}/{control}".encode())
        few = control in refitted(setting.method) and setting.method == LOW_RANK
        n = min(draws, cell.config.steering.low_rank.refits) if few else draws
        for number, drawn in control_draws(control, directions, setting, n, [cell.seed + JUDGED, stream]):
            scores = steered(asking, batches, drawn, margins=False)
            tables.append(_table(one, (control, number), name, entry, scores))
    return tables


def _write_chosen(opened: SteeredCell, chosen: Sequence[Chosen]) -> list[Path]:
    """Write the chosen vectors, bound to their model, and ``chosen.json``."""
    cell, asking, directions, files = opened.cell, opened.asking, opened.directions, list[Path]()
    found: dict[str, Any] = {aim: {"best": {}, "methods": {}} for aim in AIMS}
    found["aim"] = cell.config.steering.aim
    pairs = opened.records.both_sides("fit", cell.config.steering.fit_pairs)
    encoded = encode(asking, [example for pair in pairs for example in pair])
    begin_alike = float(np.mean([one.shared > 0 for one in encoded]))
    fields = common.artefact_facts(cell, asking) | {"begin_alike": begin_alike}
    fields["opening"] = tuple(asking.prompting.opening(asking.tokenizer))
    fixed = {one.setting.same_direction()[0] for one in chosen if one.aim == "pairs"}
    common.keep_shifts(cell, {setting: directions[setting.site].shifts(setting)[0] for setting in fixed})
    for one in chosen:
        setting, site = one.setting, directions[one.setting.site]
        name = f"{setting.direction}-{setting.method}" + ("" if one.aim == "pairs" else f"-{one.aim}")
        # Without its JSON, which the cards stage writes again.
        path = cell.folder / "vectors" / f"{name}.safetensors"
        files.append(common.save_without_card(cell, replace(site.vector(setting), **fields), path))
        facts = {name: getattr(setting, name) for name in ("method", "site", "positions", "top", "strength")}
        facts |= {"layers": list(setting.layers), "alpha": site.alpha(setting), "within_limits": one.within}
        facts |= {"begin_alike": begin_alike, "shared": shared_neurons(site.dense(setting))}
        found[one.aim]["methods"].setdefault(setting.method, {})[setting.direction] = facts
        if one.best:
            found[one.aim]["best"][setting.direction] = setting.method
    return [*files, common.write_json(cell.records / "chosen.json", found)]


def _table(one: Chosen, role: tuple[str, int], name: str, entry: JudgedList, scores: Scores) -> pd.DataFrame:
    """One row per steered test example."""
    row: Row = {"aim": one.aim, **columns(one.setting), "role": role[0], "draw": role[1], "examples": name}
    row |= {"example": np.arange(len(entry.examples)), "split": "test", "before": entry.before}
    row |= {key: [getattr(example, key) for example in entry.examples] for key in ("group", "family")}
    row |= {"after": scores.behaviour_N, "margin_before": entry.margin_N, "margin": scores.margin_N}
    return pd.DataFrame(row | {"confabulated": scores.confabulated_N})
