"""A whole study in miniature: from nothing to the report, resumed, repeated, and refused where it must be."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors import safe_open

from mnemoscope.behaviour import Asking
from mnemoscope.config import dump_study, load_study, parse_study
from mnemoscope.interventions import SteeringVector, Toward
from mnemoscope.models import load_model
from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.study.cells import cells_of
from mnemoscope.study.run import inputs_hash, run_study
from mnemoscope.study.stages import STAGES, cell_model, detect, probe
from mnemoscope.study.stages.lists import RecordedBench
from mnemoscope.tasks import Example, allow_code

# Of draws and examples, for studies in which nobody looks at how many there are.
FEW = "draws: 2, norm_draws: 1, conflict_draws: 1, tune_refits: 1, tune_draws: 1, tune_pairs: 20, "
FEW += "tune_others: 20, fit_pairs: 40, fit_others: 20, judged_examples: 40"


def check_results(run: Path, other: Path) -> None:
    """``results.json`` is the same but for times; states that are read again may differ in their last bits."""
    ours, theirs = (flat(json.loads((folder / "results.json").read_text())) for folder in (run, other))
    assert ours.keys() == theirs.keys()
    for place, value in ours.items():
        wanted = theirs[place]
        assert value == (pytest.approx(wanted, rel=1e-4, nan_ok=True) if isinstance(wanted, float) else wanted), place


def flat(found: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(found, dict | list):
        return {} if "/seconds" in place else {place: found}
    parts = found.items() if isinstance(found, dict) else enumerate(found)
    return {key: value for name, part in parts for key, value in flat(part, f"{place}/{name}").items()}


def test_a_run_folder_holds_what_the_contract_says(mini_run: Path) -> None:
    cell = mini_run / "cells" / "addition-0"
    for name in ("study.yaml", "manifest.json", "results.json", "report.html"):
        assert (mini_run / name).stat().st_size > 100
    for name in ("training", "behaviour", "pairs", "probes", "steering"):
        assert len(pd.read_parquet(cell / "records" / f"{name}.parquet"))
    assert len(json.loads((cell / "probe.json").read_text())["layers"]) == 2
    with safe_open(cell / "contrast.safetensors", "np") as file:
        assert file.get_tensor("nmd").shape == (2, 64)
    model, tokenizer = load_model(cell / "model")
    for direction in ("to_generalized", "to_memorized"):
        vector = SteeringVector.load(cell / "vectors" / f"{direction}-nmd.safetensors", model, tokenizer)
        assert vector.toward == direction.removeprefix("to_")
    manifest = json.loads((mini_run / "manifest.json").read_text())
    assert list(manifest["stages"]["addition-0"]) == sorted(STAGES)
    assert not list(mini_run.rglob("*.tmp*"))


def test_no_group_of_a_fitted_tuned_or_calibrated_list_is_judged(copied: Path) -> None:
    """Every list as a stage takes it, against the groups of every record that is judged."""
    (cell,) = cells_of(load_study(str(copied / "study.yaml")), copied)
    asking, rng = cell_model(cell), np.random.default_rng(0)
    bench = RecordedBench.of(cell, asking)
    records, chosen_on = bench.records, [bench.choosing(toward) for toward in Toward]
    taken: dict[str, list[Example]] = {
        "fit": [*bench.fit_conflicts.examples, *bench.fit_agreeing.examples],
        "tune": [*bench.tune_conflicts.examples, *(e for one in chosen_on for e in one.targets.examples)],
    }
    taken["tune"] += [e for one in chosen_on for prompts, _ in one.kept.values() for e in prompts.examples]
    items = {name for of_both in bench.lists.items.values() for names in of_both for name in names}
    for split in ("fit", "tune"):  # what is fitted on, and what settings are chosen on
        taken[split] += [one for pair in records.both_sides(split, 10**6) for one in pair]
        taken[split] += detect._prompts(cell, asking, records, split).examples
        taken[split] += probe.phrasings(records.pairs, split, 10**6, rng)
    assert items <= {example.item for example in taken["fit"]}
    fitted, tuned = ({example.group for example in taken[split]} for split in ("fit", "tune"))
    assert not fitted & tuned
    for name in ("behaviour", "probes", "steering", "effects", "detection"):
        judged = set(pd.read_parquet(cell.records / f"{name}.parquet").group)
        assert judged
        assert not judged & (fitted | tuned), name


def test_a_second_call_does_nothing_again(copied: Path, mini_study_file: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (copied / "cells").rglob("*") if p.is_file()}
    told: list[tuple[object, ...]] = []
    run_study(load_study(str(mini_study_file)), copied, lambda *news: told.append(news))
    assert {news[-1] for news in told} == {"done before"}
    assert before == {p: p.stat().st_mtime_ns for p in (copied / "cells").rglob("*") if p.is_file()}


@pytest.fixture
def copied(mini_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini_run, tmp_path / "copy"))


def test_another_configuration_is_refused(copied: Path, mini_study_file: Path) -> None:
    with pytest.raises(InputError, match=r"another configuration.*steps"):
        run_study(load_study(str(mini_study_file), ["cells.addition.training.steps=601"]), copied)


def test_a_configuration_that_came_to_nothing_binds_nobody(
    tmp_path: Path, mini_study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped model leaves a folder that the right one can use."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    wrong = load_study(str(mini_study_file), ["cells.addition.model={folder: no/such}"])
    with pytest.raises(InputError, match="no/such cannot be opened"):
        run_study(wrong, tmp_path / "run", workers=1)
    right = ["cells.addition.training.steps=25", "cells.addition.training.stop.recall=0.8"]
    with pytest.raises(StudyError, match="after 25 steps"):
        run_study(load_study(str(mini_study_file), right), tmp_path / "run")


def test_what_a_cell_brings_along_is_known_by_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data, the parts of a task, files in folders, the weights of its model, the module of a task."""
    data, facts, weights = tmp_path / "mine.jsonl", tmp_path / "data" / "P36.jsonl", tmp_path / "model" / "weights"
    module = tmp_path / "tasks_of_mine.py"
    for path in (data, facts, module):
        path.parent.mkdir(exist_ok=True)
        path.write_text("one = 1")
    weights.parent.mkdir()
    weights.write_bytes(bytes(3 * 2**20))
    monkeypatch.syspath_prepend(tmp_path)
    parts = {"p": {"task": "pararel", "folder": str(facts.parent)}, "j": {"task": "jsonl", "file": str(data)}}
    cell = {"task": "tasks_of_mine:Mine", "options": {"parts": parts}, "model": {"folder": str(weights.parent)}}
    (cell_of,) = cells_of(parse_study({"study": "mine", "cells": {"mine": cell}}), tmp_path / "run")
    seen = [inputs_hash(cell_of), inputs_hash(cell_of)]
    for path in (data, facts, module):
        path.write_text("one = 2, another")
        seen.append(inputs_hash(cell_of))
    with weights.open("r+b") as file:
        file.seek(2**20)  # of the same size, with the same ends
        file.write(b"x")
    seen.append(inputs_hash(cell_of))
    assert len(set(seen)) == len(seen) - 1 == 5


