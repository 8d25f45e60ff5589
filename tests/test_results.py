"""The numbers of ``results.json`` against independent computations from the records."""

from __future__ import annotations

import json
import math
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from made_up import CONTROLS, DOSES, LAYERS, ROLES, SIDES, SOURCE, TARGET, results_of
from mnemoscope.bench.choose import Rated
from mnemoscope.interventions import SteeringVector
from mnemoscope.paper import compare
from mnemoscope.report.page import explained
from mnemoscope.report.records import columns_of, declared_tables, read_run
from mnemoscope.report.results import measure_run
from mnemoscope.report.rows import Part, parts_of
from mnemoscope.report.rows import table as long_table
from mnemoscope.report.stories.where import ablation, measure_layers
from mnemoscope.report.words import REFITTED
from mnemoscope.statistics import Estimate
from mnemoscope.study.stages.steer import _compared

DIRECTION = pytest.mark.parametrize("direction", list(SOURCE))


@pytest.fixture(scope="module")
def results(run: Path) -> Part:
    return results_of(run)


@pytest.fixture(scope="module")
def task(results: Part) -> Part:
    return results.tasks["addition"]


def table(run: Path, name: str, cell: str = "addition-0", **wanted: Any) -> pd.DataFrame:
    """Rows of a record that have the wanted values."""
    rows = pd.read_parquet(run / "cells" / cell / "records" / f"{name}.parquet")
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows


def at(part: Part, path: str) -> Any:
    """What is at a path of keys."""
    return reduce(lambda found, key: found[key], path.split("."), part)


def agrees(entry: Estimate, values: Any) -> None:
    """The estimate is the mean of the values, rests on all of them and lies within its interval."""
    assert entry.estimate == pytest.approx(float(np.mean(values)), abs=1e-12)
    assert entry.n == len(values)
    assert entry.low <= entry.estimate <= entry.high


def test_behaviour_and_pairs_are_counted_on_the_test_split(run: Path, task: Part) -> None:
    agrees(task.behaviour.recall, table(run, "behaviour", kind="memory").behaviour == "correct")
    agrees(task.behaviour.novel_accuracy, table(run, "behaviour", kind="novel").behaviour == "correct")
    conflict = table(run, "behaviour", kind="conflict")
    for behaviour in ("memorized", "generalized", "other"):
        agrees(task.behaviour.conflict[behaviour], conflict.behaviour == behaviour)
    agrees(task.behaviour.conflict["confabulated"], conflict.confabulated)
    pairs = table(run, "pairs")
    for split, counts in task.pairs.by_split.items():
        part = pairs[(pairs.split == split) | (split == "all")]
        assert (counts.candidates, counts.pairs) == (len(part), part.is_pair.sum())
        assert counts.groups == part[part.is_pair].group.nunique()
        agrees(counts["yield"], part.is_pair)
    assert task.pairs.pairs == task.pairs.by_split["test"].pairs < task.pairs.by_split["all"].pairs


def test_contrast_and_probes_by_layer(run: Path, task: Part) -> None:
    arrays, probe = load_file(run / "cells" / "addition-0" / "contrast.safetensors"), task.probe
    shuffled = table(run, "probes", kind="shuffled")
    agrees(probe.shuffled, (shuffled.score > 0) == (shuffled.label == 1))
    for layer in range(LAYERS):
        assert task.contrast.mean_abs_nmd[layer] == pytest.approx(np.abs(arrays["nmd"][layer]).mean())
        assert task.contrast.max_abs_rho[layer] == np.abs(arrays["rho"][layer]).max()
        assert task.contrast.significant_fraction[layer] == (arrays["p_family_wise"][layer] <= 0.05).mean()
        scored = table(run, "probes", kind="state", layer=layer, offset=0)
        agrees(probe.accuracy[layer], (scored.score > 0) == (scored.label == 1))
        above, below = (scored.score[scored.label == label].to_numpy() for label in (1, 0))
        assert probe.auroc[layer].estimate == pytest.approx((above[:, None] > below).mean())


