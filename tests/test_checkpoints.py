"""The curve of a training from its checkpoints, and where its table is found."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from little_facts import LittleFacts
from mnemoscope.behaviour import Asking, prepare, score
from mnemoscope.config import ModelConfig
from mnemoscope.models import build_gpt2
from mnemoscope.runs.errors import InputError
from mnemoscope.watch import Curve
from mnemoscope.watch.checkpoints import measure_checkpoints, steps_of
from mnemoscope.watch.curve import table_of
from test_cli import call
from test_emergence import fresh, watcher_of


def test_a_direction_is_compared_with_that_of_the_measurement_before(little: Asking, tmp_path: Path) -> None:
    names = [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    for name in names:
        little.model.save_pretrained(name)
        little.tokenizer.save_pretrained(name)
    first, second = measure_checkpoints(names, LittleFacts(), {}, tmp_path / "out", {}, examples=60, contrast="block")
    assert first["pairs"] > 1
    assert math.isnan(first["cosine_1"])
    assert second["cosine_1"] == pytest.approx(1)
    assert 0 < first["rho_1"] <= 1
    watcher = watcher_of(little.model, 60, contrast="block")
    scores = score(watcher.asking, prepare(watcher.asking, watcher.phrased), capture="block")
    watcher._of_pairs(scores)
    scores.states_NLD = -scores.states_NLD  # type: ignore[operator]
    assert watcher._of_pairs(scores)["cosine_1"] == pytest.approx(-1)


def test_the_curve_of_checkpoints_is_that_of_the_callback(tmp_path: Path) -> None:
    """Named one by one, as a trainer's folder without tokenizers, and by the command."""
    model, tokenizer = fresh()
    tokenizer.save_pretrained(tmp_path / "words")
    wanted = {}
    for step in (100, 20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        model.save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
        wanted[step] = watcher_of(model, 12, seed=3).measure()
    out, name, words = str(tmp_path / "out"), "little_facts:LittleFacts", {"tokenizer": tmp_path / "words"}
    with pytest.raises(InputError, match=r"^model: .*checkpoint-20 has no tokenizer"):
        list(measure_checkpoints([out], LittleFacts(), {}, tmp_path / "none", {}))
    rows = list(measure_checkpoints([out], name, {}, tmp_path / "curve", words, examples=12, seed=3))
    assert [row["step"] for row in rows] == [20, 100]
    for row in rows:
        for name_of, value in wanted[row["step"]].items():
            assert row[name_of] == pytest.approx(value, nan_ok=True)
    code, said, _ = call("watch", str(tmp_path / "curve"))
    assert (code, said.startswith("step 100: worked out ")) == (0, True)
    names = [f"{out}/checkpoint-{step}" for step in (100, 20)]
    how = ["--task", name, "-o", str(tmp_path / "again"), "--examples", "12", "--tokenizer", str(tmp_path / "words")]
    code, said, _ = call("emergence", *names, *how, "--json")
    assert code == 0
    assert [row["step"] for row in json.loads(said)["rows"]] == [20, 100]


def test_steps_in_names(tmp_path: Path) -> None:
    numbered, last = tmp_path / "checkpoint-500", tmp_path / "final"
    for folder in (numbered, last):
        folder.mkdir()
    assert steps_of([str(numbered), "EleutherAI/pythia-70m@step3000"]) == [500, 3000]
    assert steps_of(["EleutherAI/pythia-70m", str(last), "a/b@9f3c2d1e"]) == [0, 1, 2]
    with pytest.raises(InputError, match=r"^checkpoints: .*final does not end in its step, and others do"):
        steps_of([str(numbered), str(last)])
    with pytest.raises(InputError, match=r"^checkpoints: two of them are of step 500"):
        steps_of([str(numbered), "EleutherAI/pythia-70m@step500"])


def test_what_is_fetched_is_of_one_shape_or_refused_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, width in ((1, 32), (2, 16)):
        shape = ModelConfig(layers=2, width=width, heads=2, context=32)
        build_gpt2(fresh()[1], shape, 0).save_pretrained(tmp_path / f"step{step}")

    def fetch(repository: str, revision: str, **_: Any) -> str:
        if repository != "some/model":
            raise OSError("no such repository")
        return str(tmp_path / revision)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for names, told in (
        (["some/model@step1", "some/model@step2"], "some/model@step2 holds other weights than some/mod"),
        (["other/model@step1"], r"other/model@step1 cannot be fetched \(no such repository\)"),
    ):
        with pytest.raises(InputError, match=f"^checkpoints: {told}"):
            list(measure_checkpoints(names, LittleFacts(), {}, tmp_path / "out", {}))
    assert not (tmp_path / "out").exists()


def test_a_run_that_still_trains_is_watched_by_the_table_that_grows(tmp_path: Path) -> None:
    cell = tmp_path / "cells" / "addition-0"
    curve = Curve([{"step": 0, "conflict_memorized": 0.0}])
    for n, attempt in enumerate(("training-1a-0", "training-1a-1")):
        path = curve.save(cell / "states" / attempt)
        os.utime(path, (n, n))
    assert table_of(tmp_path) == table_of(cell) == path
    curve.save(tmp_path / "cells" / "addition-1" / "states" / "training-2b-0")
    with pytest.raises(InputError, match=r"has several tables; name one of"):
        table_of(tmp_path)
