"""Detection: earlier states against plain transformers, the probes stage, and what the report says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import hook_count, mini_examples
from mnemoscope.behaviour import Asking, prepare, score
from mnemoscope.cells import Cell, cells_of
from mnemoscope.config import ProbesConfig, load_study
from mnemoscope.errors import InputError
from mnemoscope.report.intervals import spread
from mnemoscope.report.measures_detection import measure_consistency, measure_learning, measure_probes, statements
from mnemoscope.report.results import _merge
from mnemoscope.stages import probe as stage
from mnemoscope.stages.probe import SHUFFLES, TOPS, Phrasings, probes_stage, read_back, readable_offsets
from mnemoscope.statistics import Estimate, over_seeds

TABLES = ("probes", "learning", "halves")


# --- states at earlier positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["inference", "addition"])
def test_earlier_states_are_those_of_plain_transformers(mini: Callable[[str], Asking], task: str) -> None:
    """One unpadded pass per prompt, by the library's own ``hidden_states``."""
    asking = replace(mini(task), batch_size=7)
    examples = mini_examples(task, 30)
    batches = prepare(asking, examples)
    offsets = readable_offsets((5, 0, 2, 1, 4), batches)
    states_ONLD, uncertainty_N2 = read_back(asking, batches, "block", offsets)
    assert states_ONLD.shape[:2] == (len(offsets), 30)
    final_norm = asking.model.base_model.ln_f
    for batch in batches:
        for row, n in enumerate(batch.examples_N):
            context = batch.ids_NT[row][batch.mask_NT[row] == 1][None]
            with torch.no_grad():
                output = asking.model(context, output_hidden_states=True)
            for place, offset in enumerate(offsets):
                found = torch.tensor(states_ONLD[place, n])
                expected = torch.stack([h[0, -1 - offset] for h in output.hidden_states[1:]])
                torch.testing.assert_close(found[:-1], expected[:-1], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(final_norm(found[-1]), expected[-1], atol=2e-5, rtol=1e-4)
            p = torch.softmax(output.logits[0, -1].double(), 0)
            gap = float(p.topk(2).values.log().diff().abs())
            assert uncertainty_N2[n] == pytest.approx([-float((p * p.log()).sum()), gap], abs=1e-3)


@pytest.mark.parametrize("site", ["block", "attention", "mlp", "neuron"])
def test_what_follows_a_position_does_not_change_its_state(mini: Callable[[str], Asking], site: Any) -> None:
    """An earlier state is the state at the end of the prompt cut short; at offset 0 it is what labelling reads."""
    asking = mini("addition")
    batches, hooks = prepare(asking, mini_examples("addition", 40)), hook_count(asking.model)
    states_ONLD, uncertainty_N2 = read_back(asking, batches, site, [0, 1, 3])
    assert hook_count(asking.model) == hooks
    labelled = score(asking, batches, capture=site).states_NLD
    assert labelled is not None
    np.testing.assert_allclose(states_ONLD[0], labelled, atol=2e-5)
    for place, offset in ((1, 1), (2, 3)):
        cut = [replace(b, ids_NT=b.ids_NT[:, :-offset], mask_NT=b.mask_NT[:, :-offset]) for b in batches]
        shorter, _ = read_back(asking, cut, site, [0])
        np.testing.assert_allclose(states_ONLD[place], shorter[0], atol=2e-5)
    alone, unknown = read_back(asking, batches, site, [3])
    np.testing.assert_allclose(alone[0], states_ONLD[2], atol=2e-5)
    assert np.isnan(unknown).all()
    assert (uncertainty_N2 >= 0).all()


def test_offsets_that_the_shortest_prompt_lacks_are_dropped(mini: Callable[[str], Asking]) -> None:
    batches = prepare(mini("addition"), mini_examples("addition", 60))
    shortest = min(int(batch.mask_NT.sum(1).min()) for batch in batches)
    assert readable_offsets((16, 0, shortest, shortest - 1, 1), batches) == [0, 1, shortest - 1]


def test_offsets_are_read_in_runs_that_fit_in_memory() -> None:
    assert [list(run) for run in stage._that_fit([0, 1, 2, 4, 8], stage.MEMORY // 2)] == [[0, 1], [2, 4], [8]]
    assert [list(run) for run in stage._that_fit([0, 1], 3 * stage.MEMORY)] == [[0], [1]]


def pair_table(pairs: int) -> pd.DataFrame:
    rows: dict[str, Any] = {"item": [f"i{n}" for n in range(pairs)], "group": [f"g{n // 2}" for n in range(pairs)]}
    rows |= {"split": "fit", "memorized": "7", "generalized": "12", "is_pair": True}
    for letter, behaviours in (("a", ("generalized", "memorized")), ("b", ("memorized", "generalized"))):
        rows[f"behaviour_{letter}"] = [behaviours[n % 2] for n in range(pairs)]
        rows[f"prompt_{letter}"] = [f"{n} {behaviours[n % 2]}" for n in range(pairs)]
        rows[f"family_{letter}"] = letter
    return pd.DataFrame(rows)


def test_the_side_answered_generalized_comes_first_and_the_cap_is_drawn_at_random() -> None:
    table = pair_table(30)
    table.loc[3, "is_pair"] = False
    table.loc[4, "split"] = "test"
    part = Phrasings.of(table, "fit", 100, np.random.default_rng(0))
    assert len(part.examples) == 56
    assert part.labels_N.tolist() == [1, 0] * 28
    assert [e.prompt.split()[1] for e in part.examples] == ["generalized", "memorized"] * 28
    assert part.groups_P == [f"g{n // 2}" for n in range(30) if n not in (3, 4)]
    few = [Phrasings.of(table, "fit", 10, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert [len(part.examples) for part in few] == [20] * 3
    assert few[0].examples == few[1].examples != few[2].examples
    places = [int(e.prompt.split()[0]) for e in few[0].examples]
    assert places == sorted(places)
    assert max(places) > 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offsets": (1, 2)}, "lack 0"),
        ({"offsets": (0, 2, 2)}, "there twice"),
        ({"offsets": (0, -1)}, "greater than or equal to 0"),
        ({"learning": (0,)}, "greater than or equal to 1"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbesConfig(**fields)


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cell(mini_run: Path) -> Cell:
    """The cell of the miniature run."""
    return cells_of(load_study(str(mini_run / "study.yaml")), mini_run)[0]


@pytest.fixture(scope="module")
def tables(cell: Cell) -> dict[str, pd.DataFrame]:
    return {name: pd.read_parquet(cell.records / f"{name}.parquet") for name in ("pairs", *TABLES)}


def test_every_kind_scores_the_same_test_states(cell: Cell, tables: dict[str, pd.DataFrame]) -> None:
    pairs, probes = tables["pairs"], tables["probes"]
    test = pairs[pairs.is_pair & (pairs.split == "test")]
    groups = np.repeat(test.group.to_numpy(), 2)
    offsets = sorted(probes.offset.unique())
    assert offsets == sorted(cell.config.probes.offsets)  # all are within "12+34="
    kinds = {("state", layer, offset): 1 for layer in (0, 1) for offset in offsets}
    kinds |= {("shuffled", layer, 0): SHUFFLES for layer in (0, 1)}
    kinds |= {(kind, -1, 0): 1 for kind in ("input_only", "input_repeats", "entropy", "top_gap")}
    found = dict(iter(probes.groupby(["kind", "layer", "offset"])))
    assert set(found) == set(kinds)
    for key, times in kinds.items():
        assert (found[key].group.to_numpy() == np.tile(groups, times)).all()
        assert (found[key].label.to_numpy() == np.tile([1, 0], len(test) * times)).all()
    assert np.isfinite(probes.score).all()


def test_a_baseline_of_one_number_is_monotone_in_it(cell: Cell, tables: dict[str, pd.DataFrame]) -> None:
    """And its direction was learned elsewhere: the table holds scores, not the numbers turned the right way round."""
    asking = stage.cell_model(cell)
    test = Phrasings.of(tables["pairs"], "test", 10_000, np.random.default_rng(0))
    _, uncertainty_N2 = read_back(asking, prepare(asking, test.examples), "block", [0])
    for column, kind in enumerate(("entropy", "top_gap")):
        scores_N = tables["probes"].score[tables["probes"].kind == kind].to_numpy()
        slope, at_zero = np.polyfit(uncertainty_N2[:, column], scores_N, 1)
        np.testing.assert_allclose(scores_N, at_zero + slope * uncertainty_N2[:, column], atol=1e-4)


def test_saved_probes_give_the_scores_of_the_table(cell: Cell, tables: dict[str, pd.DataFrame]) -> None:
    saved = json.loads((cell.folder / "probe.json").read_text())
    asking = stage.cell_model(cell)
    test = Phrasings.of(tables["pairs"], "test", 10_000, np.random.default_rng(0))
    states_NLD = read_back(asking, prepare(asking, test.examples), "block", [0])[0][0]
    for layer, probe in enumerate(saved["layers"]):
        scores_N = states_NLD[:, layer] @ np.array(probe["weights"]) + probe["bias"]
        recorded = tables["probes"].query("kind == 'state' and offset == 0 and layer == @layer").score
        np.testing.assert_allclose(recorded, scores_N, atol=1e-4)
    accuracies = [probe["tune_accuracy"] for probe in saved["layers"]]
    assert saved["best_layer"] == int(np.argmax(accuracies))


def test_the_learning_curve_ends_at_the_probe_and_the_contrast(cell: Cell, tables: dict[str, pd.DataFrame]) -> None:
    learning, pairs = tables["learning"], tables["pairs"]
    fit = pairs[pairs.is_pair & (pairs.split == "fit")]
    layer = json.loads((cell.folder / "probe.json").read_text())["best_layer"]
    sizes = [size for size in cell.config.probes.learning if size < len(fit)]
    assert sorted(learning.pairs.unique()) == [*sizes, len(fit)]
    whole = learning[learning.pairs == len(fit)].set_index(["what", "layer"])
    best = tables["probes"].query("kind == 'state' and offset == 0 and layer == @layer")
    accuracy = ((best.score > 0) == (best.label == 1)).mean()
    assert whole.value["accuracy", layer] == pytest.approx(accuracy)
    assert whole.n["accuracy", layer] == len(best)
    assert whole.value["nmd_cosine", layer] == pytest.approx(1)
    assert whole.value["nmd_cosine", -1] == pytest.approx(1)
    assert set(whole.groups) == {fit.group.nunique()}
    few = learning[learning.pairs == min(sizes)]
    assert sorted(few.draw.unique()) == list(range(cell.config.probes.learning_draws))
    assert few[few.what == "nmd_cosine"].value.between(-1, 0.999).all()
    assert few[few.what == "accuracy"].value.nunique() > 1


def test_halves_agree_more_than_chance(cell: Cell, tables: dict[str, pd.DataFrame]) -> None:
    halves = tables["halves"]
    assert sorted(halves.halving.unique()) == list(range(cell.config.probes.halvings))
    assert halves.value.between(-1, 1).all()
    overlap = halves[halves.what == "overlap"]
    assert tuple(overlap.top.unique()) == TOPS
    for top, rows in overlap.groupby("top"):
        count = math.ceil(top * 2 * 64)
        assert (rows.n == count).all()
        np.testing.assert_allclose(rows.chance, count / 128)
        assert (rows.chance_low <= rows.chance).all()
        assert (rows.chance <= rows.chance_high).all()
    inside = halves[halves.what == "overlap_in_layers"]
    np.testing.assert_allclose(inside.value, overlap.value)
    assert (inside.chance >= overlap.chance.to_numpy() - 1e-12).all()
    assert overlap.value.mean() > overlap.chance_high.mean()


def planted_cell() -> tuple[Any, np.ndarray, list[str]]:
    """A cell's settings, and fit states whose first layer tells the labels apart and whose second is noise."""
    draw = np.random.default_rng(3)
    signs = np.tile([1, -1], 400)[:, None]
    effect = np.where(np.arange(50) % 5 == 0, 0.8, 0.0)
    states_NLD = draw.normal(size=(800, 2, 50))
    states_NLD[:, 0] += signs * effect
    settings = SimpleNamespace(probes=ProbesConfig(halvings=6), pairs=SimpleNamespace(site="block"))
    return SimpleNamespace(seed=0, config=settings), states_NLD, [f"g{n // 4}" for n in range(400)]


def test_halves_of_planted_neurons_agree_and_halves_of_noise_do_not() -> None:
    halves = pd.DataFrame(stage.halves_rows(*planted_cell()))
    by = halves.fillna({"top": 0}).groupby(["what", "layer", "top"]).value.mean()
    assert by["nmd_cosine", 0, 0] > 0.95
    assert abs(by["nmd_cosine", 1, 0]) < 0.25
    assert by["rho_rank_correlation", 0, 0] > 0.4
    assert abs(by["rho_rank_correlation", 1, 0]) < 0.25
    assert by["overlap", -1, 0.1] == 1  # the ten planted neurons
    inside = halves[(halves.what == "overlap_in_layers") & (halves.top == 0.1)]
    np.testing.assert_allclose(inside.chance, 10 / 50)  # all in one layer of fifty
    assert not list(stage.halves_rows(planted_cell()[0], planted_cell()[1], ["one"] * 400))


def test_memory_changes_nothing_in_the_records(
    cell: Cell, tables: dict[str, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one offset at a time every table is what it was, up to rounding."""
    copy = replace(cell, folder=tmp_path / "cell")
    copy.records.mkdir(parents=True)
    (copy.folder / "model").symlink_to((cell.folder / "model").resolve())
    tables["pairs"].to_parquet(copy.records / "pairs.parquet", index=False)
    monkeypatch.setattr(stage, "MEMORY", 1)
    told: list[float] = []
    files = probes_stage(copy, lambda done, total, note: told.append(done / total))
    assert {path.name for path in files} == {"probe.json", *(f"{name}.parquet" for name in TABLES)}
    assert told == sorted(told)
    for name in TABLES:
        again = pd.read_parquet(copy.records / f"{name}.parquet")
        pd.testing.assert_frame_equal(again, tables[name], atol=2e-3, rtol=1e-2)


# --- the report -----------------------------------------------------------------------------------------------------


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
    contrast = SimpleNamespace(nmd=np.zeros((layers, 50)), site="block")
    records = {"probes": pd.concat(parts, ignore_index=True), "learning": learning, "halves": halves}
    return SimpleNamespace(name=f"made-up-{seed}", folder=Path("made-up"), contrast=contrast, **records)


PULLS = {
    **{(0, 0): 0.1, (1, 0): 1.2, (0, 1): 0.0, (1, 1): 0.7, (0, 4): 0.0, (1, 4): 0.0},
    **{"input_only": 0.3, "input_repeats": 1.2, "entropy": 0.2, "top_gap": 0.05, "shuffled": 0.0},
}


def test_probes_are_measured_by_offset_and_beside_every_baseline() -> None:
    made = made_up(0, PULLS)
    found = measure_probes(made)
    assert found["offsets"] == [0, 1, 4]
    assert list(found["accuracy_by_offset"]) == list(found["auroc_by_offset"]) == ["0", "1", "4"]
    assert found["accuracy"] == found["accuracy_by_offset"]["0"]
    assert found["best"] == found["best_by_offset"]["0"]
    right = {
        key: ((rows.score > 0) == (rows.label == 1)).to_numpy()
        for key, rows in made.probes.groupby(["kind", "layer", "offset"])
    }
    assert found["accuracy_by_offset"]["1"][1].estimate == pytest.approx(right["state", 1, 1].mean())
    assert found["baselines"]["entropy"].estimate == pytest.approx(right["entropy", -1, 0].mean())
    assert found["input_repeats"].estimate == pytest.approx(right["input_repeats", -1, 0].mean())
    assert set(found["baselines"]) == {"entropy", "entropy_auroc", "top_gap", "top_gap_auroc"}
    assert found["best"]["picked"] == [1]
    for kind in ("input_only", "input_repeats", "entropy", "top_gap"):
        expected = right["state", 1, 0].mean() - right[kind, -1, 0].mean()
        assert found["best"][f"minus_{kind}"].estimate == pytest.approx(expected)
    assert (found["beats_input_only"], found["beats_input_repeats"]) == ("yes", "unclear")
    assert found["known_from"]["chance"] == 1
    assert found["known_from"]["input_only"] in (0, 1)
    assert math.isnan(found["known_from"]["input_repeats"])


def test_a_probe_below_the_input_says_no() -> None:
    found = measure_probes(made_up(1, {**PULLS, (1, 0): 0.2, "input_only": 1.0}))
    assert found["beats_input_only"] == "no"
    assert math.isnan(found["known_from"]["input_only"])


def test_states_that_are_not_those_of_the_input_are_refused() -> None:
    made = made_up(0, PULLS)
    for where, name in ((made.probes.kind == "entropy", "'entropy'"), (made.probes.offset == 4, "layer 0, offset 4")):
        broken = SimpleNamespace(**{**vars(made), "probes": made.probes.drop(index=made.probes.index[where][0])})
        with pytest.raises(InputError, match=rf"the states of {name} are not those of 'input_only'"):
            measure_probes(broken)


def test_the_learning_curve_has_means_and_ranges_over_draws() -> None:
    found = measure_learning(made_up(0, PULLS))
    assert found["pairs"] == {"25": 25.0, "all": 90.0}
    assert found["picked"] == [1]
    assert found["accuracy"]["25"].as_dict() == pytest.approx({"estimate": 0.62, "low": 0.6, "high": 0.64, "n": 5})
    assert found["accuracy"]["all"].estimate == 0.9
    assert math.isnan(found["accuracy"]["all"].low)
    assert math.isnan(found["nmd_cosine"]["25"].low)  # five equal draws have no range to show
    assert set(found) == {"picked", "pairs", "accuracy", "nmd_cosine", "nmd_cosine_at_layer"}


def test_halves_are_told_beside_their_chance() -> None:
    made = made_up(0, PULLS)
    halves = measure_consistency(made)["halves"]
    assert halves["halvings"] == 6
    assert [entry.n for entry in halves["nmd_cosine"]] == [6, 6]
    assert list(halves["overlap"]) == ["0.05", "0.1", "0.3"]
    tenth = halves["overlap"]["0.1"]
    assert tenth["share"].estimate == 1
    assert tenth["chance"].as_dict() == pytest.approx({"estimate": 0.1, "low": 0.0, "high": 0.3, "n": 10}, abs=0.1001)
    assert tenth["chance"].estimate == pytest.approx(0.1)
    assert tenth["chance_in_layers"].estimate == pytest.approx(0.2)


def test_nothing_measured_is_undefined() -> None:
    made = made_up(0, PULLS)
    empty = SimpleNamespace(**{**vars(made), **{name: getattr(made, name).iloc[:0] for name in TABLES}})
    found = measure_probes(empty)
    assert found["offsets"] == [0]
    assert all(math.isnan(entry.estimate) for entry in found["accuracy"])
    assert (found["beats_input_only"], found["beats_input_repeats"]) == ("unclear", "unclear")
    assert measure_learning(empty)["accuracy"] == {}
    halves = measure_consistency(empty)["halves"]
    assert (halves["halvings"], halves["overlap"]) == (0, {})
    assert all(math.isnan(entry.estimate) for entry in halves["nmd_cosine"])


def test_two_seeds_merge_and_words_are_said_of_both() -> None:
    """The first seed's verdict is yes; over two seeds that disagree it is not."""
    cells = [made_up(0, PULLS), made_up(1, {**PULLS, (1, 0): 0.1, "input_only": 1.0, (0, 2): 0.0, (1, 2): 0.0})]
    trees = [measure_probes(made) for made in cells]
    assert [tree["beats_input_only"] for tree in trees] == ["yes", "no"]
    merged = _merge(trees, "probe")
    merged |= statements(merged)
    assert merged["beats_input_only"] == "unclear"
    assert merged["offsets"] == [0, 1, 2, 4]
    assert merged["layers"] == [0, 1]
    for key in ("accuracy_by_offset", "auroc_by_offset"):
        assert merged[key]["1"] == [over_seeds([tree[key]["1"][layer] for tree in trees]) for layer in (0, 1)]
        assert merged[key]["2"] == trees[1][key]["2"]  # only one seed has prompts that long
    assert merged["baselines"]["top_gap"] == over_seeds([tree["baselines"]["top_gap"] for tree in trees])
    learning = _merge([measure_learning(made) for made in cells], "learning")
    assert learning["pairs"] == {"25": 25.0, "all": 90.5}
    assert learning["picked"] == [1]
    assert learning["accuracy"]["25"].estimate == pytest.approx(0.625)
    halves = _merge([measure_consistency(made) for made in cells], "consistency")["halves"]
    assert halves["halvings"] == 12
    assert halves["overlap"]["0.1"]["chance"].estimate == pytest.approx(0.1)
    assert len(halves["rho_rank_correlation"]) == 2


def test_a_spread_is_a_mean_with_its_range() -> None:
    assert spread([0.2, math.nan, 0.6, 0.4]) == Estimate(pytest.approx(0.4), 0.2, 0.6, 3)
    assert math.isnan(spread([0.5]).low)
    assert spread([math.nan]).n == 0
