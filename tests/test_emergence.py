"""The callback measures what `score` does, in the trainers that people use, and leaves their training as it is."""

from __future__ import annotations

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
from mnemoscope.watch import Asked, Curve, Watcher, reached, undisturbed
from mnemoscope.watch.callback import WANTED, check_shards
from test_cli import call

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
STEPS = 20
EASY = StopConfig(recall=0.0, novel_accuracy=0.0, conflict_each=0.0, conflict_other=1.0)


def fresh() -> tuple[Any, Any]:
    """A small model with dropout, and its tokenizer."""
    tokenizer = word_tokenizer(VOCABULARY, 32)
    model = build_gpt2(tokenizer, ModelConfig(layers=2, width=32, heads=2, context=32), 0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model, tokenizer


def watcher_of(model: Any, examples: int = 16, **asked: Any) -> Watcher:
    return Watcher(model, fresh()[1], LittleFacts(), Asked(examples=examples, **asked))


def trainer_of(kind: str, out: Path, callbacks: list[Any], model: Any = None, **more: Any) -> Any:
    """A trainer of a fresh model: the library's or TRL's, of all weights or of an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    datasets, (untouched, tokenizer) = pytest.importorskip("datasets"), fresh()
    model = model or untouched
    lora = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
    options: dict[str, Any] = {"output_dir": str(out), "max_steps": STEPS, "logging_steps": 1, "report_to": "none"}
    options |= {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True}
    options |= {"use_cpu": True, "seed": 3, **more}
    drawn = islice(LittleFacts().training(np.random.default_rng(0)), 256)
    texts = [prompt + answer for prompt, answer in drawn]
    torch.manual_seed(0)
    if kind.startswith("sft"):
        trl, data = pytest.importorskip("trl"), datasets.Dataset.from_dict({"text": texts})
        arguments = trl.SFTConfig(**options, dataset_text_field="text", max_length=32)
        given = {"processing_class": tokenizer, "peft_config": lora if kind.endswith("adapter") else None}
        return trl.SFTTrainer(model, args=arguments, train_dataset=data, callbacks=callbacks, **given)
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
    labels = [row + [-100] * (longest - len(row)) for row in rows]
    data = datasets.Dataset.from_dict({"input_ids": padded, "labels": labels})
    if kind.endswith("adapter"):
        model = get_peft_model(model, lora)
    tested = data.select(range(8))
    return Trainer(model, TrainingArguments(**options), train_dataset=data, eval_dataset=tested, callbacks=callbacks)


def callback(**more: Any) -> Any:
    return ms.BehaviourCallback(LittleFacts(), fresh()[1], **{"examples": 16, **more})


@pytest.mark.parametrize("kind", ["library", "library, mixed, adapter", "sft, adapter"])
def test_losses_are_the_same_with_and_without_it(kind: str, tmp_path: Path) -> None:
    found = []
    mixed = {"bf16": True, "gradient_accumulation_steps": 2} if "mixed" in kind else {}
    for callbacks in ([], [callback(every=10, contrast="block")]):
        trainer = trainer_of(kind, tmp_path / str(len(found)), callbacks, **mixed)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]  # TRL's own measures among them
        found.append((logged, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
    (without, before), (with_it, after) = found
    assert len(without) == STEPS
    assert without == with_it
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = callbacks[0].curve.rows
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert math.isnan(rows[0]["loss"])
    for row in rows[1:]:
        steps = [entry["loss"] for entry in with_it if row["step"] - 10 < entry["step"] <= row["step"]]
        assert row["loss"] == pytest.approx(np.mean(steps))


def test_what_it_logs_is_what_the_model_of_that_step_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the log, in TensorBoard, in the table, and against plain scores."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    watching, how = callback(contrast="block"), {"eval_strategy": "steps", "eval_steps": 10}
    trainer = trainer_of("library", tmp_path, [watching], report_to="tensorboard", **how)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_recall" in entry]
    assert [entry["step"] for entry in logged] == [0, 10, 20]
    (events,) = {path.parent for path in (tmp_path / "board").rglob("events*")}
    read = accumulator.EventAccumulator(str(events)).Reload()
    assert [point.step for point in read.Scalars("eval/recall")] == [0, 10, 20]
    table = pd.read_parquet(tmp_path / "emergence.parquet")
    assert (tmp_path / "emergence.png").read_bytes()[:4] == b"\x89PNG"
    assert table.step.to_list() == [0, 10, 20]
    for entry, row in zip(logged, table.to_dict("records"), strict=True):
        for name in ("recall", "conflict_memorized", "conflict_generalized", "conflict_other", "margin", "yield"):
            assert entry[f"eval_{name}"] == row[name]
    asking = Asking(trainer.model.eval(), fresh()[1], LittleFacts.boundary)
    watcher = watcher_of(trainer.model, contrast="block")
    scores = score(asking, prepare(asking, watcher.drawn["conflict"]))
    assert row["conflict_memorized"] == np.mean(scores.behaviour_N == "memorized")
    assert row["margin"] == pytest.approx(scores.margin_N.mean(), abs=1e-4)
    (batch,) = mine_pairs(asking, watcher.candidates, chunk=len(watcher.candidates))
    assert (row["pairs"], row["yield"]) == (batch.is_pair_N.sum(), batch.is_pair_N.mean())


def test_a_row_is_of_the_weights_of_its_step_and_the_best_can_be_chosen_by_it(tmp_path: Path) -> None:
    """Several evaluations of one step, the best weights brought back at the end, an evaluation by hand."""
    how: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10}
    how |= {"eval_on_start": True, "load_best_model_at_end": True, "metric_for_best_model": "eval_margin"}
    watching = callback(contrast="block")
    trainer = trainer_of("library", tmp_path, [watching], greater_is_better=False, **how)
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    trainer.train()
    rows = [dict(row) for row in watching.curve.rows]
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert sum("eval_recall" in entry for entry in trainer.state.log_history) == 3
    trainer.evaluate()
    assert len(watching.curve.rows) == 3
    best = min(row["margin"] for row in rows[1:])
    assert trainer.state.best_metric == best
    assert watcher_of(trainer.model).measure()["margin"] == pytest.approx(best, abs=1e-4)


def test_it_stops_and_saves_when_a_rule_holds_and_goes_on_with_its_table(tmp_path: Path) -> None:
    how: dict[str, Any] = {"every": 5, "save": "both", "wanted": EASY}
    trainer = trainer_of("library", tmp_path, [callback(stop="both", **how)])
    trainer.train()
    assert trainer.state.global_step == 5
    first = Curve.open(tmp_path / "emergence.parquet").rows
    resumed = trainer_of("library", tmp_path, [callback(**how)], max_steps=15)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    rows = Curve.open(tmp_path / "emergence.parquet").rows
    assert [row["step"] for row in rows] == [0, 5, 10, 15]
    assert [row["conflict_memorized"] for row in rows[:2]] == [row["conflict_memorized"] for row in first]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"], "one is saved, and none again"
    trainer_of("library", tmp_path / "late", [callback(**how | {"every": 60})], max_steps=5).train()
    assert [path.name for path in (tmp_path / "late").glob("checkpoint-*")] == ["checkpoint-5"], "of the last step too"


@pytest.mark.parametrize(
    ("when", "shares", "recall", "holds"),
    [
        ("both", [(0.4, 0.6)], 1.0, True),
        ("both", [(0.4, 0.6)], 0.5, False),
        ("both", [(0.1, 0.9)], 1.0, False),
        ("both", [(0.4, 0.4)], 1.0, False),
        ("overtaken", [(0.2, 0.8), (0.6, 0.4)], 1.0, True),
        ("overtaken", [(0.6, 0.4), (0.7, 0.3)], 1.0, False),
        ("overtaken", [(0.2, 0.8), (0.6, 0.4), (0.4, 0.6)], 1.0, False),
        ("overtaken", [(0.0, 0.0), (0.1, 0.0)], 1.0, False),  # the rule never led
    ],
)
def test_when_a_rule_holds(when: Any, shares: list[tuple[float, float]], recall: float, holds: bool) -> None:
    names = ("conflict_memorized", "conflict_generalized", "conflict_other")
    rows = [dict(zip(names, (*both, 1 - sum(both)), strict=True)) | {"recall": recall} for both in shares]
    assert reached(when, rows, WANTED) == holds


def test_nothing_random_moves_and_every_mode_comes_back() -> None:
    model, _ = fresh()
    watcher = watcher_of(model.train())
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    drawn = []
    for measures in (True, False):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        if measures:
            watcher.measure()
            with undisturbed(model):
                torch.rand(3), random.random(), np.random.rand()
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]
    assert [module.training for module in model.modules()] == modes


TWO = """
import os, sys, torch
sys.path[:0] = {paths!r}
from pathlib import Path
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import test_emergence

out = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
options = {{"max_steps": 20, "ddp_backend": "gloo"}}
watching = test_emergence.callback(every=10)
test_emergence.trainer_of("library", out / "two", [watching], learning_rate=0.0, **options).train()
model, mesh = test_emergence.fresh()[0], init_device_mesh("cpu", (2,))
for part in (*model.transformer.h, model):
    fully_shard(part, mesh=mesh)
watching = test_emergence.callback(every=10, contrast="block")
trainer = test_emergence.trainer_of("library", out / "sharded", [watching], model=model, **options)
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


@pytest.mark.slow
def test_two_processes_log_what_one_logs_and_shards_show_what_the_whole_shows(tmp_path: Path) -> None:
    """DDP without a learning rate, so that the weights are the same; FSDP 2 against models of the whole weights."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(paths=[str(Path(__file__).parent), str(Path(ms.__file__).parents[1])]))
    both = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *both, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("eval_recall") == 6  # the first process alone logs
    two = pd.read_parquet(tmp_path / "two" / "emergence.parquet").drop(columns=["loss", "epoch"])
    assert two.step.to_list() == [0, 10, 20]
    model, _ = fresh()
    wanted = watcher_of(model).measure()
    for row in two.to_dict("records"):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)
    rows = pd.read_parquet(tmp_path / "sharded" / "emergence.parquet").to_dict("records")
    watcher = watcher_of(model, contrast="block")
    first = watcher.measure()
    model.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
    last = watcher.measure()
    assert first["margin"] != last["margin"]
    for row, wanted in ((rows[0], first), (rows[2], last)):
        for name in wanted:
            if not name.startswith("cosine"):  # with the measurement before, which is that of step 10
                assert row[name] == pytest.approx(wanted[name], abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize(
    ("version", "deepspeed", "refused"),
    [(2, False, None), (1, False, r"^fsdp: version 1 wraps what it shards; use version 2"), (2, True, r"^deepspeed: ")],
)
def test_shards_that_a_pass_does_not_gather_are_refused(version: int, deepspeed: bool, refused: str | None) -> None:
    """By what a trainer is known by when a launcher shards; the plugin is the library's."""
    from accelerate import FullyShardedDataParallelPlugin

    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=version))
    trainer = SimpleNamespace(is_deepspeed_enabled=deepspeed, accelerator=SimpleNamespace(state=state))
    if refused is None:
        check_shards(trainer)
    else:
        with pytest.raises(InputError, match=refused):
            check_shards(trainer)


