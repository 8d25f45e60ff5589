"""Choose steering vectors on the tune split and measure them, with their controls, on the test split."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Batch, Scores, encode, mark_confabulations
from mnemoscope.cells import Cell, Tell
from mnemoscope.config import MethodName, SteeringConfig
from mnemoscope.directions import (
    ANSWERED,
    CONTROLS,
    LEARNED,
    LOW_RANK,
    RATING_DRAWS,
    SOURCE,
    TOWARD,
    Directions,
    Fit,
    Labels,
    Limits,
    Setting,
    TuneLists,
    control_draws,
    damage,
    final,
    ranked,
    refitted,
    share_of,
    shared_neurons,
    shuffles,
    steered,
    with_prefixes,
)
from mnemoscope.models import Site, blocks_of
from mnemoscope.stages import common
from mnemoscope.stages.lists import JudgedList, Records, judged_lists, sources_of, tune_lists

AIMS = {"pairs": "pairs", "conflict": "conflicts as drawn"}  # the lists that settings are chosen for
EQUAL_NORM, UNPENALIZED = "equal_norm", "unpenalized"  # settings that are compared on test pairs, and saved nowhere
PARTS = len(AIMS) + 1  # of the stage's progress
JUDGED = 2_000_003  # added to the seed of controls on test
MAPPED = ("nmd",)  # methods whose whole sweep is measured on kept lists too
CONFLICT_CONTROL, CONFLICT_COLLATERAL = 0.3, 0.1  # limits for conflicts as drawn: steering them takes larger norms

Row = dict[str, Any]
Tried = Mapping[tuple[str, str], Sequence[Setting]]  # by direction and method


class _Chosen(NamedTuple):
    """The setting chosen for an aim, a direction and a method; ``best``: no method gains more."""

    aim: str
    setting: Setting
    within: bool
    best: bool


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune split, for pairs and for conflicts as drawn; measure them on the test split."""
    opened, config = _Opened(cell), cell.config.steering
    count = len(blocks_of(opened.asking.model))
    tried: dict[tuple[str, str], list[Setting]] = {
        key: settings_of(config, *key, count) for key in product(TOWARD, config.methods)
    }
    if config.halving:
        tried, screened = _halved(opened, tried, tell)
        for_aim, rates, rows = _choose(opened, config.aim, tried, tell)
        both = [[one._replace(aim=aim) for one in for_aim] for aim in AIMS]
        rows += screened
    else:
        for_pairs, rates, rows = _choose(opened, "pairs", tried, tell)
        tops = {one.setting.key: one.setting.top for one in for_pairs}  # chosen once for both aims
        again = {key: [setting for setting in some if setting.top == tops[key]] for key, some in tried.items()}
        for_conflicts, _, more = _choose(opened, "conflict", again, tell)
        both, rows = [for_pairs, for_conflicts], rows + more
    chosen = [*chain.from_iterable(both)]
    compared = _compared(rates) if config.norm_draws else []
    tables = _judge_all(opened, [*chosen, *compared], tell)
    rows = sorted(rows, key=lambda row: list(TOWARD).index(row["direction"]))
    return [
        common.write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)),
        common.write_table(cell.records / "sweep.parquet", pd.DataFrame(rows)),
        *_write_chosen(opened, chosen),
    ]