@DIRECTION
@pytest.mark.parametrize("aim", ["pairs", "conflict"])
def test_steering_shares_controls_and_differences(run: Path, task: Part, direction: str, aim: str) -> None:
    block, target = task.steering[direction], TARGET[direction]
    assert (block.chosen.method, block.chosen.strength, block.chosen_conflict.strength) == ("gradient", 0.4, 0.8)
    everything = table(run, "steering", aim=aim, method="gradient", direction=direction)
    rows = everything[everything.examples == aim]
    for role in ROLES:
        part, found = rows[rows.role == role], (block if role == "vector" else block.controls[role])[aim]
        for key, after in (("shift", target), ("stay", SOURCE[direction]), ("other", "other")):
            agrees(found[key], part.after == after)
        if role != "vector":
            by_draw = (part.after == target).groupby(part.draw).mean()
            assert block.controls[role].worst[aim].shift.estimate == pytest.approx(by_draw.max())
            difference = block.minus_control[role][aim]
            assert difference.estimate == pytest.approx(block[aim].shift.estimate - by_draw.mean())
            assert difference.low <= difference.estimate <= difference.high
    assert ("best_conflict" in block) == (direction == "to_memorized")
    assert task.steering.to_memorized.best_conflict.chosen_conflict.method == "nmd"
    if aim == "pairs":  # conflicts under the setting for pairs, and phrasings that lost the stored key
        vector = everything[everything.role == "vector"]
        agrees(block.conflict_at_chosen.shift, vector[vector.examples == "conflict"].after == target)
        agrees(block.confabulated, vector[vector.examples == "pairs"].confabulated)
        assert block.pairs_unreachable.shift.n == (9 if direction == "to_memorized" else 0)
        assert block.pairs_unreachable.shift.known == (direction == "to_memorized")


@DIRECTION
def test_methods_are_compared_at_equal_norms_beside_their_strongest_controls(
    run: Path, task: Part, direction: str
) -> None:
    assert set(task.equal_norm[direction]) == {"0.4"}
    found = {("equal_norm", method): row for method, row in task.equal_norm[direction]["0.4"].items()}
    assert set(found) == {("equal_norm", "nmd"), ("equal_norm", "gradient")}
    found["unpenalized", "nmd"] = task.unpenalized[direction]
    for (aim, method), row in found.items():
        rows = table(run, "steering", aim=aim, method=method, direction=direction, examples="pairs")
        by_role = (rows.after == TARGET[direction]).groupby(rows.role).mean()
        assert row.shift.estimate == pytest.approx(by_role.pop("vector"))
        assert (row.strongest, row.control.estimate) == (by_role.idxmax(), pytest.approx(by_role.max()))
        assert row.difference.estimate == pytest.approx(row.shift.estimate - by_role.max())


@DIRECTION
@pytest.mark.parametrize(("key", "aim"), [("collateral", "pairs"), ("collateral_conflict", "conflict")])
def test_collateral_is_a_paired_change_and_undefined_where_memory_is_the_conflict(
    run: Path, results: Part, direction: str, key: str, aim: str
) -> None:
    for name in ("inference", "addition"):
        found = results.tasks[name].per_seed["0"].steering[direction][key]
        wanted = {"aim": aim, "method": "gradient", "direction": direction, "role": "vector"}
        for examples, good in (("novel", "correct"), ("memory", "correct"), ("conflict_rest", TARGET[direction])):
            part = table(run, "steering", f"{name}-0", examples=examples, **wanted)
            if (name, examples, direction) == ("addition", "memory", "to_generalized"):
                assert not found[examples].known
            else:
                agrees(found[examples], (part.after == good).astype(float) - (part.before == good))


@DIRECTION
def test_a_uniform_push_is_the_mean_effect_given_to_every_pair(run: Path, task: Part, direction: str) -> None:
    found, sign = task.logit[direction], 1 if direction == "to_generalized" else -1
    wanted = {"aim": "pairs", "method": "gradient", "direction": direction, "role": "vector", "examples": "pairs"}
    rows = table(run, "steering", **wanted)
    push = rows.margin - rows.margin_before
    agrees(found.push, push)
    agrees(found.shift, sign * (rows.margin_before + push.mean()) > 0)
    agrees(found.vector, sign * rows.margin > 0)
    assert found.vector_minus_logit.estimate == pytest.approx(found.vector.estimate - found.shift.estimate)


@DIRECTION
def test_doses_patches_and_words(run: Path, results: Part, task: Part, direction: str) -> None:
    rows = table(run, "effects", direction=direction)
    for dose, role in product(DOSES, ("vector", "gaussian")):
        part = rows[(rows.what == "dose") & (rows.method == "nmd") & (rows.dose == dose) & (rows.role == role)]
        found = task.dose["nmd"][direction][role][f"{dose:g}"]
        agrees(found.margin, part.margin)
        agrees(found.shift, part.after == TARGET[direction])
    for site, layer in product(("block", "mlp"), range(LAYERS)):
        part = rows[(rows.what == "patch") & (rows.site == site) & (rows.layers == str(layer))]
        agrees(task.patch[direction][site][layer].shift, part.after == TARGET[direction])
    agrees(task.prompt[direction].shift, rows[rows.what == "prompt"].after == TARGET[direction])
    assert results.tasks["inference"].prompt == {}


