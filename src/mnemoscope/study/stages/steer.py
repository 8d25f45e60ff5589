"""Choose interventions on the tune split and measure them, with their controls, on the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import encode
from mnemoscope.bench.answers import scores
from mnemoscope.bench.choose import Rated, Rule, Tuned, choose, confirmed, in_order, rated_by
from mnemoscope.interventions import Intervention, SteeringVector, Toward
from mnemoscope.interventions.methods import candidates, is_one_direction, name_of
from mnemoscope.models import Site
from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages import common
from mnemoscope.study.stages.judge import AIMS, PARTS, Chosen, Row, SteeredCell, columns_of, judge_all, sweep_row
from mnemoscope.tasks import Split

EQUAL_NORM, UNPENALIZED = "equal_norm", "unpenalized"  # settings that are compared on test pairs, and saved nowhere
MAPPED = ("nmd",)  # methods whose whole sweep is measured on kept lists too
FINALISTS = 2  # settings of a method whose controls are drawn, where these are few
LEFT = 4  # one in so many settings is left after a first look
ENOUGH = 40  # groups of all splits; of fewer both tune and test are judged
FEW = 4  # settings of what is learned alone, which need no such look
Key = tuple[str, Toward]  # method and direction
Settings = dict[Key, list[Intervention]]
Reasons = dict[str, str]  # why methods are left out


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune split for the study's aim; measure them on the test split."""
    opened, config = SteeredCell(cell), cell.config.steering
    tried, rows, left_out = _tried(opened, tell)
    rated, more = _rate(opened, tried, tell)
    rows += more
    chosen = _chosen(opened, rated)
    free = _compared([one for some in rated.values() for one in some]) if config.norm_draws else []
    tables = judge_all(opened, [*chosen, *free], tell)
    if config.screened and len(judged_splits(opened.bench.records.pairs["group"].nunique())) > 1:
        tables += _judged_again(opened, tried, chosen, tell)
    judged = sorted({table.split.iloc[0] for table in tables})
    rows = sorted(rows, key=lambda row: str(row["direction"]))
    return [
        common.write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)),
        common.write_table(cell.records / "sweep.parquet", pd.DataFrame(rows)),
        *_write_chosen(opened, chosen, {"left_out": left_out, "judged": judged}),
    ]


def judged_splits(groups: int) -> tuple[Split, ...]:
    """The splits that a fit of so many groups is judged on."""
    return ("test",) if groups >= ENOUGH else ("tune", "test")


def _rate(opened: SteeredCell, tried: Settings, tell: Tell) -> tuple[dict[Key, list[Rated]], list[Row]]:
    """All settings, rated on tune targets, and rows of the sweep."""
    every = [(key, place, one) for key, some in tried.items() for place, one in enumerate(some)]
    rated, rows = {key: list[Rated]() for key in tried}, list[Row]()
    found = opened.map(_rated, [(one, place) for _, place, one in every])
    for done, ((key, _, one), (share, more)) in enumerate(zip(every, found, strict=True), 1):
        rated[key].append(share)
        rows += more
        tell(1 + done / len(every), PARTS, f"to_{one.toward}: trying {one.method} on tune")
    return rated, rows


def _judged_again(opened: SteeredCell, tried: Settings, chosen: Sequence[Chosen], tell: Tell) -> list[pd.DataFrame]:
    """Tables of the tune split, of settings that are chosen on test: nothing is judged on what it was chosen on.

    So twice as many groups are judged. What is kept stays as it was chosen on tune.
    """
    opened.exchanged = True
    rated, _ = _rate(opened, tried, tell)
    best = {(one.one.toward, one.one.method) for one in chosen if one.best}
    again = [one._replace(best=(one.one.toward, one.one.method) in best) for one in _chosen(opened, rated)]
    tables = judge_all(opened, again, tell)
    opened.exchanged = False
    return tables


