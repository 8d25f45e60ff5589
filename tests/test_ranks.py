"""Two processes that share a cell find what one finds alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from mnemoscope import ranks
from mnemoscope.config import load_study
from mnemoscope.errors import InputError
from mnemoscope.study import run_study


def together(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Two processes of torchrun, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = started.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def test_a_process_alone_is_all_there_is() -> None:
    assert (ranks.world(), ranks.rank(), ranks.first()) == (1, 0, True)
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert ranks.from_all("found") == ["found"]
    assert ranks.from_first("found") == "found"


def test_two_processes_label_and_mine_from_one_checkpoint_as_one_does(mini_run: Path, tmp_path: Path) -> None:
    """The same labels and pairs, and the same contrast to 1e-9: batches are those of one process."""
    study = yaml.safe_load((mini_run / "study.yaml").read_text())
    cell = study["cells"]["addition"]
    cell["model"] = {"folder": str(mini_run / "cells" / "addition-0" / "model")}
    cell["pairs"] |= {"fit_examples": 1500, "batch_size": 8}  # 128 candidates a batch
    # What follows is the first one's alone, so there is little of it here.
    nmd = [{"sites": ["block"], "layers": ["all"], "tops": [0.5], "strengths": [0.3]}]
    cell["steering"] |= {"sweeps": {"nmd": nmd}, "draws": 1, "tune_refits": 0, "mapped": []}
    cell |= {"effects": {"pairs": 4}, "neutral": {"cuts": 0}, "samples": {"prompts": 0}}
    cell["detection"] = {"fitted": False}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    done = together(["-m", "mnemoscope", "run", str(file), "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two" / "report.html")], "one of them speaks"
    run_study(load_study(str(file)), tmp_path / "one", workers=1)
    one, two = (tmp_path / name / "cells" / "addition-0" for name in ("one", "two"))
    for name in ("behaviour", "pairs"):
        ours, theirs = (pd.read_parquet(folder / "records" / f"{name}.parquet") for folder in (one, two))
        pd.testing.assert_frame_equal(ours, theirs)
    assert len(ours) > 2 * 128, "both have mined"
    ours, theirs = (load_file(folder / "contrast.safetensors") for folder in (one, two))
    for name, values in ours.items():
        np.testing.assert_allclose(theirs[name], values, rtol=0, atol=1e-9, err_msg=name)


TRAINING = """
import sys
import numpy as np
import torch
from mnemoscope import ranks
from mnemoscope.behaviour import Asking
from mnemoscope.config import ModelConfig, StopConfig, TrainingConfig
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.tasks import build_task
from mnemoscope.training import train

torch.set_num_threads(1)
task = build_task("addition", {"digits": 2, "stored": 96}, 0)
tokenizer = word_tokenizer(task.vocabulary, 32)
never = StopConfig(novel_accuracy=1, recall=1, conflict_each=0.5, conflict_other=0)
found = {}
with ranks.joined():
    for rows in (48, 1):  # one row: nothing is left for the second process
        model = build_gpt2(tokenizer, ModelConfig(layers=2, width=32, heads=2, context=32), 0)
        config = TrainingConfig(
            steps=6, batch_size=rows, precision="float32", evaluate_every=3, evaluation_examples=20, stop=never
        )
        trained = train(Asking(model, tokenizer, task.boundary), task, config, np.random.default_rng(0))
        found |= {f"{rows}.{name}": weight.detach() for name, weight in model.named_parameters()}
        found[f"{rows}.loss"] = torch.tensor([row["loss"] for row in trained.curve])
    torch.save(found, f"{sys.argv[1]}-{ranks.rank()}")
"""


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """The same losses and weights as one process's, up to the order of sums, and the same in both."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    done = together([str(script), str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, script, tmp_path / "one"], check=True, capture_output=True, timeout=300)
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("one-0", "two-0", "two-1"))
    for name, expected in one.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(first[name], second[name]), name


def test_what_one_process_cannot_go_on_with_ends_both(mini_study_file: Path, tmp_path: Path) -> None:
    given = ["--set", "cells.addition.training.steps=25", "--set", "cells.addition.training.stop.recall=1.0"]
    done = together(["-m", "mnemoscope", "run", str(mini_study_file), "--out", str(tmp_path / "run"), *given])
    assert done.returncode == 1
    assert "after 25 steps the model does not show both behaviours" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_an_executor_has_no_place_under_torchrun(
    mini_study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="executor, workers: processes that torchrun has started"):
        run_study(load_study(str(mini_study_file)), tmp_path / "run", executor="ray")