class _Opened(common.PerProcess):
    """Records, lists and directions of a cell, beside its model.

    ``shifts``: cache of all directions. The main process sends learned ones to the parts that need them.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.shifts: dict[Fit, np.ndarray] = {}
        self._batches: tuple[tuple[str, str], list[Batch]] | None = None

    def map(
        self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]], settings: Iterable[Sequence[Setting]]
    ) -> Iterable[Any]:
        """``function(opened, *item)`` of each item, in parallel, with the learned shifts of its settings."""
        keys = [{setting.same_direction()[0] for setting in some if setting.method in LEARNED} for some in settings]
        known = ({fit: shift_LD for fit, shift_LD in self.shifts.items() if fit[0] in some} for some in keys)
        return self.cell.map(self, [(function, some, item) for some, item in zip(known, items, strict=True)])

    def __call__(self, part: tuple[Callable[..., Any], dict[Fit, np.ndarray], tuple[Any, ...]]) -> Any:
        function, shifts, item = part
        self.shifts.update(shifts)
        return function(self, *item)

    @cached_property
    def records(self) -> Records:
        return Records.of(self.cell)

    @cached_property
    def directions(self) -> dict[Site, Directions]:
        """By site."""
        config = self.cell.config.steering
        sites: list[Site] = [*config.grids]
        sites += ["block"] if LOW_RANK in config.methods else []
        sources = sources_of(self.cell, self.asking, self.records, sites)
        return {site: Directions(found, self.shifts) for site, found in sources.items()}

    @cached_property
    def tune(self) -> dict[str, dict[str, TuneLists]]:
        """By aim and direction."""
        return tune_lists(self.cell, self.asking, self.records)

    @cached_property
    def few(self) -> dict[str, dict[str, TuneLists]]:
        """The same with a few examples of each list."""
        return tune_lists(self.cell, self.asking, self.records, self.cell.config.steering.screened)

    @cached_property
    def judged(self) -> dict[str, dict[str, JudgedList]]:
        """By direction and name."""
        limit = self.cell.config.steering.judged_examples
        return {direction: judged_lists(self.records, direction, limit) for direction in TOWARD}

    def batches(self, direction: str, name: str) -> list[Batch]:
        """A judged list prepared with prefixes; one at a time and without tune lists, as prefix caches need memory."""
        self.forget_tune()
        if self._batches is None or self._batches[0] != (direction, name):
            self._batches = None
            self._batches = (direction, name), with_prefixes(self.asking, self.judged[direction][name].examples)
        return self._batches[1]

    def forget_tune(self) -> None:
        """Free the tune lists."""
        for name in ("tune", "few"):
            self.__dict__.pop(name, None)


def _halved(opened: _Opened, tried: Tried, tell: Tell) -> tuple[dict[tuple[str, str], list[Setting]], list[Row]]:
    """Settings that are worth all examples, and rows of the sweep that found them: successive halving.

    Methods without learning are tried in all layers on a few examples of the study's aim. By what each steers less what
    it damages, the best layers are left, with half of the strengths there; learned shifts are learned at the best
    strength of these layers alone.
    """
    config = opened.cell.config.steering
    cheap = [s for (_, method), some in tried.items() if method not in LEARNED for s in some]
    worth, rows = dict[Setting, float](), list[Row]()
    for setting, (found, row) in zip(
        cheap, opened.map(_screen, [(config.aim, s) for s in cheap], [[s] for s in cheap]), strict=True
    ):
        worth[setting] = found
        rows.append(row)
        note = f"{setting.direction}: trying {setting.method} on a few conflicts of tune"
        tell(list(AIMS).index(config.aim), PARTS, f"{note} ({len(worth)} of {len(cheap)})")
    opened.__dict__.pop("few", None)
    kept = {}
    for key, some in tried.items():
        ordered = sorted((s for s in cheap if s.direction == key[0]), key=lambda s: -worth[s])
        places = list(dict.fromkeys((s.site, s.layers) for s in ordered))[: config.halving]
        here = [s for s in some if (s.site, s.layers) in places]
        if key[1] == LOW_RANK or not ordered:
            kept[key] = list(some)
        elif key[1] in LEARNED:
            best = {place: next(s.strength for s in ordered if (s.site, s.layers) == place) for place in places}
            kept[key] = [s for s in here if s.strength == best[s.site, s.layers]]
        else:
            kept[key] = sorted(here, key=lambda s: -worth[s])[: -(-len(here) // 2)]
    return kept, rows


def _screen(opened: _Opened, aim: str, setting: Setting) -> tuple[float, Row]:
    """What a setting steers of a few tune examples less the largest damage, and its row of the sweep."""
    lists, directions = opened.few[aim][setting.direction], opened.directions[setting.site]
    scores = steered(opened.asking, lists.targets, directions.vector(setting), margins=False)
    lost = max(share_of(scores, "other"), damage(lists, directions, setting))
    return share_of(scores, setting.toward) - lost, _row(aim, setting, scores)


def _choose(
    opened: _Opened, aim: str, tried: Tried, tell: Tell
) -> tuple[list[_Chosen], dict[Setting, float], list[Row]]:
    """Choose among the settings of each direction and method, each method's best ones by a second rating.

    Returns the choices, the shift rates of all settings, and the rows of the sweep.
    """
    settings, rows, rates = list(chain.from_iterable(tried.values())), list[Row](), dict[Setting, float]()
    others = dict[Setting, float]()
    swept = opened.map(_sweep, [(aim, setting) for setting in settings], [[setting] for setting in settings])
    for setting, (rates[setting], found, learned) in zip(settings, swept, strict=True):
        rows += found
        others[setting] = found[0]["other"]
        opened.shifts.update(learned)
        note = f"{setting.direction}: trying {setting.method} for {AIMS[aim]} on tune"
        tell(list(AIMS).index(aim) + len(rates) / (2 * len(settings)), PARTS, note)
    tell(list(AIMS).index(aim) + 0.5, PARTS, f"choosing for {AIMS[aim]} on tune")
    first = [partial(ranked, others={s: others[s] for s in some}) for some in tried.values()]
    rated = [
        (rank, aim, direction, [(s, rates[s]) for s in some])
        for rank, ((direction, _), some) in zip(first, tried.items(), strict=True)
    ]
    ranks = dict(zip(tried, opened.map(_pick, rated, tried.values()), strict=True))
    again = [(final, aim, direction, ranks[direction, method]) for direction, method in tried]
    finals = opened.map(_pick, again, [[choice.setting for choice in found] for *_, found in again])
    kept = dict(zip(tried, finals, strict=True))
    best = {d: max((choice for key, choice in kept.items() if key[0] == d), key=lambda c: c.rank) for d in TOWARD}
    chosen = [_Chosen(aim, c.setting, c.within, c is best[direction]) for (direction, _), c in kept.items()]
    return chosen, rates, rows


def _compared(rates: Mapping[Setting, float]) -> list[_Chosen]:
    """For each norm each method's setting that steers most tune pairs, whatever controls do; of NMD that of all norms.

    The latter is how the paper chooses.
    """
    most: dict[tuple[Any, ...], Setting] = {}
    for setting, rate in rates.items():
        if setting.method == LOW_RANK:  # which has no norm
            continue
        keys: list[tuple[Any, ...]] = [(EQUAL_NORM, *setting.key, setting.strength)]
        keys += [(UNPENALIZED, *setting.key)] if setting.method == "nmd" else []
        for key in keys:
            if key not in most or rate > rates[most[key]]:
                most[key] = setting
    return [_Chosen(key[0], setting, within=False, best=False) for key, setting in most.items()]


def _sweep(opened: _Opened, aim: str, setting: Setting) -> tuple[float, list[Row], dict[Fit, np.ndarray]]:
    """Shift rate of a setting on tune, rows of the sweep, and learned directions."""
    lists, of_pairs = (opened.tune[name][setting.direction] for name in (aim, "pairs"))
    vector = opened.directions[setting.site].vector(setting)
    scores = steered(opened.asking, lists.targets, vector)
    rows = [_row(aim, setting, scores)]
    for name, (batches, label) in lists.kept.items() if setting.method in MAPPED else ():
        if aim == "pairs" or name not in of_pairs.kept:
            rows.append(_row(name, setting, steered(opened.asking, batches, vector, margins=False), label))
    fit = setting.same_direction()[0], ANSWERED
    learned = {fit: opened.shifts[fit]} if setting.method in LEARNED else {}
    return share_of(scores, setting.toward), rows, learned


def _pick(opened: _Opened, pick: Callable[..., Any], aim: str, direction: str, candidates: list[Any]) -> Any:
    """What ``ranked`` or ``final`` chooses on the tune lists of an aim."""
    config = opened.cell.config.steering
    of_control, collateral, refits = config.control_limit, config.collateral_limit, config.tune_refits
    if aim == "conflict" and config.aim != aim:
        of_control, collateral, refits = CONFLICT_CONTROL, CONFLICT_COLLATERAL, 0
    again = config.tune_draws_again
    draws = min(RATING_DRAWS, again)
    limits = Limits(of_control, collateral, draws, refits, again, config.excess_cost, config.neither_limit)
    return pick(opened.tune[aim][direction], opened.directions, candidates, limits, [opened.cell.seed, 1])


def _row(name: str, setting: Setting, scores: Scores, label: str | None = None) -> Row:
    """A row of the sweep: behaviours under a setting, or the share that keeps its ``label``."""
    row = {"examples": name, "n": len(scores.behaviour_N), **_columns(setting)}
    row |= dict.fromkeys(("shift", "stay", "other", "kept", "margin", "margin_sd"), np.nan)
    if label is not None:
        return row | {"kept": share_of(scores, label)}
    shares = {"shift": setting.toward, "stay": SOURCE[setting.direction], "other": "other"}
    row |= {"margin": float(scores.margin_N.mean()), "margin_sd": float(scores.margin_N.std())}
    return row | {column: share_of(scores, behaviour) for column, behaviour in shares.items()}


def _judge_all(opened: _Opened, chosen: Sequence[_Chosen], tell: Tell) -> list[pd.DataFrame]:
    """The tables of all chosen vectors and their controls on every test list."""
    config, best = opened.cell.config.steering, {one.setting.key for one in chosen if one.best}

    def draws(one: _Chosen) -> int:  # of each control; of conflicts only under methods that are best for either aim
        if one.aim not in AIMS:
            return config.norm_draws
        drawn = one.best if config.controls_of == "best" else one.aim == "pairs" or one.setting.key in best
        return (config.draws if one.aim == "pairs" else config.conflict_draws) if drawn else 0

    tell(len(AIMS), PARTS, "learning from shuffled labels")
    of_learned = [one for one in chosen if one.setting.method in LEARNED]
    drawn = (
        (one.setting.same_direction()[0], part)
        for one, permuted in product(of_learned, (False, True))
        for part in _refits(one.setting, config, draws(one), opened.cell.seed + JUDGED, permuted)
    )
    fits = list(dict.fromkeys(drawn))
    for found in opened.map(_fit, fits, [[] for _ in fits]):
        opened.shifts.update(found)

    def judges(one: _Chosen, name: str) -> bool:
        if config.halving and one.aim != config.aim:  # the same vectors, so that the other lists are judged once
            return name.startswith("pairs") if one.aim == "pairs" else name == one.aim
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


def _fit(opened: _Opened, setting: Setting, several: Sequence[Labels]) -> dict[Fit, np.ndarray]:
    """Learned shifts under several labels."""
    opened.forget_tune()
    if several[0].permuted and not opened.directions[setting.site].sources.lists.can_permute():
        return {}
    found = opened.directions[setting.site].shifts(setting, several)
    return {(setting, labels): shift_LD for labels, shift_LD in zip(several, found, strict=True)}


def _judge(opened: _Opened, one: _Chosen, name: str, draws: int) -> list[pd.DataFrame]:
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
    for control in CONTROLS if draws else ():
        # Shuffles depend on the first number of the seed; none that ranked settings is used again.
        stream = zlib.crc32(f"{one.aim}/{setting.direction}/{setting.method}/{control}".encode())
        few = control in refitted(setting.method) and setting.method == LOW_RANK
        n = min(draws, cell.config.steering.low_rank.refits) if few else draws
        for number, drawn in control_draws(control, directions, setting, n, [cell.seed + JUDGED, stream]):
            scores = steered(asking, batches, drawn, margins=False)
            tables.append(_table(one, (control, number), name, entry, scores))
    return tables


def _write_chosen(opened: _Opened, chosen: Sequence[_Chosen]) -> list[Path]:
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


def settings_of(config: SteeringConfig, direction: str, method: MethodName, count: int) -> list[Setting]:
    """Every combination of each grid of a method in a model of ``count`` layers; InputError for a layer beyond.

    A low-rank shift has a grid of its own, as it has no norm and acts on every token.
    """
    if method == LOW_RANK:
        grid = config.low_rank
        some = [Setting(direction, method, "block", grid.together(count), 1.0, f, "all") for f in grid.factors]
        return list(dict.fromkeys(some))
    grids = (((site,), grid.layer_sets(count), grid.tops, grid.strengths) for site, grid in config.grids.items())
    cells = chain.from_iterable(product(*grid) for grid in grids)
    return list(dict.fromkeys(Setting(direction, method, *one, config.positions) for one in cells))


def _columns(setting: Setting) -> Row:
    """A setting in the columns of the records; layers as ``0-3`` for a range, else between commas."""
    row = {name: getattr(setting, name) for name in ("direction", "method", "site", "layers", "top", "strength")}
    first, last = setting.layers[0], setting.layers[-1]
    in_a_row = first < last and setting.layers == tuple(range(first, last + 1))
    return row | {"layers": f"{first}-{last}" if in_a_row else ",".join(map(str, setting.layers))}


def _table(one: _Chosen, role: tuple[str, int], name: str, entry: JudgedList, scores: Scores) -> pd.DataFrame:
    """One row per steered test example."""
    columns: Row = {"aim": one.aim, **_columns(one.setting), "role": role[0], "draw": role[1], "examples": name}
    columns |= {"example": np.arange(len(entry.examples)), "split": "test", "before": entry.before}
    columns |= {key: [getattr(example, key) for example in entry.examples] for key in ("group", "family")}
    columns |= {"after": scores.behaviour_N, "margin_before": entry.margin_N, "margin": scores.margin_N}
    return pd.DataFrame(columns | {"confabulated": scores.confabulated_N})
