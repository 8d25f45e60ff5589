"""Detection in the report: probes beside their baselines, learning curves, halves, seeds."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mnemoscope.errors import InputError
from mnemoscope.report.holds import measure_halves
from mnemoscope.report.read import measure_learning, measure_probes
from mnemoscope.report.results import merged
from mnemoscope.stages import probe as stage
from mnemoscope.statistics import over_seeds
from test_probing import TABLES, planted_cell


def made_up(seed: int, pulls: dict[Any, float], layers: int = 2) -> Any:
    """A cell's records, as the report reads them: ``pulls`` says how far each kind or (layer, offset) separates."""
    draw = np.random.default_rng(seed)
    labels, groups = np.tile([1, 0], 120), np.repeat([f"g{n // 4}" for n in range(120)], 2)
    parts = []
    for key, pull in pulls.items():
        kind, layer, offset = ("state", *key) if isinstance(key, tuple) else (key, -1, 0)
        scores = draw.normal(size=240) + pull * (2 * labels - 1)
        columns = {"kind": kind, "layer": layer, "offset": offset, "group": groups, "label": labels, "score": scores}
        parts.append(pd.DataFrame(columns))
    cell, states_NLD, fit_groups = planted_cell()
    rows = [(25, draw_, 9, "accuracy", 1, 0.6 + 0.01 * draw_ + seed / 100, 240) for draw_ in range(5)]
    rows += [(25, draw_, 9, "nmd_cosine", layer, 0.5, 25) for draw_ in range(5) for layer in (1, -1)]
    rows += [(90 + seed, 0, 30, "accuracy", 1, 0.9, 240)]
    rows += [(90 + seed, 0, 30, "nmd_cosine", layer, 1.0, 90) for layer in (1, -1)]
    learning = pd.DataFrame(rows, columns=["pairs", "draw", "groups", "what", "layer", "value", "n"])
    halves = pd.DataFrame(stage.halves_rows(cell, states_NLD, fit_groups))
    contrast = SimpleNamespace(nmd_LD=np.zeros((layers, 50)), site="block")
    records = {"probes": pd.concat(parts, ignore_index=True), "learning": learning, "halves": halves}
    return SimpleNamespace(name=f"made-up-{seed}", folder=Path("made-up"), contrast=contrast, **records)


PULLS = {
    **{(0, 0): 0.1, (1, 0): 1.2, (0, 1): 0.0, (1, 1): 0.7, (0, 4): 0.0, (1, 4): 0.0},
    **{"input_only": 0.3, "input_repeats": 1.2, "entropy": 0.2, "top_gap": 0.05, "shuffled": 0.0},
}


def test_probes_are_measured_by_offset_and_beside_every_baseline() -> None:
    made = made_up(0, PULLS)
    found = measure_probes(made)
    assert found.offsets == [0, 1, 4]
    assert list(found.accuracy_by_offset) == list(found.auroc_by_offset) == ["0", "1", "4"]
    assert found.accuracy == found.accuracy_by_offset["0"]
    assert found.best == found.best_by_offset["0"]
    right = {
        key: ((rows.score > 0) == (rows.label == 1)).to_numpy()
        for key, rows in made.probes.groupby(["kind", "layer", "offset"])
    }
    assert found.accuracy_by_offset["1"][1].estimate == pytest.approx(right["state", 1, 1].mean())
    assert found.baselines["entropy"].estimate == pytest.approx(right["entropy", -1, 0].mean())
    assert found.input_repeats.estimate == pytest.approx(right["input_repeats", -1, 0].mean())
    assert set(found.baselines) == {"entropy", "entropy_auroc", "top_gap", "top_gap_auroc"}
    assert found.best.picked == [1]
    for kind in ("input_only", "input_repeats", "entropy", "top_gap"):
        expected = right["state", 1, 0].mean() - right[kind, -1, 0].mean()
        assert getattr(found.best, f"minus_{kind}").estimate == pytest.approx(expected)
    assert (found.beats_input_only, found.beats_input_repeats) == ("yes", "unclear")
    assert found.known_from["chance"] == 1
    assert found.known_from["input_only"] in (0, 1)
    assert math.isnan(found.known_from["input_repeats"])


