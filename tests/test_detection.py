"""Detection in the report: probes beside their baselines, learning curves, halves, seeds."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mnemoscope.report.rows import Part, rows_of, view
from mnemoscope.report.stories import read
from mnemoscope.runs.errors import InputError
from mnemoscope.study.stages import probe as stage
from test_probes import planted_cell


def made_up(seed: int, pulls: dict[Any, float], layers: int = 2) -> Any:
    """A cell's records, as the report reads them: ``pulls`` says how far each kind or (layer, offset) separates."""
    draw = np.random.default_rng(seed)
    labels, groups = np.tile([1, 0], 120), np.repeat([f"g{n // 4}" for n in range(120)], 2)
    parts = []
    for key, pull in pulls.items():
        kind, layer, offset = ("state", *key) if isinstance(key, tuple) else (key, -1, 0)
        scores = draw.normal(size=240) + pull * (2 * labels - 1)
        columns = {"kind": kind, "layer": layer, "offset": offset, "group": groups, "label": labels, "score": scores}
        columns["draw"] = math.nan
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


def measured(cell: Any) -> Part:
    """What the report says of a cell's probes."""
    probe = view(rows_of(read.measure(cell))).probe
    return Part({**probe, **read.verdicts(probe)})


PULLS = {
    **{(0, 0): 0.1, (1, 0): 1.2, (0, 1): 0.0, (1, 1): 0.7, (0, 4): 0.0, (1, 4): 0.0},
    **{"input_only": 0.3, "input_repeats": 1.2, "entropy": 0.2, "top_gap": 0.05, "shuffled": 0.0},
}


def test_probes_are_measured_by_offset_and_beside_every_baseline() -> None:
    made = made_up(0, PULLS)
    found = measured(made)
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


def test_states_that_are_not_those_of_the_input_are_refused() -> None:
    made = made_up(0, PULLS)
    for where, name in ((made.probes.kind == "entropy", "'entropy'"), (made.probes.offset == 4, "layer 0, offset 4")):
        broken = SimpleNamespace(**{**vars(made), "probes": made.probes.drop(index=made.probes.index[where][0])})
        with pytest.raises(InputError, match=rf"the states of {name} are not those of 'input_only'"):
            measured(broken)


def test_the_best_layer_is_not_chosen_on_what_it_is_scored_on() -> None:
    """With layers that are coins, the best of many is above one half, and the cross-fitted score is not."""
    coins = {(layer, 0): 0.0 for layer in range(12)} | dict.fromkeys(("input_only", "input_repeats"), 0.0)
    found = measured(made_up(3, coins | dict.fromkeys(("entropy", "top_gap", "shuffled"), 0.0), layers=12))
    assert found.best.accuracy.estimate < max(entry.estimate for entry in found.accuracy)
    assert found.best.accuracy.low < 0.5 < found.best.accuracy.high