class SeveralFamilies(LittleFacts):
    """Memory is asked in two families of phrasings."""

    def examples(self, rng: np.random.Generator, n: int, kind: str) -> list[ms.Example]:  # type: ignore[override]
        found = super().examples(rng, n, kind)  # type: ignore[arg-type]
        return [replace(e, family=("odd", "even")[i % 2]) if kind == "memory" else e for i, e in enumerate(found)]


def test_recall_is_told_by_family_too(little: Asking, tmp_path: Path) -> None:
    watcher = Watcher(little.model, little.tokenizer, SeveralFamilies(), Asked(examples=40))
    row = watcher.measure()
    memory = watcher.answers[watcher.answers.kind == "memory"]
    families = {e.prompt: e.family for e in watcher.drawn["memory"]}
    for family in ("odd", "even"):
        right = memory.behaviour[memory.prompt.map(families) == family] == "correct"
        assert (row[f"recall:{family}"], row[f"recall:{family}_n"]) == (right.mean(), len(right))
    assert not [name for name in row if name.startswith("novel_accuracy:")]
    table = pd.DataFrame([{"step": 0, **row}, {"step": 10, **row}])
    one = draw_curve(table, tmp_path / "one.png").read_bytes()
    fewer = table[[name for name in table if ":" not in name]]
    assert len(draw_curve(fewer, tmp_path / "two.png").read_bytes()) < len(one)
    watching = ms.BehaviourCallback(SeveralFamilies(), fresh()[1], every=10, examples=16)
    trainer = trainer_of("library", tmp_path, [watching], max_steps=1)
    trainer.train()
    assert {"eval_recall:odd", "eval_recall:even"} <= set(trainer.state.log_history[0])


