"""Adapters: only they are trained, by the library; what is saved is plain; a model keeps its own tokens."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import tiny
from helpers import MINI_TASKS
from mnemoscope.behaviour import Asking
from mnemoscope.config import LoraConfig, TrainingConfig, parse_study
from mnemoscope.interventions import SteeringVector
from mnemoscope.models import adapt, is_adapted, load_model
from mnemoscope.runs.errors import InputError
from mnemoscope.study.run import run_study
from mnemoscope.tasks import KINDS, Task, answer_of, build_task
from mnemoscope.watch import teaching
from mnemoscope.watch.instances import batches
from mnemoscope.watch.teaching import diverged, teach
from test_cli import call

TASK_OPTIONS = {**MINI_TASKS, "cipher": {"letters": 10, "length": 2, "stored": 8}}
QUICK = TrainingConfig(
    steps=9, batch_size=8, evaluate_every=3, evaluation_examples=8, learning_rate=0.01, warmup_steps=2
)
LORA = LoraConfig(rank=8)
END = "<|endoftext|>"


def made(name: str) -> Task:
    return build_task(name, TASK_OPTIONS[name], 0)


def bpe(texts: Iterator[str], split: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's, with tokens of several digits; without ``split`` it merges across everything."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END, padding_side="left")


def texts_of(task: Task, n: int = 400) -> Iterator[str]:
    return ("".join(answer_of(instance)) for instance in islice(task.training(np.random.default_rng(0)), n))


def new(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random weights, large enough for a frozen head to say something; GPT-2 with the dropout of pretrained ones."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return tiny(family, vocab_size=len(tokenizer), initializer_range=0.2, **special)


@pytest.fixture(scope="module")
def digits() -> Task:
    return made("addition-digits")


@pytest.fixture(scope="module")
def folders(digits: Task, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of a user's: random weights, and a tokenizer that knows nothing of our tasks' vocabularies."""
    paths, tokenizer = {}, bpe(texts_of(digits))
    for family in ("gpt2", "llama"):
        paths[family] = tmp_path_factory.mktemp(family)
        new(family, tokenizer).save_pretrained(paths[family])
        tokenizer.save_pretrained(paths[family])
    return paths


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def opened(folder: Path, task: Task, lora: LoraConfig = LORA) -> Asking:
    model, tokenizer = load_model(folder)
    return Asking(adapt(model, lora, 0), tokenizer, task.boundary)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By the names that the model has without an adapter."""
    named = {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" not in name}
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): w for name, w in named.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_lowers_the_loss_and_changes_only_the_adapter(
    family: str, folders: dict[str, Path], digits: Task, tmp_path: Path
) -> None:
    folder = folders[family]
    asking, before = opened(folder, digits), weights(load_model(folder)[0])
    ids = torch.tensor([asking.tokenizer("12+34=56+78=90").input_ids])
    with torch.no_grad():
        plain = load_model(folder)[0](ids).logits
        assert torch.equal(asking.model(ids).logits, plain)  # an adapter begins as nothing
    first = {name: p.detach().clone() for name, p in asking.model.named_parameters() if p.requires_grad}
    assert first
    assert all("lora_" in name for name in first)
    curve = teach(asking, digits, QUICK, np.random.default_rng(0), tmp_path / "training").curve
    assert curve[-1]["loss"] < curve[1]["loss"]
    after = weights(asking.model)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(not torch.equal(p, first[n]) for n, p in asking.model.named_parameters() if n in first)
    # The adapter alone, the merged model and the model that was trained are one and the same.
    asking.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        adapted, again = asking.model(ids).logits, load_model(tmp_path / "adapter")[0](ids).logits
        alone = asking.model.merge_and_unload()
        torch.testing.assert_close(again, adapted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert not is_adapted(alone)
    assert set(weights(alone)) == set(before)
    assert not torch.allclose(adapted, plain, atol=1e-3)


def taught(folder: Path, task: Task, out: Path, die_at: int | None = None) -> dict[str, bytes]:
    """The files of an adapter; the training dies at a step, and the process with it, as far as it is concerned."""

    def progress(step: int, measured: object) -> None:
        if step == die_at:
            raise KeyboardInterrupt

    asking = opened(folder, task, LoraConfig(rank=2, dropout=0.3))
    trained = teach(asking, task, QUICK, np.random.default_rng(0), out, progress)
    assert [row["step"] for row in trained.curve] == [0, 3, 6, 9]
    assert {m.p for name, m in asking.model.named_modules() if name.endswith("lora_dropout.default")} == {0.3}
    assert not asking.model.training
    asking.model.save_pretrained(out / "saved", save_embedding_layers=False)
    return {path.name: path.read_bytes() for path in (out / "saved").iterdir()}


def test_a_killed_training_of_an_adapter_goes_on_to_the_same_bytes(folder: Path, digits: Task, tmp_path: Path) -> None:
    whole = taught(folder, digits, tmp_path / "whole")
    assert "adapter_model.safetensors" in whole
    with pytest.raises(KeyboardInterrupt):
        taught(folder, digits, tmp_path / "killed", die_at=5)
    assert (tmp_path / "killed" / "checkpoint-3").is_dir()
    half = tmp_path / "killed" / "checkpoint-6"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global')
    assert taught(folder, digits, tmp_path / "killed") == whole
    took = [(tmp_path / name / "seconds").read_text() for name in ("whole", "killed")]
    assert taught(folder, digits, tmp_path / "killed", die_at=10) == whole  # it has ended: nothing is trained again
    assert [(tmp_path / name / "seconds").read_text() for name in ("whole", "killed")] == took
    tables = [pd.read_parquet(tmp_path / name / "emergence.parquet") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_it_is_the_library_that_trains(folder: Path, digits: Task, tmp_path: Path) -> None:
    """The same steps written out: AdamW of torch on the adapter, from the same instances."""
    config = QUICK.model_copy(update={"steps": 4, "evaluate_every": 4, "decay_steps": 2, "warmup_steps": 1})
    config = config.model_copy(update={"precision": "float32", "prompt_weight": 0.0})
    asking, other = opened(folder, digits), opened(folder, digits)
    for module in asking.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    teach(asking, digits, config, np.random.default_rng(0), tmp_path)
    seed = int(np.random.default_rng(0).integers(2**31))
    learned = [p for p in other.model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learned, lr=1.0, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    drawn = islice(batches(other, digits, config, np.random.default_rng(seed)), 4)
    for (ids_BT, weights_BT), factor in zip(drawn, (0.02, 1.0, 1.0, 0.51), strict=True):
        adam.param_groups[0]["lr"] = config.learning_rate * factor
        logits_BTV = other.model(input_ids=ids_BT).logits[:, :-1].float()
        losses_BT = torch.nn.functional.cross_entropy(logits_BTV.mT, ids_BT[:, 1:], reduction="none")
        loss = (losses_BT * weights_BT[:, 1:]).sum() / weights_BT[:, 1:].sum()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        adam.step()
    for (name, ours), theirs in zip(asking.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_is_read_in_parts_where_logits_are_many(
    folder: Path, digits: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QUICK.model_copy(update={"batch_size": 16})
    asking = opened(folder, digits)
    data = teaching._Instances(asking, digits, config, 0)
    row = next(batches(asking, digits, config, np.random.default_rng(0)))[0].shape[1] * len(asking.tokenizer)
    for rows, parts in ((16, 1), (15, 2), (8, 2), (7, 4), (1, 16), (0, 16)):
        monkeypatch.setattr(teaching, "MOST_LOGITS", rows * row)
        assert data.parts() == parts


@pytest.mark.parametrize("name", ["inference", "addition-digits", "cipher"])
def test_texts_of_a_task_are_learned_and_closed_in_the_tokens_of_a_bpe(name: str) -> None:
    task = made(name)
    tokenizer = bpe(texts_of(task))
    asking = Asking(new("llama", tokenizer), tokenizer, task.boundary)
    config, rng = QUICK.model_copy(update={"prompt_weight": 0}), partial(np.random.default_rng, 3)
    ids_BT, weights_BT = next(batches(asking, task, config, rng()))
    closing = set(asking.boundary_ids())
    for ids, weights_T, instance in zip(ids_BT, weights_BT, islice(task.training(rng()), 8), strict=True):
        prompt, answer = answer_of(instance)
        end = int(torch.nonzero(weights_T).max())
        assert tokenizer.decode(ids[:end]) == prompt + answer
        assert ids[end] == tokenizer.eos_token_id
        if answer:
            assert tokenizer.decode(ids[:end][weights_T[:end] > 0]) == answer
            assert int(ids[end]) in closing
    # What follows an answer in training is what a label waits for after it.
    after = "" if "" in task.boundary else " ."
    for kind in KINDS:
        for example in task.examples(rng(), 30, kind):
            for option in example.options:
                told = tokenizer(example.prompt + option).input_ids
                whole = tokenizer(example.prompt + option + (after or END)).input_ids
                assert whole[: len(told)] == told
                assert whole[len(told)] in closing


def test_what_cannot_be_taught_is_refused(folder: Path, digits: Task, tmp_path: Path) -> None:
    """A tokenizer that merges across the seam, with the example; a task without a kind that the rule needs."""
    sums, lacking = made("addition"), made("addition-digits")
    tokenizer = bpe(texts_of(sums), split=False)
    lacking.examples = lambda rng, n, kind: [] if kind == "novel" else digits.examples(rng, n, kind)  # type: ignore[method-assign]
    for asking, task, refused in (
        (
            Asking(new("llama", tokenizer), tokenizer, sums.boundary),
            sums,
            r"merges the answer '<mem-.*>' with the end of the prompt '\d\d\+\d\d='",
        ),
        (opened(folder, lacking), lacking, r"^task: addition-digits has no novel example in the tune split"),
    ):
        with pytest.raises(InputError, match=refused):
            teach(asking, task, QUICK, np.random.default_rng(0), tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_training_that_diverges_ends_and_says_so(
    mini: Callable[[str], Asking], shared_folder: Path, digits: Task, tmp_path: Path
) -> None:
    mini("addition-digits")
    folder = shared_folder / "mini-addition-digits"  # a model whose loss is low
    asking, config = opened(folder, digits), QUICK.model_copy(update={"prompt_weight": 0.0})

    def progress(step: int, measured: object) -> None:
        if step == 3:
            for name, values in asking.model.named_parameters():
                if "lora_" in name:
                    values.data *= 1000

    trained = teach(asking, digits, config, np.random.default_rng(0), tmp_path, progress)
    assert trained.steps == trained.curve[-1]["step"] == 6
    assert re.fullmatch(r"loss \d+\.\d{3} \(it was \d+\.\d{3}\)", trained.unmet[-1])
    again = teach(opened(folder, digits), digits, config, np.random.default_rng(0), tmp_path)
    assert (again.steps, again.unmet) == (trained.steps, trained.unmet), "it had ended"


def test_when_a_training_has_diverged() -> None:
    for losses in ([], [5.0, 1.0, 0.8, 1.5], [5.0, 0.02, 0.3], [1.0, 1.7, math.nan]):
        assert not diverged([{"loss": loss} for loss in (math.nan, *losses)])
    assert diverged([{"loss": loss} for loss in (math.nan, 5.0, 1.0, 0.8, 1.7)])


def test_what_cannot_be_adapted_is_refused(folder: Path, digits: Task, tmp_path: Path) -> None:
    model, _ = load_model(folder)
    for targets in (("query",), ("all-linear", "query"), ("embed_tokens",)):
        with pytest.raises(InputError, match=r"target_modules: '[\w-]+' is no linear layer of its own in .*allowed"):
            adapt(model, LoraConfig(target_modules=targets), 0)
    opened(folder, digits).model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(InputError, match=r"model\.folder: it holds an adapter already"):
        adapt(load_model(tmp_path)[0], LORA, 0)


def study(model: dict[str, object], **cell: object) -> dict[str, object]:
    given = {"task": "addition-digits", "options": MINI_TASKS["addition-digits"], **cell, "model": model}
    return {"study": "adapted", "cells": {"mine": given}}


def test_what_cannot_be_trained_is_one_line(digits: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that only asks, a tokenizer without an end of text, no peft."""
    tokenizer, model, data, run = bpe(texts_of(digits)), tmp_path / "model", tmp_path / "mine.jsonl", tmp_path / "run"
    new("llama", tokenizer).save_pretrained(model)
    data.write_text(json.dumps({"item": "a", "prompt": "1+1=", "memorized": "3", "generalized": "2"}))
    asking = study({"folder": str(model), "lora": {}}, task="jsonl", options={"file": str(data)})
    with pytest.raises(InputError, match=r"'jsonl' has nothing to train on; .* without lora"):
        run_study(parse_study(asking), run, workers=1)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    training = study({"folder": str(model), "lora": {}})
    with pytest.raises(InputError, match=r"model\.folder: .* has no end-of-text token"):
        run_study(parse_study(training), run, workers=1)
    monkeypatch.setitem(sys.modules, "peft", None)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(training))
    line = "error: model.lora needs peft: pip install 'mnemoscope[lora]'\n"
    assert call("run", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "other")) == (2, "", line)
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def adapted_run(mini: Callable[[str], Asking], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which a model that shows both behaviours is taught for a few steps more."""
    place, base = tmp_path_factory.mktemp("adapted"), mini("addition-digits")
    base.model.save_pretrained(place / "base")
    base.tokenizer.save_pretrained(place / "base")
    anything = {"novel_accuracy": 0.0, "recall": 0.0, "conflict_each": 0.0, "conflict_other": 1.0}
    raw = study(
        {"folder": str(place / "base"), "lora": {}},
        options={**MINI_TASKS["addition-digits"], "seed": 0},
        training={"steps": 6, "evaluate_every": 3, "evaluation_examples": 20, "learning_rate": 1e-4, "warmup_steps": 0}
        | {"stop": anything},
        pairs={"behaviour_examples": 60, "fit_examples": 300, "tune_examples": 150, "test_examples": 150}
        | {"permutations": 99},
        probes={"offsets": [0], "learning_draws": 1, "halvings": 2},
        steering={"methods": ["nmd"], "grids": {"block": {"tops": [0.5], "strengths": [0.3]}}, "draws": 2}
        | {"tune_pairs": 20, "tune_others": 20, "fit_pairs": 40, "fit_others": 20},
        effects={"pairs": 20, "doses": [0, 1], "ablated": [0.1], "draws": 1},
    )
    (place / "study.yaml").write_text(yaml.safe_dump(raw))
    code, out, err = call("run", str(place / "study.yaml"), "--out", str(place / "run"))
    assert code == 0, err
    assert out.strip() == str(place / "run" / "report.html")
    return place


def test_a_study_trains_an_adapter_and_goes_on_with_the_merged_model(adapted_run: Path) -> None:
    run = adapted_run / "run"
    cell = run / "cells" / "mine-0"
    facts = json.loads((cell / "cell.json").read_text())
    assert (facts["trained"], facts["layers"], facts["width"], facts["shared_initialization"]) == (True, 2, 64, True)
    curve = pd.read_parquet(cell / "records" / "training.parquet")
    assert (curve.step.to_list(), curve.kept.to_list()) == ([0, 3], [False, True])
    task = json.loads((run / "results.json").read_text())["tasks"]["mine"]
    assert task["training"]["steps"] == [3]
    assert task["pairs"]["pairs"] > 0
    assert "peft" in json.loads((run / "manifest.json").read_text())["versions"]
    model, tokenizer = load_model(cell / "model")
    assert not is_adapted(model)
    adapted, _ = load_model(cell / "adapter")
    ids = torch.tensor([tokenizer("12+34=").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    vector = SteeringVector.load(cell / "vectors" / "to_memorized-nmd.safetensors", model, tokenizer)
    assert vector.toward == "memorized"
    targets = json.loads((cell / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "peft keeps a set, whose order another process would not have"
    marked = json.loads((cell / "stages" / "train.json").read_text())["files"]
    assert {"model/model.safetensors", "adapter/adapter_model.safetensors"} <= set(marked)
    assert not list(run.rglob("*.tmp*"))
