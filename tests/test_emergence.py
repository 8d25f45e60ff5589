"""The callback measures what `score` does, in the trainers that people use, and leaves their training as it is."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mnemoscope as ms
from little_facts import VOCABULARY, LittleFacts
from mnemoscope.behaviour import Asking, mine_pairs, prepare, score
from mnemoscope.config import ModelConfig, StopConfig
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.report.emergence import draw_curve
from mnemoscope.runs.errors import InputError
from mnemoscope.watch import Curve, Watcher, reached, undisturbed
from mnemoscope.watch.callback import WANTED, _check_shards
from mnemoscope.watch.checkpoints import measure_checkpoints, steps_of
from mnemoscope.watch.curve import table_of
from test_cli import call

STEPS = 50


def fresh() -> tuple[Any, Any]:
    """A small model with dropout, and its tokenizer."""
    tokenizer = word_tokenizer(VOCABULARY, 32)
    model = build_gpt2(tokenizer, ModelConfig(layers=2, width=32, heads=2, context=32), 0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model, tokenizer


def texts(n: int = 256) -> list[str]:
    return [prompt + answer for prompt, answer in islice(LittleFacts().training(np.random.default_rng(0)), n)]


def dataset(tokenizer: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts()]
    longest = max(map(len, rows))
    padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
    labels = [row + [-100] * (longest - len(row)) for row in rows]
    return datasets.Dataset.from_dict({"input_ids": padded, "labels": labels})


def trainer_of(kind: str, out: Path, callbacks: list[Any], model: Any = None, **more: Any) -> Any:
    """A trainer of a fresh model: the library's or TRL's, of all weights or of an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    untouched, tokenizer = fresh()
    model = model or untouched
    lora = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
    options: dict[str, Any] = {"output_dir": str(out), "max_steps": STEPS, "logging_steps": 1, "report_to": "none"}
    options |= {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True}
    options |= {"use_cpu": True, "seed": 3, **more}
    torch.manual_seed(0)
    if kind.startswith("sft"):
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        data = datasets.Dataset.from_dict({"text": texts()})
        arguments = trl.SFTConfig(**options, dataset_text_field="text", max_length=32)
        return trl.SFTTrainer(
            model,
            args=arguments,
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=lora if kind.endswith("adapter") else None,
        )
    data = dataset(tokenizer)
    if kind.endswith("adapter"):
        model = get_peft_model(model, lora)
    return Trainer(
        model,
        TrainingArguments(**options),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        callbacks=callbacks,
    )


def callback(**more: Any) -> Any:
    return ms.BehaviourCallback(LittleFacts(), fresh()[1], **{"examples": 16, **more})