def _tried(opened: SteeredCell, tell: Tell) -> tuple[Settings, list[Row], Reasons]:
    """The settings of every method in both directions; where a few examples are looked at first, those that are left.

    Of methods that are taught a shift of one place, it is learned at the best place of the others alone. With such a
    look, methods that cannot be had here are left out.
    """
    config, found, rows, left_out = opened.cell.config.steering, Settings(), list[Row](), Reasons()
    both = [method for method in config.methods if is_one_direction(method)]
    places: dict[Toward, Any] = {}
    for some, why in opened.map(_candidates, [(method, list(Toward), {}) for method in both]):
        found, left_out = found | some, left_out | why
    tell(0.4, PARTS, "directions")
    if config.screened:
        found, best, rows = _looked_at(opened, found)
        for toward, one in best.items():
            assert isinstance(one, SteeringVector)
            places[toward] = one.site, tuple(one.setting["layers"]), one.strength
    tell(0.6, PARTS, "learning")
    alone = [(m, [toward], places) for m in config.methods if m not in both for toward in Toward]
    taught = Settings()
    for some, why in opened.map(_candidates, alone):
        taught, left_out = taught | some, left_out | why
    if config.screened:
        kept, _, more = _looked_at(opened, {key: some for key, some in taught.items() if len(some) > FEW})
        taught, rows = taught | kept, rows + more
    order = [name_of(method) for method in config.methods]
    found = {key: some for key, some in (found | taught).items() if key[0] not in left_out}
    if lacking := [key for key, some in found.items() if not some]:
        raise StudyError(f"{opened.cell.name}: {lacking[0][0]} has no setting to {lacking[0][1]} here")
    if not any(isinstance(one, SteeringVector) for some in found.values() for one in some):
        raise StudyError(f"{opened.cell.name}: no vector can be had here ({'; '.join(left_out.values())})")
    return dict(sorted(found.items(), key=lambda entry: order.index(entry[0][0]))), rows, left_out