def test_ablation_is_the_separation_lost_pair_by_pair(run: Path, task: Part) -> None:
    found, lost = task.ablation["gradient"]["to_memorized"]["0.3"], {}
    rows = table(run, "effects", what="ablation", method="gradient", direction="to_memorized", dose=0.3)
    for role in ("vector", "random_neurons"):
        entry = found[role]
        sides = {side: rows[(rows.role == role) & (rows.side == side)] for side in SIDES}
        means = {side: part[["margin_before", "margin"]].mean() for side, part in sides.items()}
        before, after = means["generalized"] - means["memorized"]
        lost[role] = before - after
        estimates = (entry.before.estimate, entry.after.estimate, entry.lost.estimate, entry.lost.n)
        assert estimates == pytest.approx((before, after, before - after, sides["memorized"].example.nunique()))
        for side, part in sides.items():
            agrees(entry.kept[side], part.after == side)
    assert found.minus_random.estimate == pytest.approx(lost["vector"] - lost["random_neurons"])
    by_draw = rows[rows.role == "random_neurons"].groupby("draw")
    assert by_draw.ngroups > 1
    known = (found.minus_random.low, found.minus_random.high)
    assert known[0] < found.minus_random.estimate < known[1]
    one = parts_of(ablation(rows[(rows.role == "vector") | (rows.draw == 0)])).minus_random
    assert one.known
    assert math.isnan(one.low), "how much draws vary is not known from one"


def test_layers_alone_are_compared_at_a_strength_that_every_place_has_tried(task: Part) -> None:
    def tried(site: str, strength: float, shift: float) -> dict[str, Any]:
        facts = {"direction": "to_memorized", "method": "nmd", "site": site, "layers": "0", "top": 0.5}
        return facts | {"strength": strength, "examples": "pairs", "shift": Estimate(shift, 0, 1, 9), "seeds": 1}

    rows = [tried("block", 0.1, 0.2), tried("attention", 0.1, 0.3), tried("attention", 0.06, 0.9)]
    found = parts_of(measure_layers(rows, task.contrast, "pairs")).shift["to_memorized"]
    assert (found.strength, set(found.methods["nmd"])) == (0.1, {"block", "attention"})
    nothing = parts_of(measure_layers(rows[::2], task.contrast, "pairs"))
    assert math.isnan(nothing.shift["to_memorized"].strength)


def test_methods_are_compared_at_the_norms_of_one_site() -> None:
    sources = (("nmd", "block"), ("nmd", "mlp"), ("gradient", "mlp"))
    ones = [SteeringVector("memorized", {}, site, method=method, strength=0.1) for method, site in sources]
    rates = (Estimate(rate, 0, 1, 9) for rate in (0.2, 0.9, 0.8))
    rated = [Rated(*both, Estimate.undefined()) for both in zip(ones, rates, strict=True)]
    assert [(one.aim, one.one.site) for one in _compared(rated)] == [("equal_norm", "block"), ("unpenalized", "mlp")]  # type: ignore[attr-defined]
    assert {one.aim for one in _compared(rated[2:])} == {"equal_norm"}


def test_seeds_and_transfer_are_set_beside_chance(run: Path, results: Part) -> None:
    rows = pd.read_parquet(run / "records" / "seeds.parquet")
    assert list(results.seeds) == ["inference"]
    for row in results.seeds["inference"]:
        part = rows[(rows.what == row.what) & (rows.layer == row.layer) & (math.isnan(row.top) | (rows.top == row.top))]
        assert row.value.estimate == pytest.approx(part.value.mean())
        assert (row.chance.low, row.chance.high) == pytest.approx((-0.1, 0.1))
    found = results.transfer["inference"]["addition"]
    rows = pd.read_parquet(run / "records" / "transfer_steering.parquet").query("source == 'inference'")
    for direction, (name, role) in product(SOURCE, (("shift", "vector"), ("gaussian", "gaussian"))):
        part = rows[(rows.target == "addition") & (rows.method == "best") & (rows.role == role)]
        hits = part[part.direction == direction].after == TARGET[direction]
        assert found[direction]["best"][name].estimate == pytest.approx(hits.mean())
    # The layer that the tune split chose where the probe comes from.
    states = pd.read_parquet(run / "records" / "transfer_probes.parquet").query("source == 'inference' and layer == 1")
    part = states[states.target == "addition"]
    right = ((part.score > 0) == (part.label == 1)).mean()
    assert (found.probe_layer, found.probe.estimate) == (1, pytest.approx(right))


def test_states_are_rotated_where_divide_and_conquer_gives_up() -> None:
    first_ND, second_ND = np.random.default_rng(0).normal(size=(2, 9, 4))
    with patch.object(compare, "orthogonal_procrustes", side_effect=np.linalg.LinAlgError):
        found_DD = compare.rotation(first_ND, second_ND)
    assert found_DD == pytest.approx(compare.rotation(first_ND, second_ND))


