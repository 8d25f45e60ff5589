"""What is chosen for a cell, judged with its controls on lists of the test split, and what is recorded of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Scores, mark_confabulations
from mnemoscope.bench.answers import scores
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import Intervention, SteeringVector
from mnemoscope.interventions.controls import control_draws, has_equal_norm, shared_neurons
from mnemoscope.interventions.methods.nmd import alpha
from mnemoscope.interventions.sources import TAUGHT
from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages import common
from mnemoscope.study.stages.lists import JudgedList, RecordedBench

AIMS = {"pairs": "pairs", "conflict": "conflicts as drawn"}
JUDGED = 2_000_003  # added to the seed of controls on test
EXCHANGED = 1_000_000  # added to the numbers of tune examples, which are judged where groups are few
PARTS = 4  # of the stage's progress
Row = dict[str, Any]


class Chosen(NamedTuple):
    """An intervention that is judged.

    ``best``: of no method a vector gains more towards its behaviour; ``lever``: nothing of any kind does.
    """

    aim: str
    one: Intervention
    within: bool
    best: bool
    lever: bool = False


class SteeredCell(common.PerProcess):
    """A cell's bench and judged lists, beside its model."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.exchanged = False  # whether settings are chosen on the test split, and judged on tune
        self._prompts: tuple[tuple[bool, str, str], Prompts] | None = None

    def map(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterable[Any]:
        """``function(opened, *item)`` of each item, in parallel."""
        return self.cell.map(self, [(function, item, self.exchanged) for item in items])

    def __call__(self, part: tuple[Callable[..., Any], tuple[Any, ...], bool]) -> Any:
        function, item, self.exchanged = part
        return function(self, *item)

    @property
    def bench(self) -> RecordedBench:
        """What methods are fitted and chosen on."""
        return self._exchanged if self.exchanged else self._bench

    @cached_property
    def _bench(self) -> RecordedBench:
        return RecordedBench.of(self.cell, self.asking)

    @cached_property
    def _exchanged(self) -> RecordedBench:
        return self._bench.exchange()

    def prompts(self, direction: str, name: str) -> Prompts:
        """A judged list; one at a time and without tune lists, as prefix caches need memory."""
        self.bench.prepared.clear()
        place = self.exchanged, direction, name
        if self._prompts is None or self._prompts[0] != place:
            self._prompts = None
            self._prompts = place, self.bench.prompts(self.bench.judged[direction][name].examples)
        return self._prompts[1]


def judge_all(opened: SteeredCell, chosen: Sequence[Chosen], tell: Tell) -> list[pd.DataFrame]:
    """The tables of all chosen interventions and their controls on every test list, under either aim.

    The same are judged for both aims, so that a list is judged once; controls are drawn on what is aimed at, and of the
    best ones on the other aim's list.
    """
    config = opened.cell.config.steering

    def draws(one: Chosen, name: str) -> int:
        if one.aim not in AIMS:
            return config.norm_draws
        if name not in AIMS or not (one.best or (config.controls_of == "all" and name == config.aim)):
            return 0
        if config.screened and name != config.aim:
            return 0
        draws = config.draws if one.best else min(config.draws, config.other_draws)
        return draws if name == "pairs" else config.conflict_draws

    def judges(one: Chosen, name: str) -> bool:
        if one.aim not in AIMS:
            return name == "pairs"
        return one.best or not config.screened or config.aim == "pairs" or not name.startswith("pairs")

    parts = [
        (one, name, draws(one, name))
        for direction, lists in opened.bench.judged.items()
        for name in lists
        for one in chosen
        if f"to_{one.one.toward}" == direction and judges(one, name)
    ]
    tables = list[pd.DataFrame]()
    for done, ((one, name, _), found) in enumerate(zip(parts, opened.map(_judge, parts), strict=True), 1):
        tell(2.5 + 1.5 * done / len(parts), PARTS, f"to_{one.one.toward}: {name} on test, vectors and controls")
        if one.aim not in AIMS:
            tables += found
            continue
        for aim in AIMS:  # a control belongs to the list that it was drawn on
            tables += [table.assign(aim=aim) for table in found if table["role"].iloc[0] == "vector" or name == aim]
    return tables


def _judge(opened: SteeredCell, one: Chosen, name: str, draws: int) -> list[pd.DataFrame]:
    """Tables of an intervention and of the draws of its controls on one test list."""
    cell, asking, bench, direction = opened.cell, opened.asking, opened.bench, f"to_{one.one.toward}"
    entry, prompts = bench.judged[direction][name], opened.prompts(direction, name)
    found = scores(one.one, prompts, margins=True)
    if entry.examples[0].kind == "conflict" and isinstance(one.one, SteeringVector):
        applied = partial(one.one.apply, asking.model)
        mark_confabulations(asking, entry.examples, found, bench.task.has_memorized_format, applied)
    tables = [judged_table(one.one, one.aim, ("vector", 0), name, entry, found)]
    config = cell.config.steering
    for control in config.controls if draws and has_equal_norm(one.one) else ():
        assert has_equal_norm(one.one)
        # Shuffles depend on the first number of the seed; none that ranked settings is used again.
        stream = zlib.crc32(f"{one.aim}/{direction}/{one.one.method}/{control}".encode())
        learned = config.learned_refits if one.one.is_constant else config.low_rank.refits
        n = min(draws, learned) if control in TAUGHT else draws
        for number, drawn in control_draws(control, bench, one.one, n, [cell.seed + JUDGED, stream]):
            tables.append(judged_table(one.one, one.aim, (control, number), name, entry, scores(drawn, prompts)))
    if opened.exchanged:
        return [table.assign(split="tune", example=table.example + EXCHANGED) for table in tables]
    return tables


def columns_of(one: Intervention, bench: RecordedBench) -> Row:
    """A chosen setting as ``chosen.json`` has it."""
    if not isinstance(one, SteeringVector):
        where: Row = {"site": "block", "layers": [], "positions": "all"}
        return where | {"top": 1.0, "strength": 1.0, "alpha": np.nan, "shared": np.nan}
    facts: Row = {name: getattr(one, name) for name in ("site", "positions", "top", "strength")}
    facts |= {"alpha": alpha(bench, one) if one.method == "nmd" else np.nan}
    facts |= {"shared": shared_neurons(one.dense(*bench.sources(one.site).shape_LD))}
    return facts | {"layers": list(one.setting.get("layers", one.layers))}


def judged_table(
    one: Intervention, aim: str, role: tuple[str, int], name: str, entry: JudgedList, found: Scores
) -> pd.DataFrame:
    """One row per steered test example."""
    row: Row = {"aim": aim, **_columns(one), "role": role[0], "draw": role[1], "examples": name}
    row |= {"example": np.arange(len(entry.examples)), "split": "test", "before": entry.before}
    row |= {key: [getattr(example, key) for example in entry.examples] for key in ("group", "family")}
    row |= {"after": found.behaviour_N, "margin_before": entry.margin_N, "margin": found.margin_N}
    return pd.DataFrame(row | {"confabulated": found.confabulated_N})


def sweep_row(name: str, one: Intervention, found: Scores, label: str | None = None) -> Row:
    """A row of the sweep: behaviours under a setting, or the share that keeps its ``label``."""
    row = {"examples": name, "n": len(found.behaviour_N), **_columns(one)}
    row |= dict.fromkeys(("shift", "stay", "other", "kept", "margin", "margin_sd"), np.nan)
    if not row["n"]:  # of few groups none may be left to steer
        return row
    if label is not None:
        return row | {"kept": float(np.mean(found.behaviour_N == label))}
    shares = {"shift": one.toward, "stay": one.toward.opposite, "other": "other"}
    row |= {"margin": float(found.margin_N.mean()), "margin_sd": float(found.margin_N.std())}
    return row | {column: float(np.mean(found.behaviour_N == behaviour)) for column, behaviour in shares.items()}


def _columns(one: Intervention) -> Row:
    """A setting in the columns of the records; layers as ``0-3`` for a range, else between commas."""
    row: Row = {"direction": f"to_{one.toward}", "method": one.method}
    if not isinstance(one, SteeringVector):
        return row | {"site": "", "layers": "", "top": 1.0, "strength": 1.0}
    layers = list(one.setting.get("layers", one.layers)) or [0]
    in_a_row = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    shown = f"{layers[0]}-{layers[-1]}" if in_a_row else ",".join(map(str, layers))
    return row | {"site": one.site, "layers": shown, "top": one.top, "strength": one.strength}