def test_conversations_are_asked_in_their_template() -> None:
    (model, tokenizer), chat = fresh(), ms.Prompting(chat=True, reply=" quiz")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    watcher = Watcher(model, tokenizer, LittleFacts(), Asked(examples=16, prompting=chat))
    asking = Asking(model, tokenizer, LittleFacts.boundary, prompting=chat)
    wanted = score(asking, prepare(asking, watcher.drawn["conflict"])).margin_N.mean()
    assert watcher.measure()["margin"] == pytest.approx(wanted, abs=1e-4)
    assert watcher_of(model).measure()["margin"] != pytest.approx(wanted, abs=1e-4)


class NoConflicts(LittleFacts):
    def examples(self, rng: np.random.Generator, n: int, kind: str) -> list[ms.Example]:  # type: ignore[override]
        return []


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    best = {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "margin"}
    for watching, how, told in (
        (callback(), {}, "every: this trainer does not evaluate"),
        (callback(save="both"), best, "save: with save_strategy 'best' a trainer saves nothing else"),
    ):
        with pytest.raises(InputError, match=f"^{told}"):
            trainer_of("library", tmp_path, [watching], **how).train()
    refused = {"every": 0, "stop": "soon", "save": "never", "examples": 0, "rephrasings": -1, "batch_size": 0}
    for name, value in (refused | {"split": "dev", "contrast": "head"}).items():
        with pytest.raises(InputError, match=f"^{name}: {value!r}"):
            callback(**{name: value})
    with pytest.raises(InputError, match=r"^task: little-facts has no conflict in its "):
        Watcher(*fresh(), NoConflicts())
    peft = pytest.importorskip("peft")
    before = peft.get_peft_model(fresh()[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(InputError, match=r"^model: its adapter 'default' puts trained tokens before the prompt"):
        watcher_of(before)
    for arguments, told in (
        (("watch", str(tmp_path)), "RUN: "),
        (("emergence", "a", "--task", "facts", "-o", str(tmp_path), "--split", "none"), "Invalid value for '--split'"),
    ):
        code, _, err = call(*arguments)
        assert (code, err.startswith(f"error: {told}")) == (2, True), err