def logged(trainer: Any) -> list[dict[str, Any]]:
    """What the trainer logs of its steps, whoever watches."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["library", "library, adapter", "library, mixed", "sft", "sft, adapter"])
@pytest.mark.filterwarnings("ignore")
def test_losses_are_the_same_with_and_without_it(kind: str, tmp_path: Path) -> None:
    found = []
    mixed = {"bf16": True, "gradient_accumulation_steps": 2} if kind.endswith("mixed") else {}
    for callbacks in ([], [callback(every=10, contrast="block")]):
        trainer = trainer_of(kind, tmp_path / str(len(found)), callbacks, **mixed)
        trainer.train()
        found.append((logged(trainer), {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
    (without, before), (with_it, after) = found
    assert len(without) == STEPS
    assert without == with_it  # TRL's own measures among them
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = callbacks[0].curve.rows
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40, 50]
    assert math.isnan(rows[0]["loss"])
    for row in rows[1:]:
        steps = [entry["loss"] for entry in with_it if row["step"] - 10 < entry["step"] <= row["step"]]
        assert row["loss"] == pytest.approx(np.mean(steps))


@pytest.mark.filterwarnings("ignore")
def test_what_it_logs_is_what_the_model_of_that_step_shows(tmp_path: Path) -> None:
    watching = callback(contrast="block")
    trainer = trainer_of("library", tmp_path, [watching], eval_strategy="steps", eval_steps=25)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_recall" in entry]
    assert [entry["step"] for entry in logged] == [0, 25, 50]
    table = pd.read_parquet(tmp_path / "emergence.parquet")
    assert (tmp_path / "emergence.png").read_bytes()[:4] == b"\x89PNG"
    assert table.step.to_list() == [0, 25, 50]
    for entry, row in zip(logged, table.to_dict("records"), strict=True):
        for name in ("recall", "conflict_memorized", "conflict_generalized", "conflict_other", "margin", "yield"):
            assert entry[f"eval_{name}"] == row[name]
    model, tokenizer = trainer.model.eval(), fresh()[1]
    asking = Asking(model, tokenizer, LittleFacts.boundary)
    watcher = Watcher(model, tokenizer, LittleFacts(), 16, contrast="block")
    scores = score(asking, prepare(asking, watcher.conflicts))
    assert row["conflict_memorized"] == np.mean(scores.behaviour_N == "memorized")
    assert row["margin"] == pytest.approx(scores.margin_N.mean(), abs=1e-4)
    (batch,) = mine_pairs(asking, watcher.candidates, chunk=len(watcher.candidates))
    assert row["pairs"] == batch.is_pair_N.sum()
    assert row["yield"] == batch.is_pair_N.mean()


@pytest.mark.filterwarnings("ignore")
def test_metrics_of_an_evaluation_have_it_so_the_best_checkpoint_can_be_chosen_by_it(tmp_path: Path) -> None:
    how = {"eval_strategy": "steps", "eval_steps": 25, "save_strategy": "best", "metric_for_best_model": "margin"}
    trainer = trainer_of("library", tmp_path, [callback()], **how)
    trainer.train()
    best = max(e["eval_margin"] for e in trainer.state.log_history if "eval_margin" in e)
    assert trainer.state.best_metric == best


@pytest.mark.filterwarnings("ignore")
def test_a_row_is_of_the_weights_of_its_step_and_of_nothing_later(tmp_path: Path) -> None:
    """Several evaluations of one step, the best weights brought back at the end, an evaluation by hand."""
    how: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 25, "save_strategy": "steps", "save_steps": 25}
    how |= {"eval_on_start": True, "load_best_model_at_end": True, "metric_for_best_model": "eval_margin"}
    watching = callback(contrast="block")
    trainer = trainer_of("library", tmp_path, [watching], greater_is_better=False, **how)
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    trainer.train()
    rows = [dict(row) for row in watching.curve.rows]
    assert [row["step"] for row in rows] == [0, 25, 50]
    assert sum("eval_recall" in entry for entry in trainer.state.log_history) == 3
    trainer.evaluate()
    assert len(watching.curve.rows) == 3
    model, tokenizer = trainer.model.eval(), fresh()[1]
    asking = Asking(model, tokenizer, LittleFacts.boundary)
    best = score(asking, prepare(asking, Watcher(model, tokenizer, LittleFacts(), 16).conflicts)).margin_N.mean()
    assert best == pytest.approx(min(row["margin"] for row in rows[1:]), abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_it(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        trainer = trainer_of("library", tmp_path, [callback(every=25)], report_to="tensorboard")
        trainer.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    (events,) = {path.parent for path in (tmp_path / "board").rglob("events*")}
    read = accumulator.EventAccumulator(str(events)).Reload()
    assert [point.step for point in read.Scalars("eval/recall")] == [0, 25, 50]


@pytest.mark.filterwarnings("ignore")
def test_it_stops_and_saves_when_a_rule_holds(tmp_path: Path) -> None:
    easy = StopConfig(recall=0.0, novel_accuracy=0.0, conflict_each=0.0, conflict_other=1.0)
    watching = callback(every=10, stop="both", save="both", wanted=easy)
    trainer = trainer_of("library", tmp_path, [watching])
    trainer.train()
    assert trainer.state.global_step == 10
    assert (tmp_path / "checkpoint-10").is_dir()


@pytest.mark.filterwarnings("ignore")
def test_one_checkpoint_is_saved_that_of_the_last_step_too_and_none_again(tmp_path: Path) -> None:
    easy = StopConfig(recall=0.0, novel_accuracy=0.0, conflict_each=0.0, conflict_other=1.0)
    trainer_of("library", tmp_path / "late", [callback(every=60, save="both", wanted=easy)]).train()
    assert [path.name for path in (tmp_path / "late").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    how: dict[str, Any] = {"every": 10, "save": "both", "wanted": easy}
    trainer_of("library", tmp_path / "early", [callback(**how)], max_steps=20).train()
    resumed = trainer_of("library", tmp_path / "early", [callback(**how)], max_steps=30)
    resumed.train(resume_from_checkpoint=str(tmp_path / "early" / "checkpoint-10"))
    assert [path.name for path in (tmp_path / "early").glob("checkpoint-*")] == ["checkpoint-10"]
    how |= {"every": None}
    best = {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "margin"}
    with pytest.raises(InputError, match=r"^save: with save_strategy 'best' a trainer saves nothing else"):
        trainer_of("library", tmp_path / "best", [callback(**how)], **best).train()


def test_when_a_rule_holds() -> None:
    def row(memorized: float, generalized: float, recall: float = 1.0) -> dict[str, float]:
        other = 1 - memorized - generalized
        shares = {"conflict_memorized": memorized, "conflict_generalized": generalized, "conflict_other": other}
        return shares | {"recall": recall}

    assert reached("both", [row(0.4, 0.6)], WANTED)
    assert not reached("both", [row(0.4, 0.6, recall=0.5)], WANTED)
    assert not reached("both", [row(0.1, 0.9)], WANTED)
    assert not reached("both", [row(0.4, 0.4)], WANTED)
    assert reached("overtaken", [row(0.2, 0.8), row(0.6, 0.4)], WANTED)
    assert not reached("overtaken", [row(0.6, 0.4), row(0.7, 0.3)], WANTED)
    assert not reached("overtaken", [row(0.2, 0.8), row(0.6, 0.4), row(0.4, 0.6)], WANTED)
    assert not reached("overtaken", [row(0.0, 0.0), row(0.1, 0.0)], WANTED), "the rule never led"


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_is_resumed_goes_on_with_its_table(tmp_path: Path) -> None:
    trainer = trainer_of("library", tmp_path, [callback(every=10)], max_steps=20, save_strategy="steps", save_steps=20)
    trainer.train()
    first = Curve.open(tmp_path / "emergence.parquet").rows
    trainer = trainer_of("library", tmp_path, [callback(every=10)], max_steps=40)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    rows = Curve.open(tmp_path / "emergence.parquet").rows
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40]
    assert [row["conflict_memorized"] for row in rows[:3]] == [row["conflict_memorized"] for row in first]


def test_nothing_random_moves_and_every_mode_comes_back() -> None:
    model, tokenizer = fresh()
    watcher = Watcher(model, tokenizer, LittleFacts(), 8)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    watcher.measure()
    with undisturbed(model):
        torch.rand(3), random.random(), np.random.rand()
    assert [module.training for module in model.modules()] == modes
    after = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == after


def test_a_direction_is_compared_with_that_of_the_measurement_before() -> None:
    model, tokenizer = fresh()
    watcher = Watcher(model, tokenizer, LittleFacts(), 16, contrast="block")
    scores = score(watcher.asking, prepare(watcher.asking, watcher.asked), capture="block")
    scores.behaviour_N = np.where(np.arange(len(watcher.asked)) < len(watcher.conflicts), "memorized", "generalized")
    first, second = watcher._of_pairs(scores), watcher._of_pairs(scores)
    assert first["pairs"] > 1
    assert math.isnan(first["cosine_1"])
    assert second["cosine_1"] == pytest.approx(1)
    assert 0 < first["rho_1"] <= 1
    assert scores.states_NLD is not None
    scores.states_NLD = -scores.states_NLD
    assert watcher._of_pairs(scores)["cosine_1"] == pytest.approx(-1)


TWO = """
import os, sys, torch
sys.path[:0] = {paths!r}
from pathlib import Path
import test_emergence
watching = test_emergence.callback(every=10)
options = {{"max_steps": 20, "learning_rate": 0.0}} | ({{"ddp_backend": "gloo"}} if "RANK" in os.environ else {{}})
test_emergence.trainer_of("library", Path(sys.argv[1]), [watching], **options).train()
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo that are still there at the end of the interpreter abort the process now and then
"""


def test_two_processes_log_what_one_logs(tmp_path: Path) -> None:
    """Without a learning rate, so that the weights are the same."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(paths=[str(Path(__file__).parent), str(Path(ms.__file__).parents[1])]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ours, tables = [sys.executable, "-W", "ignore"], {}
    both = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launched in (("one", []), ("two", both)):
        command = [*ours, *launched, str(script), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("eval_recall") == 3  # the first process alone logs
        tables[name] = pd.read_parquet(tmp_path / name / "emergence.parquet").drop(columns=["loss", "epoch"])
    assert tables["one"].step.to_list() == [0, 10, 20]
    pd.testing.assert_frame_equal(tables["one"], tables["two"], check_exact=True)


SHARDED = """
import os, sys, torch
sys.path[:0] = {paths!r}
from pathlib import Path
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import test_emergence

out = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
model, mesh = test_emergence.fresh()[0], init_device_mesh("cpu", (2,))
for part in (*model.transformer.h, model):
    fully_shard(part, mesh=mesh)
watching = test_emergence.callback(every=10, contrast="block")
trainer = test_emergence.trainer_of("library", out, [watching], model=model, max_steps=20, ddp_backend="gloo")
trainer.accelerator.prepare_model = lambda model, **_: model  # on a CPU it shards nothing, and wraps
trainer.train()
assert all("DTensor" in str(type(parameter)) for parameter in model.parameters())
weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if torch.distributed.get_rank() == 0:
    torch.save(weights, out / "whole.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # threads of gloo that are still there at the end of the interpreter abort the process now and then
"""


def test_weights_in_shards_show_what_they_show_as_a_whole(tmp_path: Path) -> None:
    """FSDP 2 in two processes: the table against plain models with the weights before and after."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(paths=[str(Path(__file__).parent), str(Path(ms.__file__).parents[1])]))
    both = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *both, str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pd.read_parquet(tmp_path / "emergence.parquet").to_dict("records")
    assert [row["step"] for row in rows] == [0, 10, 20]
    model, tokenizer = fresh()
    watcher = Watcher(model, tokenizer, LittleFacts(), 16, contrast="block")
    first = watcher.measure()
    model.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
    last = watcher.measure()
    assert first["margin"] != last["margin"]
    for row, wanted in ((rows[0], first), (rows[2], last)):
        for name in wanted:
            if not name.startswith("cosine"):  # with the measurement before, which is that of step 10
                assert row[name] == pytest.approx(wanted[name], abs=1e-4, nan_ok=True), name


class Launched:
    """What a trainer is known by when a launcher shards; the plugin is the library's."""

    def __init__(self, version: int, deepspeed: bool = False) -> None:
        from accelerate import FullyShardedDataParallelPlugin

        self.is_deepspeed_enabled = deepspeed
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
        self.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))