def test_a_stage_that_runs_again_gives_the_same_bytes_and_leaves_nothing_of_before(
    copied: Path, mini_run: Path, mini_study_file: Path
) -> None:
    """In one process, where two had its parts; a detector, or a method's vectors, that it no longer makes are gone."""
    cell = copied / "cells" / "addition-0"
    for stage, name in (
        ("detection", "detector_old.safetensors"),
        ("steering", "vectors/to_memorized-old.safetensors"),
    ):
        (cell / "stages" / f"{stage}.json").unlink()
        (cell / name).write_bytes(b"old")
    (cell / "stages" / "pairs.json").unlink()  # mining keeps states for what follows
    ran: list[str] = []

    def tell(owner: str, stage: str, done: float, total: float, text: str) -> None:
        ran.append(f"{stage} {text}")

    run_study(load_study(str(mini_study_file)), copied, tell, workers=1)
    assert "behaviour done before" in ran
    assert not any(f"{stage} done before" in ran for stage in ("probes", "effects", "samples")), "they read the pairs"
    assert not list(cell.rglob("*old*"))
    for name in ("records/pairs.parquet", "records/steering.parquet", "records/sweep.parquet", "contrast.safetensors"):
        assert (cell / name).read_bytes() == (mini_run / "cells" / "addition-0" / name).read_bytes(), name
    marker = json.loads((cell / "stages" / "steering.json").read_text())
    assert json.loads((copied / "manifest.json").read_text())["commits"] == [str(marker["commit"])]
    assert set(marker) == {"hash", "seconds", "commit", "dirty", "files", "digest"}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, mini_study_file: Path) -> None:
    (tmp_path / "letter.txt").write_text("not a run")
    with pytest.raises(InputError, match=r"not empty and holds no study\.yaml"):
        run_study(load_study(str(mini_study_file)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "file", ["model/model.safetensors", "records/pairs.parquet", "contrast.safetensors", "stages/train.json"]
)
def test_a_damaged_artefact_is_named(copied: Path, mini_study_file: Path, file: str) -> None:
    path = copied / "cells" / "addition-0" / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StudyError, match="is damaged") as error:
        run_study(load_study(str(mini_study_file)), copied)
    assert path.name in str(error.value)