def test_seeds_are_averaged_and_their_counts_add_up(results: Part) -> None:
    task = results.tasks["inference"]
    seeds = [task.per_seed[str(seed)] for seed in task.seeds]
    assert (task.seeds, task.training) == ([0, 1], {"seconds": [61.5, 62.5], "steps": [1200, 1200]})
    for path in ("behaviour.recall", "pairs.yield", "probe.input_only"):
        whole, a, b = (at(part, path) for part in (task, *seeds))
        assert whole.estimate == pytest.approx((a.estimate + b.estimate) / 2)
        assert whole.n == a.n + b.n
        half = 12.7062047 * abs(a.estimate - b.estimate) / 2  # t at 0.975, one degree of freedom
        assert whole.high == pytest.approx(whole.estimate + half)
    assert task.pairs.pairs == sum(one.pairs.pairs for one in seeds)
    for direction, control, aim in product(SOURCE, CONTROLS, ("pairs", "conflict")):
        worst, *each = (one.steering[direction].controls[control].worst[aim].shift.estimate for one in (task, *seeds))
        assert worst == max(each)
    nmd = np.mean([one.contrast.mean_abs_nmd for one in seeds], axis=0)
    assert task.contrast.mean_abs_nmd == pytest.approx(nmd.tolist())


def test_programs_find_the_keys_that_they_rely_on(run: Path) -> None:
    """The schema reads the file; of the keys that DESIGN promises, those of its deepest branches are asked by name."""
    raw = json.loads((run / "results.json").read_text())
    assert (raw["schema"], raw["study"], list(raw["tasks"])) == (1, "made-up", ["inference", "addition"])
    for task in raw["tasks"].values():
        keys = "seeds training behaviour pairs contrast probe steering steering_by_method"
        assert set(keys.split()) <= set(task)
        assert set(task["pairs"]["yield"]) == {"estimate", "low", "high", "n", "groups"}
        keys = "site layers accuracy auroc input_only shuffled beats_input_only"
        assert set(keys.split()) <= set(task["probe"])
        for block in (task["steering"], *task["steering_by_method"].values()):
            assert set(block["to_memorized"]["controls"]) == {*CONTROLS, *REFITTED}
            assert {"shift", "stay", "other"} <= set(block["to_generalized"]["controls"]["gaussian"]["pairs"])
    assert "null" not in (run / "results.json").read_text()


def test_the_long_table_has_every_estimate_of_the_results_once(run: Path, results: Part) -> None:
    def estimates(part: Any) -> int:
        below = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return 1 if isinstance(part, Estimate) else sum(map(estimates, below))

    rows = long_table(measure_run(read_run(run)))
    assert len(rows) == estimates(results)
    assert not rows.duplicated(["task", "seed", "measure", "list", "toward", "role"]).any()
    of = rows[(rows.task == "inference") & rows.seed.isna() & (rows.measure == "steering_by_method.nmd.controls.shift")]
    (one,) = of[(of.role == "gaussian") & (of.list == "pairs") & (of.toward == "to_memorized")].itertuples()
    block = results.tasks.inference.steering_by_method.nmd.to_memorized
    assert (one.estimate, one.n) == (
        block.controls.gaussian.pairs.shift.estimate,
        block.controls.gaussian.pairs.shift.n,
    )


def test_what_is_in_the_results_is_explained(results: Part) -> None:
    """By the stories; beside it a task has what is not measured."""
    told = {key for story in explained().values() for key in story["results"]}
    facts = {"seeds", "aim", "levers", "left_out", "memory_is_conflict", "documents", "weights", "chosen_by_seed"}
    facts |= {"per_seed", "judged"}
    for task in results.tasks.values():
        assert set(task) - facts <= told
    parts = {name: part["keys"] for story in explained().values() for name, part in story.get("parts", {}).items()}
    task = results.tasks.addition
    block = task.steering.to_memorized
    named = {"Behaviour": task.behaviour, "Pairs": task.pairs, "Contrasts": task.contrast, "Probe": task.probe}
    named |= {
        "Learning": task.learning,
        "Steered": block,
        "Control": block.controls.gaussian,
        "Push": task.logit.to_memorized,
    }
    named |= {"Halves": task.consistency.halves, "ByLayer": task.by_layer, "AtNorm": task.unpenalized.to_memorized}
    for name, found in named.items():
        assert set(found) <= set(parts[name]), name


def test_the_declared_columns_are_those_of_a_run(mini_run: Path) -> None:
    found = {path.stem: path for path in mini_run.glob("**/records/*.parquet")}
    for name in set(declared_tables()) & set(found):
        columns = set(pd.read_parquet(found[name]).columns)
        assert {column for column in columns if "." not in column} == set(columns_of(name)), name
    assert set(declared_tables()) - set(found) <= {"seeds", "transfer_steering", "transfer_probes"}
    assert set(found) <= set(declared_tables())