def _looked_at(opened: SteeredCell, found: Settings) -> tuple[Settings, dict[Toward, Intervention], list[Row]]:
    """The settings that do best at a first look, the best one of each direction, and rows of the sweep."""
    every = [(key, one) for key, some in found.items() for one in some]
    looks = list(opened.map(_screened, [(one,) for _, one in every]))
    worth: dict[Key, list[float]] = {key: [] for key in found}
    best: dict[Toward, tuple[float, Intervention]] = {}
    for (key, one), (share, _) in zip(every, looks, strict=True):
        worth[key].append(share)
        if key[1] not in best or share > best[key[1]][0]:
            best[key[1]] = share, one
    kept = Settings()
    for key, some in found.items():
        first = np.argsort(-np.array(worth[key]), kind="stable")[: -(-len(some) // LEFT)]
        kept[key] = [some[place] for place in sorted(first.tolist())]
    return kept, {toward: one for toward, (_, one) in best.items()}, [row for _, row in looks]


def _candidates(
    opened: SteeredCell, method: str, towards: Sequence[Toward], places: Mapping[Toward, Any]
) -> tuple[Settings, Reasons]:
    """The settings of a method, fitted; or why there are none."""
    opened.bench.places.update(places)
    name = name_of(method)
    try:
        return {(name, toward): list(candidates(method, opened.bench, toward)) for toward in towards}, {}
    except InputError as error:
        if not opened.cell.config.steering.screened:
            raise
        return {}, {name: str(error)}


def _screened(opened: SteeredCell, one: Intervention) -> tuple[float, Row]:
    """What a setting steers of a few tune examples, less the larger of what gives neither answer and what is lost."""
    lists = opened.bench.choosing(one.toward, few=True)
    found = scores(one, lists.targets, margins=True, roughly=True)
    if not len(lists.targets):  # of few groups none may be left to steer, and then no setting is better
        return 0.0, sweep_row(opened.cell.config.steering.aim, one, found)
    wanted, other = (float(np.mean(found.behaviour_N == label)) for label in (one.toward, "other"))
    lost = [
        float(np.mean(scores(one, prompts, roughly=True).behaviour_N != label)) if wanted > 0.1 else 0.0
        for prompts, label in (() if one.everywhere else lists.kept.values())  # no cached prefix serves
    ]
    return wanted - max([other, *lost]), sweep_row(opened.cell.config.steering.aim, one, found)


def _rated(opened: SteeredCell, one: Intervention, place: int) -> tuple[Rated, list[Row]]:
    """An intervention's shares of the tune targets, and rows of the sweep."""
    config, lists = opened.cell.config.steering, opened.bench.choosing(one.toward)
    found = scores(one, lists.targets, margins=True, roughly=True)
    rows = [sweep_row(config.aim, one, found)]
    for name, (prompts, label) in lists.kept.items() if one.method in MAPPED and not config.screened else ():
        rows.append(sweep_row(name, one, scores(one, prompts, roughly=True), label))
    return rated_by(found, one, lists.targets, place), rows


def _chosen(opened: SteeredCell, rated: Mapping[Key, list[Rated]]) -> list[Chosen]:
    """The best setting of each method in each direction; where controls are few, those of what could win alone.

    The first of a direction is the best vector.
    """
    config = opened.cell.config.steering
    parts = [(key[1], some, not config.screened) for key, some in rated.items()]
    ranks = dict(zip(rated, opened.map(_ranked, parts), strict=True))
    finals: dict[Toward, list[Tuned]] = {}
    levers: dict[Toward, Tuned] = {}
    for toward in Toward:
        of_methods = [found for key, found in ranks.items() if key[1] == toward]
        firsts = [found[0] for found in of_methods]
        if config.screened:
            again = [t.rated for found in of_methods for t in found[:FINALISTS] if isinstance(t.one, SteeringVector)]
            found = _ranked(opened, toward, again, True)
            by_method = dict[str, Tuned]()
            for tuned in [*found, *firsts]:  # the first of each counts
                by_method.setdefault(tuned.one.method, tuned)
            finals[toward] = list(by_method.values())
            others = [tuned for tuned in firsts if not isinstance(tuned.one, SteeringVector)]
            levers[toward] = in_order([*found, *others])[0]
        else:
            rule, seed = _rule(opened, True), [opened.cell.seed, 1]
            finals[toward] = confirmed(opened.bench, opened.bench.choosing(toward), in_order(firsts), rule, seed)
            levers[toward] = finals[toward][0]
    return [
        Chosen(config.aim, tuned.one, tuned.within, tuned is finals[toward][0], tuned is levers[toward])
        for toward in Toward
        for tuned in finals[toward]
    ]


def _ranked(opened: SteeredCell, toward: Toward, some: Sequence[Rated], with_controls: bool) -> list[Tuned]:
    """Settings in order, by the rule of the study."""
    bench = opened.bench
    return choose(bench, bench.choosing(toward), some, _rule(opened, with_controls), [opened.cell.seed, 1])


def _rule(opened: SteeredCell, with_controls: bool) -> Rule:
    config = opened.cell.config.steering
    return Rule(
        lost=config.collateral_limit,
        neither=config.neither_limit,
        control=config.control_limit,
        excess=config.excess_cost,
        draws=config.tune_draws if with_controls else 0,
        refits=config.tune_refits if with_controls else 0,
        names=config.controls,
        roughly=True,
    )


def _compared(rated: Sequence[Rated]) -> list[Chosen]:
    """For each norm each method's setting that steers most tune targets, whatever controls do; of NMD that of all.

    The latter is how the paper chooses. Norms are those of a site, so methods are compared at one: the outputs of
    blocks where these were tried.
    """
    vectors = [
        (one.one, one.wanted.estimate) for one in rated if isinstance(one.one, SteeringVector) and one.one.is_constant
    ]
    sites: list[Site] = [one.site for one, _ in vectors]
    compared_at = "block" if "block" in sites else min(sites, default="")
    most: dict[tuple[Any, ...], tuple[SteeringVector, float]] = {}
    for one, wanted in vectors:
        keys: list[tuple[Any, ...]] = [(EQUAL_NORM, one.toward, one.method, one.strength)]
        keys = keys if one.site == compared_at else []
        keys += [(UNPENALIZED, one.toward, one.method)] if one.method == "nmd" else []
        for key in keys:
            if key not in most or wanted > most[key][1]:
                most[key] = one, wanted
    return [Chosen(key[0], one, within=False, best=False) for key, (one, _) in most.items()]


def _write_chosen(opened: SteeredCell, chosen: Sequence[Chosen], more: Mapping[str, Any]) -> list[Path]:
    """Write the chosen interventions, bound to their model, and ``chosen.json``, which has ``more`` facts."""
    cell, asking, bench, files = opened.cell, opened.asking, opened.bench, list[Path]()
    of_aim: dict[str, Any] = {"best": {}, "methods": {}}
    levers = {f"to_{one.one.toward}": one.one.method for one in chosen if one.lever}
    encoded = encode(asking, [example for pair in bench.pairs for example in pair])
    begin_alike = float(np.mean([one.shared > 0 for one in encoded]))
    fields = common.artefact_facts(cell, asking)
    of_vectors = fields | {"begin_alike": begin_alike, "opening": tuple(asking.prompting.opening(asking.tokenizer))}
    for one in chosen:
        direction, made = f"to_{one.one.toward}", one.one
        bound = replace(made, **(of_vectors if isinstance(made, SteeringVector) else fields))
        # Without its JSON, which the cards stage writes again.
        path = cell.folder / "vectors" / f"{direction}-{made.method}.safetensors"
        files += common.save_without_card(cell, bound, path)
        facts = {"method": made.method, "lever": made.lever, "passes": made.passes}
        facts |= {"within_limits": one.within, "begin_alike": begin_alike}
        of_aim["methods"].setdefault(made.method, {})[direction] = facts | columns_of(made, bench)
        if one.best:
            of_aim["best"][direction] = made.method
    found = {aim: of_aim for aim in AIMS} | {"aim": cell.config.steering.aim, "levers": levers, **more}
    return [*files, common.write_json(cell.records / "chosen.json", found)]