def test_a_probe_below_the_input_says_no() -> None:
    found = measure_probes(made_up(1, {**PULLS, (1, 0): 0.2, "input_only": 1.0}))
    assert found.beats_input_only == "no"
    assert math.isnan(found.known_from["input_only"])


def test_states_that_are_not_those_of_the_input_are_refused() -> None:
    made = made_up(0, PULLS)
    for where, name in ((made.probes.kind == "entropy", "'entropy'"), (made.probes.offset == 4, "layer 0, offset 4")):
        broken = SimpleNamespace(**{**vars(made), "probes": made.probes.drop(index=made.probes.index[where][0])})
        with pytest.raises(InputError, match=rf"the states of {name} are not those of 'input_only'"):
            measure_probes(broken)


def test_the_learning_curve_has_means_and_ranges_over_draws() -> None:
    found = measure_learning(made_up(0, PULLS))
    assert found.pairs == {"25": 25.0, "all": 90.0}
    assert found.picked == [1]
    assert asdict(found.accuracy["25"]) == pytest.approx({"estimate": 0.62, "low": 0.6, "high": 0.64, "n": 5})
    assert found.accuracy["all"].estimate == 0.9
    assert math.isnan(found.accuracy["all"].low)
    assert math.isnan(found.nmd_cosine["25"].low)  # five equal draws have no range to show


def test_halves_are_set_beside_their_chance() -> None:
    halves = measure_halves(made_up(0, PULLS))
    assert halves.halvings == 6
    assert [entry.n for entry in halves.nmd_cosine] == [6, 6]
    assert list(halves.overlap) == ["0.05", "0.1", "0.3"]
    tenth = halves.overlap["0.1"]
    assert tenth["share"].estimate == 1
    assert asdict(tenth["chance"]) == pytest.approx({"estimate": 0.1, "low": 0.0, "high": 0.3, "n": 10}, abs=0.1001)
    assert tenth["chance"].estimate == pytest.approx(0.1)
    assert tenth["chance_in_layers"].estimate == pytest.approx(0.2)


def test_nothing_measured_is_undefined() -> None:
    made = made_up(0, PULLS)
    empty = SimpleNamespace(**{**vars(made), **{name: getattr(made, name).iloc[:0] for name in TABLES}})
    found = measure_probes(empty)
    assert found.offsets == [0]
    assert not any(entry.known for entry in found.accuracy)
    assert (found.beats_input_only, found.beats_input_repeats) == ("unclear", "unclear")
    assert measure_learning(empty).accuracy == {}
    halves = measure_halves(empty)
    assert (halves.halvings, halves.overlap) == (0, {})
    assert not any(entry.known for entry in halves.nmd_cosine)


def test_two_seeds_merge_and_verdicts_are_of_both() -> None:
    """The first seed's verdict is yes; over two seeds that disagree it is not."""
    cells = [made_up(0, PULLS), made_up(1, {**PULLS, (1, 0): 0.1, "input_only": 1.0, (0, 2): 0.0, (1, 2): 0.0})]
    probes = [measure_probes(made) for made in cells]
    assert [probe.beats_input_only for probe in probes] == ["yes", "no"]
    both = merged(probes)
    assert both.beats_input_only == "unclear"
    assert (both.offsets, both.layers) == ([0, 1, 2, 4], [0, 1])
    for key in ("accuracy_by_offset", "auroc_by_offset"):
        parts = [getattr(probe, key) for probe in probes]
        assert getattr(both, key)["1"] == [over_seeds([part["1"][layer] for part in parts]) for layer in (0, 1)]
        assert getattr(both, key)["2"] == parts[1]["2"]  # only one seed has prompts that long
    assert both.baselines["top_gap"] == over_seeds([probe.baselines["top_gap"] for probe in probes])
    learning = merged([measure_learning(made) for made in cells])
    assert learning.pairs == {"25": 25.0, "all": 90.5}
    assert learning.picked == [1]
    assert learning.accuracy["25"].estimate == pytest.approx(0.625)
    halves = merged([measure_halves(made) for made in cells])
    assert halves.halvings == 12
    assert halves.overlap["0.1"]["chance"].estimate == pytest.approx(0.1)
    assert len(halves.rho_rank_correlation) == 2