NO_RULE = ["novel_accuracy=0", "recall=0", "conflict_each=0", "conflict_other=1"]


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (["recall=0.8"], "after 25 steps the model does not show both behaviours"),
        (NO_RULE, r"no pairs found in the fit split: none of \d+ candidates flips \(other"),
    ],
)
def test_a_cell_that_cannot_go_on_gives_no_report(
    mini_study_file: Path, tmp_path: Path, stop: list[str], message: str
) -> None:
    overrides = ["cells.addition.training.steps=25", *(f"cells.addition.training.stop.{field}" for field in stop)]
    with pytest.raises(StudyError, match=message):
        run_study(load_study(str(mini_study_file), overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    assert len(pd.read_parquet(tmp_path / "run" / "cells" / "addition-0" / "records" / "training.parquet")) == 1


def test_a_full_disk_leaves_nothing_half_written(
    mini_study_file: Path, copied: Path, mini_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up when the records of samples are renamed into place."""
    target = copied / "cells" / "addition-0" / "records" / "samples.parquet"
    (copied / "cells" / "addition-0" / "stages" / "samples.json").unlink()
    target.unlink()
    rename = os.replace

    def full(source: Path, destination: Path) -> None:
        if Path(destination) == target:
            raise OSError(errno.ENOSPC, "No space left on device", str(destination))
        rename(source, destination)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run_study(load_study(str(mini_study_file)), copied, workers=1)
    assert not list(copied.rglob("*.tmp*"))
    monkeypatch.undo()
    run_study(load_study(str(mini_study_file)), copied, workers=1)
    check_results(copied, mini_run)


@pytest.mark.slow
def test_only_what_is_known_is_asked_and_what_is_held_out_is_judged_apart(
    mini: Callable[[str], Asking], tmp_path: Path
) -> None:
    ours = mini("addition-digits")
    ours.model.save_pretrained(tmp_path / "model")
    ours.tokenizer.save_pretrained(tmp_path / "model")
    raw = f"""
study: held
cells:
  held:
    task: holding_out:HoldingOut
    options: {{digits: 2, stored: 96, memorized_share: 0.4, seed: 0}}
    model: {{folder: {tmp_path / "model"}}}
    pairs: {{permutations: 99, rephrasings: 3}}
    probes: {{offsets: [0], learning_draws: 1, halvings: 2}}
    steering: {{methods: [nmd], grids: {{block: {{tops: [0.5], strengths: [0.3]}}}}, {FEW}}}
    effects: {{pairs: 20, doses: [0, 1], ablated: [0.1], draws: 1}}
"""
    with pytest.raises(InputError, match="task: 'holding_out:HoldingOut' is no built-in task"):
        run_study(parse_study(yaml.safe_load(raw)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    allow_code("holding_out:HoldingOut")
    run_study(parse_study(yaml.safe_load(raw)), tmp_path / "run")
    records = tmp_path / "run" / "cells" / "held-0" / "records"
    known = json.loads((records / "known.json").read_text())
    assert known["asked"] == 96
    assert 0 < len(known["known"]) <= 96
    asked = set(pd.read_parquet(records / "pairs.parquet")["item"])
    apart = set(pd.read_parquet(records / "pairs_held_out.parquet")["item"])
    assert asked <= {item for item in known["known"] if int(item.split("+")[0]) % 2}
    assert apart
    assert all(int(item.split("+")[0]) % 2 == 0 for item in apart)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]["held"]["steering"]
    rows = pd.read_parquet(records / "steering.parquet").query(
        "aim == 'pairs' and examples == 'pairs_even' and role == 'vector'"
    )
    turned = rows[rows.direction == "to_generalized"]
    shift = found["to_generalized"]["held_out"]["even"]["shift"]
    assert shift["n"] == len(turned) > 0
    assert shift["estimate"] == pytest.approx((turned.after == "generalized").mean())


TWO_LABELS = """
study: two
seeds: 2
cells:
  donor:
    task: addition-digits
    options: {{digits: 2, stored: 96, memorized_share: 0.4, seed: 0}}
    model: {{folder: {folder}}}
    pairs: &pairs {{behaviour_examples: 60, fit_examples: 150, tune_examples: 60, test_examples: 60, permutations: 99}}
    probes: &probes {{offsets: [0], learning_draws: 1, halvings: 2}}
    steering: &steering {{methods: [nmd], grids: {{block: {{tops: [0.5], strengths: [0.3]}}}}, {few}}}
    effects: &effects {{pairs: 20, doses: [0, 1], ablated: [0.1], draws: 1}}
  borrower:
    task: addition-digits
    options: {{digits: 2, stored: 96, memorized_share: 0.4, seed: 0}}
    model: {{cell: donor}}
    pairs: *pairs
    probes: *probes
    steering: *steering
    effects: *effects
"""


@pytest.mark.slow
def test_seeds_and_labels_that_share_a_model_are_compared(mini: Callable[[str], Asking], tmp_path: Path) -> None:
    """A miniature of the study `paper`: cells that borrow a model, two seeds, transfer between labels."""
    asking = mini("addition-digits")
    asking.model.save_pretrained(tmp_path / "model")
    asking.tokenizer.save_pretrained(tmp_path / "model")
    text = TWO_LABELS.format(few=FEW, folder=tmp_path / "model").replace(
        "{cell: donor}", f"{{folder: {tmp_path / 'model'}}}"
    )
    raw = yaml.safe_load(text)
    training = {"steps": 5, "evaluate_every": 5, "evaluation_examples": 8, "stop": {"recall": 0.9}}
    raw["cells"]["lost"] = {"task": "addition", "model": {"layers": 1, "width": 16}, "training": training}
    # A cell that never shows both behaviours is told at the end, and takes nothing from the others.
    lost = r"lost-0: after 5 steps .*\(1 more cells failed\); .*report.html is of the other cells"
    with pytest.raises(StudyError, match=lost):
        run_study(parse_study(raw), tmp_path / "run", workers=2)
    seeds = pd.read_parquet(tmp_path / "run" / "records" / "seeds.parquet")
    assert set(seeds.label) == {"donor", "borrower"}
    assert set(seeds.what) == {"overlap", "overlap_in_layers", "rank_correlation", "aligned_cosine"}
    steering = pd.read_parquet(tmp_path / "run" / "records" / "transfer_steering.parquet")
    probes = pd.read_parquet(tmp_path / "run" / "records" / "transfer_probes.parquet")
    every = {(a, b) for a in ("donor", "borrower") for b in ("donor", "borrower")}
    assert set(zip(steering.source, steering.target, strict=True)) == every
    assert set(zip(probes.source, probes.target, strict=True)) == every
    # A cell's vector on its own pairs does what it did when it was judged.
    own = steering[(steering.source == "donor") & (steering.target == "donor") & (steering.seed == 0)]
    judged = pd.read_parquet(tmp_path / "run" / "cells" / "donor-0" / "records" / "steering.parquet")
    for direction in ("to_generalized", "to_memorized"):
        first = own[(own.direction == direction) & (own.role == "vector")].after.tolist()
        rows = judged[(judged.direction == direction) & (judged.role == "vector") & (judged.aim == "pairs")]
        assert first == rows[rows.examples == "pairs"].after.tolist()[: len(first)]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["transfer"]) == {"donor", "borrower"}
    assert results["tasks"]["donor"]["seeds"] == [0, 1]
    assert set(results["failed"]) == {"lost-0", "lost-1"}
    assert "lost-1: after 5 steps" in (tmp_path / "run" / "report.html").read_text()


def test_a_cell_borrows_the_model_of_another_and_all_that_fail_are_told(tmp_path: Path) -> None:
    """Nothing flips after 5 steps, so both borrowers fail: after the donor was trained, and neither stops the other."""
    raw = yaml.safe_load(TWO_LABELS.format(few=FEW, folder="none"))
    stop = {"novel_accuracy": 0, "recall": 0, "conflict_each": 0, "conflict_other": 1}
    training = {"steps": 5, "evaluate_every": 5, "evaluation_examples": 8, "stop": stop}
    raw["cells"]["donor"] |= {"model": {"layers": 1, "width": 16}, "training": training, "analysed": False}
    with pytest.raises(StudyError, match=r"borrower-0: no pairs found.*\(1 more cells failed\)"):
        run_study(parse_study(raw), tmp_path / "run", workers=1)
    cells = tmp_path / "run" / "cells"
    assert (cells / "donor-1" / "model").is_dir()
    assert not (cells / "donor-1" / "stages" / "pairs.json").exists()
    assert (cells / "borrower-1" / "records" / "behaviour.parquet").exists()
    assert not (cells / "borrower-1" / "model").exists()
    alone = parse_study(raw | {"cells": {"donor": raw["cells"]["donor"]}})
    assert run_study(alone, tmp_path / "alone", workers=1) == tmp_path / "alone"  # there is nothing to report


def test_a_resolved_study_reads_back_as_itself(mini_study_file: Path, tmp_path: Path) -> None:
    config = load_study(str(mini_study_file), ["cells.addition.pairs.site=mlp"], seeds=3)
    (tmp_path / "again.yaml").write_text(dump_study(config))
    assert load_study(str(tmp_path / "again.yaml")) == config