def test_shards_that_a_pass_does_not_gather_are_refused() -> None:
    _check_shards(Launched(2))
    with pytest.raises(InputError, match=r"^fsdp: version 1 wraps what it shards; use version 2"):
        _check_shards(Launched(1))
    with pytest.raises(InputError, match=r"^deepspeed: weights are in shards while this trains"):
        _check_shards(Launched(2, deepspeed=True))


def test_the_curve_of_checkpoints_is_that_of_the_callback(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    wanted = {}
    for step in (100, 20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        folder = tmp_path / f"checkpoint-{step}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        wanted[step] = Watcher(model, tokenizer, LittleFacts(), 12).measure()
    ms.allow_code("little_facts:LittleFacts")
    names = [str(tmp_path / f"checkpoint-{step}") for step in (100, 20)]
    rows = list(measure_checkpoints(names, "little_facts:LittleFacts", {}, tmp_path / "out", {}, examples=12))
    assert [row["step"] for row in rows] == [20, 100]
    for row in rows:
        for name, value in wanted[row["step"]].items():
            assert row[name] == pytest.approx(value, nan_ok=True)
    code, out, _ = call("watch", str(tmp_path / "out"))
    assert code == 0
    assert out.startswith("step 100: worked out ")
    arguments = [*names, "--task", "little_facts:LittleFacts"]
    code, out, _ = call("emergence", *arguments, "-o", str(tmp_path / "again"), "--examples", "12", "--json")
    assert code == 0
    assert [row["step"] for row in json.loads(out)["rows"]] == [20, 100]


class SeveralFamilies(LittleFacts):
    """Memory is asked in two families of phrasings."""

    def examples(self, rng: np.random.Generator, n: int, kind: str) -> list[ms.Example]:  # type: ignore[override]
        found = super().examples(rng, n, kind)  # type: ignore[arg-type]
        return [replace(e, family=("odd", "even")[i % 2]) if kind == "memory" else e for i, e in enumerate(found)]


@pytest.mark.filterwarnings("ignore")
def test_recall_is_told_by_family_too(little: Asking, tmp_path: Path) -> None:
    asking, task = little, SeveralFamilies()
    watcher = Watcher(asking.model, asking.tokenizer, task, 40)
    row = watcher.measure()
    memory = watcher.answers[watcher.answers.kind == "memory"]
    families = {e.prompt: e.family for e in watcher.others["recall"]}
    for family in ("odd", "even"):
        right = memory.behaviour[memory.prompt.map(families) == family] == "correct"
        assert row[f"recall:{family}"] == right.mean()
        assert row[f"recall:{family}_n"] == len(right)
    assert not [name for name in row if name.startswith("novel_accuracy:")]
    curve = Curve()
    curve.add(0, row)
    curve.add(10, row)
    one = draw_curve(curve.table, tmp_path / "one.png").read_bytes()
    fewer = curve.table[[name for name in curve.table if ":" not in name]]
    assert len(draw_curve(fewer, tmp_path / "two.png").read_bytes()) < len(one)
    watching = ms.BehaviourCallback(task, fresh()[1], every=10, examples=16)
    trainer = trainer_of("library", tmp_path, [watching], max_steps=10)
    trainer.train()
    assert {"eval_recall:odd", "eval_recall:even"} <= set(trainer.state.log_history[0])


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
    tokenizer = fresh()[1]
    for step, width in ((1, 32), (2, 16)):
        shape = ModelConfig(layers=2, width=width, heads=2, context=32)
        build_gpt2(tokenizer, shape, 0).save_pretrained(tmp_path / f"step{step}")

    def fetch(repository: str, revision: str, **_: Any) -> str:
        if repository != "some/model":
            raise OSError("no such repository")
        return str(tmp_path / revision)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    names = ["some/model@step1", "some/model@step2"]
    with pytest.raises(InputError, match=r"^checkpoints: some/model@step2 holds a gpt2 of 2 layers x 16, and some/mod"):
        list(measure_checkpoints(names, LittleFacts(), {}, tmp_path / "out", {}))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"^checkpoints: other/model@step1 cannot be fetched \(no such repository\)"):
        list(measure_checkpoints(["other/model@step1"], LittleFacts(), {}, tmp_path / "out", {}))


def test_checkpoints_of_a_folder_are_asked_with_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    """As a plain trainer leaves them: without a tokenizer."""
    model, tokenizer = fresh()
    for step in (100, 20):
        model.save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
    tokenizer.save_pretrained(tmp_path / "words")
    asked = (LittleFacts(), {}, tmp_path / "curve", {"tokenizer": tmp_path / "words"})
    rows = list(measure_checkpoints([str(tmp_path / "out")], *asked, examples=12, seed=3))
    assert [row["step"] for row in rows] == [20, 100]
    for name, value in Watcher(model, tokenizer, LittleFacts(), 12, seed=3).measure().items():
        assert rows[0][name] == pytest.approx(value, nan_ok=True)
    with pytest.raises(InputError, match=r"^model: .*checkpoint-20 has no tokenizer"):
        list(measure_checkpoints([str(tmp_path / "out")], LittleFacts(), {}, tmp_path / "none", {}))


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


def test_conversations_are_asked_in_their_template() -> None:
    model, tokenizer = fresh()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    chat = ms.Prompting(chat=True, reply=" quiz")
    watcher = Watcher(model, tokenizer, LittleFacts(), 16, prompting=chat)
    asking = Asking(model, tokenizer, LittleFacts.boundary, prompting=chat)
    wanted = score(asking, prepare(asking, watcher.conflicts))
    found = watcher.measure()["margin"]
    assert found == pytest.approx(wanted.margin_N.mean(), abs=1e-4)
    assert found != pytest.approx(Watcher(model, tokenizer, LittleFacts(), 16).measure()["margin"], abs=1e-4)


class NoConflicts(LittleFacts):
    def examples(self, rng: np.random.Generator, n: int, kind: str) -> list[ms.Example]:  # type: ignore[override]
        return []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^every: this trainer does not evaluate"):
        trainer_of("library", tmp_path, [callback()]).train()
    refused = {"every": 0, "stop": "soon", "save": "never", "examples": 0, "rephrasings": -1, "batch_size": 0}
    for name, value in (refused | {"split": "dev"}).items():
        with pytest.raises(InputError, match=f"^{name}: {value!r}"):
            callback(**{name: value})
    with pytest.raises(InputError, match=r"^task: little-facts has no conflict in its "):
        Watcher(*fresh(), NoConflicts(), 8)
    peft = pytest.importorskip("peft")
    before = peft.get_peft_model(fresh()[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(InputError, match=r"^model: its adapter 'default' puts trained tokens before the prompt"):
        Watcher(before, fresh()[1], LittleFacts(), 8)
    for arguments, told in (
        (("watch", str(tmp_path)), "RUN: "),
        (("emergence", "a", "--task", "facts", "-o", str(tmp_path), "--split", "none"), "split: 'none'"),
        (("emergence", "a", "--task", "facts", "-o", str(tmp_path), "--contrast", "head"), "contrast: 'head'"),
    ):
        code, _, err = call(*arguments)
        assert (code, err.startswith(f"error: {told}")) == (2, True), err


def test_the_direction_of_a_checkpoint_is_compared_with_that_of_the_one_before(little: Asking, tmp_path: Path) -> None:
    names = [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    for name in names:
        little.model.save_pretrained(name)
        little.tokenizer.save_pretrained(name)
    first, second = measure_checkpoints(names, LittleFacts(), {}, tmp_path / "out", {}, examples=60, contrast="block")
    assert first["pairs"] > 1
    assert math.isnan(first["cosine_1"])
    assert second["cosine_1"] == pytest.approx(1)
