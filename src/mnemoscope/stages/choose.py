"""Choose the settings of steering vectors on the tune split, for pairs and for conflicts as drawn."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np

from mnemoscope.behaviour import Batch, Scores
from mnemoscope.bench.ranking import RATING_DRAWS, Limits, TuneLists, final, in_order, most_lost, ranked
from mnemoscope.cells import Cell, Tell
from mnemoscope.config import MethodName, SteeringConfig
from mnemoscope.interventions.controls import LEARNED
from mnemoscope.interventions.directions import Directions, share_of, steered
from mnemoscope.interventions.sources import (
    ANSWERED,
    LOW_RANK,
    SOURCE,
    TOWARD,
    Fit,
    Setting,
    learned_beside,
    with_prefixes,
)
from mnemoscope.models import Site
from mnemoscope.stages import common
from mnemoscope.stages.lists import JudgedList, Records, judged_lists, sources_of, tune_lists
from mnemoscope.statistics import Estimate

AIMS = {"pairs": "pairs", "conflict": "conflicts as drawn"}  # the lists that settings are chosen for
EQUAL_NORM, UNPENALIZED = "equal_norm", "unpenalized"  # settings that are compared on test pairs, and saved nowhere
PARTS = len(AIMS) + 1  # of the stage's progress
MAPPED = ("nmd",)  # methods whose whole sweep is measured on kept lists too
CONFLICT_CONTROL, CONFLICT_COLLATERAL = 0.3, 0.1  # limits for conflicts as drawn: steering them takes larger norms

LEAST_RATE = 0.1  # of a few examples that are steered, from which on damage is looked at
Row = dict[str, Any]
Tried = Mapping[tuple[str, str], Sequence[Setting]]  # by direction and method


class Chosen(NamedTuple):
    """The setting chosen for an aim, a direction and a method; ``best``: no method gains more."""

    aim: str
    setting: Setting
    within: bool
    best: bool


class SteeredCell(common.PerProcess):
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


def halved(opened: SteeredCell, tried: Tried, tell: Tell) -> tuple[dict[tuple[str, str], list[Setting]], list[Row]]:
    """Settings that are worth all examples, and rows of the sweep that found them: successive halving.

    Methods without learning are tried in all layers on a few examples of the study's aim. By what each steers less what
    it damages, the best layers are left, with half of the settings there; a shift is learned in the very best one
    alone, at the strength that was best there.
    """
    config = opened.cell.config.steering
    places: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in chain.from_iterable(some for (_, method), some in tried.items() if method not in LEARNED):
        key = (setting.direction, setting.method, setting.site, setting.layers, setting.top)
        places.setdefault(key, []).append(setting)
    screened, rows = {direction: list[Screened]() for direction in TOWARD}, list[Row]()
    looked = opened.map(_screen, [(config.aim, some) for some in places.values()], places.values())
    for done, ((direction, method, *_), found) in enumerate(zip(places, looked, strict=True), 1):
        screened[direction] += [one for one, _ in found]
        rows += [row for _, row in found]
        note = f"{direction}: {method}, a first look at place {done} of {len(places)}"
        tell(list(AIMS).index(config.aim) + 0.5 * done / len(places), PARTS, note)
    parts = [(config.aim, direction, some, config.halving) for direction, some in screened.items()]
    ranks = opened.map(_worth, parts, [[one.setting for one in some] for _, _, some, _ in parts])
    worth = dict(zip(screened, ranks, strict=True))
    opened.__dict__.pop("few", None)
    kept = {}
    for (direction, method), some in tried.items():
        seen = worth[direction]
        first = next(iter(seen), None)
        if method == LOW_RANK or first is None:
            kept[direction, method] = list(some)
        elif method in LEARNED:
            best = (first.site, first.layers, first.strength)
            kept[direction, method] = [s for s in some if (s.site, s.layers, s.strength) == best]
        else:
            here = [s for s in seen if s.method == method]
            kept[direction, method] = here[: -(-len(here) // 2)]
    return kept, rows


class Screened(NamedTuple):
    """A setting with the shares of a few tune examples that it steers, and that give neither answer."""

    setting: Setting
    rate: float
    other: float


def _screen(opened: SteeredCell, aim: str, settings: Sequence[Setting]) -> list[tuple[Screened, Row]]:
    """What settings of one place steer of a few tune examples, and rows of the sweep.

    From weak to strong ones, up to the first that breaks most answers.
    """
    found = []
    for setting in sorted(settings, key=lambda setting: setting.strength):
        targets, directions = opened.few[aim][setting.direction].targets, opened.directions[setting.site]
        scores = steered(opened.asking, targets, directions.vector(setting), margins=False)
        one = Screened(setting, share_of(scores, setting.toward), share_of(scores, "other"))
        found.append((one, _row(aim, setting, scores)))
        if one.other > 0.5:
            break
    return found


def _worth(opened: SteeredCell, aim: str, direction: str, screened: Sequence[Screened], most: int) -> list[Setting]:
    """The settings of the ``most`` best places, best first, by what they steer less the largest damage.

    Lists that should stay are read only of settings that could be among these, as they cost the most.
    """

    def least(one: Screened) -> float:
        lists = opened.few[aim][direction]
        lost = most_lost(lists, opened.directions[one.setting.site], one.setting) if one.rate > LEAST_RATE else 0.0
        return one.rate - max(one.other, lost)

    waiting = [(one.other - one.rate, False, number) for number, one in enumerate(screened)]
    heapq.heapify(waiting)
    places, found = dict[tuple[Any, ...], None](), list[tuple[float, Setting]]()
    while waiting:
        cost, known, number = heapq.heappop(waiting)
        setting = screened[number].setting
        place = setting.site, setting.layers
        if len(places) == most and place not in places:
            continue
        if known:
            places[place] = None
            found.append((cost, setting))
        else:
            heapq.heappush(waiting, (-least(screened[number]), True, number))
    return [setting for _, setting in sorted(found, key=lambda one: one[0])]


def choose(
    opened: SteeredCell, aim: str, tried: Tried, tell: Tell
) -> tuple[list[Chosen], dict[Setting, Estimate], list[Row]]:
    """Choose among the settings of each direction and method, each method's best ones by a second rating.

    Returns the choices, the shift rates of all settings, and the rows of the sweep.
    """
    settings, rows, rates = list(chain.from_iterable(tried.values())), list[Row](), dict[Setting, Estimate]()
    others = dict[Setting, Estimate]()
    parts = [([fit],) for fit in _to_learn(opened.cell.config.steering, settings, opened.shifts)]
    for done, found in enumerate(opened.map(fit_directions, parts, [[] for _ in parts]), 1):
        opened.shifts.update(found)
        tell(list(AIMS).index(aim) + 0.5, PARTS, f"learning for {AIMS[aim]}: part {done} of {len(parts)}")
    swept = opened.map(_sweep, [(aim, setting) for setting in settings], [[setting] for setting in settings])
    for setting, (rates[setting], others[setting], found) in zip(settings, swept, strict=True):
        rows += found
        note = f"{setting.direction}: trying {setting.method} for {AIMS[aim]} on tune"
        tell(list(AIMS).index(aim) + 0.5 + len(rates) / (4 * len(settings)), PARTS, note)
    tell(list(AIMS).index(aim) + 0.75, PARTS, f"choosing for {AIMS[aim]} on tune")
    first = [partial(ranked, others={s: others[s] for s in some}) for some in tried.values()]
    rated = [
        (rank, aim, direction, [(s, rates[s]) for s in some])
        for rank, ((direction, _), some) in zip(first, tried.items(), strict=True)
    ]
    ranks = dict(zip(tried, opened.map(_pick, rated, tried.values()), strict=True))
    # Controls cost the most, so that a halved sweep draws those of what could win alone.
    keys = list(product(TOWARD)) if opened.cell.config.steering.halving else list(tried)
    rivals = [[c for found, some in ranks.items() if found[: len(key)] == key for c in some] for key in keys]
    again = [(final, aim, key[0], some) for key, some in zip(keys, rivals, strict=True)]
    finals = list(opened.map(_pick, again, [[choice.setting for choice in some] for some in rivals]))
    kept = {key: some[0] for key, some in ranks.items()} | {choice.setting.key: choice for choice in finals}
    best = {d: in_order([c for c in finals if c.setting.direction == d])[0] for d in TOWARD}
    chosen = [Chosen(aim, c.setting, c.within, c is best[direction]) for (direction, _), c in kept.items()]
    return chosen, rates, rows


def _to_learn(config: SteeringConfig, settings: Iterable[Setting], known: Container[Fit]) -> list[Fit]:
    """What learned settings lack, one fit of those that are learned in one go."""
    fits = ((one.same_direction()[0], ANSWERED) for one in settings if one.method in LEARNED)
    first = {
        tuple(learned_beside(fit, config.strengths_together(fit[0].site))): fit for fit in fits if fit not in known
    }
    return list(first.values())


def fit_directions(opened: SteeredCell, fits: Sequence[Fit]) -> dict[Fit, np.ndarray]:
    """Learned directions of one place; none where answers are to be permuted and cannot be."""
    directions = opened.directions[fits[0][0].site]
    if fits[0][1].permuted and not directions.sources.lists.can_permute():
        return {}
    return directions.fitted(fits)


def compared(rates: Mapping[Setting, Estimate]) -> list[Chosen]:
    """For each norm each method's setting that steers most tune pairs, whatever controls do; of NMD that of all norms.

    The latter is how the paper chooses. Norms are those of a site, so methods are compared at one: the outputs of
    blocks where these were tried.
    """
    most: dict[tuple[Any, ...], Setting] = {}
    sites = [setting.site for setting in rates]
    compared_at = "block" if "block" in sites else min(sites, default="")
    for setting, rate in rates.items():
        if setting.method == LOW_RANK:  # which has no norm
            continue
        keys: list[tuple[Any, ...]] = [(EQUAL_NORM, *setting.key, setting.strength)]
        keys = keys if setting.site == compared_at else []
        keys += [(UNPENALIZED, *setting.key)] if setting.method == "nmd" else []
        for key in keys:
            if key not in most or rate.estimate > rates[most[key]].estimate:
                most[key] = setting
    return [Chosen(key[0], setting, within=False, best=False) for key, setting in most.items()]


def _sweep(opened: SteeredCell, aim: str, setting: Setting) -> tuple[Estimate, Estimate, list[Row]]:
    """Shares of tune that a setting steers, and that give neither answer then, and rows of the sweep."""
    lists, of_pairs = (opened.tune[name][setting.direction] for name in (aim, "pairs"))
    vector = opened.directions[setting.site].vector(setting)
    scores = steered(opened.asking, lists.targets, vector, roughly=True)
    rows = [_row(aim, setting, scores)]
    for name, (batches, label) in lists.kept.items() if setting.method in MAPPED else ():
        if aim == "pairs" or name not in of_pairs.kept:
            rows.append(
                _row(name, setting, steered(opened.asking, batches, vector, margins=False, roughly=True), label)
            )
    return lists.rate(scores, setting.toward), lists.rate(scores, "other"), rows


def _pick(opened: SteeredCell, pick: Callable[..., Any], aim: str, direction: str, candidates: list[Any]) -> Any:
    """What ``ranked`` or ``final`` chooses on the tune lists of an aim."""
    config = opened.cell.config.steering
    of_control, collateral, refits = config.control_limit, config.collateral_limit, config.tune_refits
    if aim == "conflict" and config.aim != aim:
        of_control, collateral, refits = CONFLICT_CONTROL, CONFLICT_COLLATERAL, 0
    again = config.tune_draws_again
    draws = 0 if config.halving else min(RATING_DRAWS, again)
    limits = Limits(
        of_control, collateral, draws, refits, again, config.excess_cost, config.neither_limit, config.controls
    )
    return pick(opened.tune[aim][direction], opened.directions, candidates, limits, [opened.cell.seed, 1])


def _row(name: str, setting: Setting, scores: Scores, label: str | None = None) -> Row:
    """A row of the sweep: behaviours under a setting, or the share that keeps its ``label``."""
    row = {"examples": name, "n": len(scores.behaviour_N), **columns(setting)}
    row |= dict.fromkeys(("shift", "stay", "other", "kept", "margin", "margin_sd"), np.nan)
    if label is not None:
        return row | {"kept": share_of(scores, label)}
    shares = {"shift": setting.toward, "stay": SOURCE[setting.direction], "other": "other"}
    row |= {"margin": float(scores.margin_N.mean()), "margin_sd": float(scores.margin_N.std())}
    return row | {column: share_of(scores, behaviour) for column, behaviour in shares.items()}


def columns(setting: Setting) -> Row:
    """A setting in the columns of the records; layers as ``0-3`` for a range, else between commas."""
    row = {name: getattr(setting, name) for name in ("direction", "method", "site", "layers", "top", "strength")}
    first, last = setting.layers[0], setting.layers[-1]
    in_a_row = first < last and setting.layers == tuple(range(first, last + 1))
    return row | {"layers": f"{first}-{last}" if in_a_row else ",".join(map(str, setting.layers))}
