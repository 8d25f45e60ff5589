"""What the callback says of trainings whose behaviour is known at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import mnemoscope as ms
from known_switch import GATHERS, GENERALIZED, LAYERS, MEMORIZED, SWITCH, KnownSwitch, known_model
from mnemoscope.behaviour import Asking
from mnemoscope.runs.errors import InputError

EVERY = 10


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Texts as token ids, padded with what the loss leaves out."""

    def __init__(self, texts: list[str], tokenizer: Any) -> None:
        rows = [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        self.ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        self.labels = pad(rows, batch_first=True, padding_value=-100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[n], "labels": self.labels[n]}


def trained(asking: Asking, texts: list[str], out: Path, callbacks: list[Any], **options: Any) -> Any:
    how: dict[str, Any] = {"output_dir": str(out), "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    how |= {"disable_tqdm": True, "per_device_train_batch_size": 16, "lr_scheduler_type": "constant", "seed": 0}
    data = Rows(texts, asking.tokenizer)
    trainer = Trainer(asking.model, TrainingArguments(**how | options), train_dataset=data, callbacks=callbacks)
    trainer.train()
    return trainer


@dataclass
class Planted(TrainerCallback):
    """A model heeds its votes, only its memory or only its rule: ``before`` a step, and ``after``."""

    asking: Asking
    before: str
    after: str
    at: int

    def __post_init__(self) -> None:
        self.head = self.asking.model.lm_head.weight
        self.own = self.head.detach().clone()

    def plant(self, what: str) -> None:
        with torch.no_grad():
            self.head.copy_(self.own)
            if what != "votes":
                loser = {"memory": GENERALIZED, "rule": MEMORIZED}[what]
                self.head[:, SWITCH] = 0.0
                self.head[self.asking.tokenizer.convert_tokens_to_ids(loser)] *= 0.9

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.plant(self.before)

    def on_step_begin(self, args: Any, state: Any, control: Any, **__: Any) -> None:
        if state.global_step == self.at - 1:
            self.plant(self.after)


def planted(before: str, after: str, out: Path, at: int = 21, **options: Any) -> Any:
    """The callback of a training of 40 steps that changes nothing but what is planted."""
    asking = known_model("switch")
    watching = ms.BehaviourCallback(
        KnownSwitch(), asking.tokenizer, every=EVERY, examples=200, contrast="block", **options
    )
    rng = np.random.default_rng(0)
    texts = [e.prompt + e.options[0] for e in KnownSwitch().examples(rng, 64, "conflict")]
    callbacks = [Planted(asking, before, after, at), watching]  # what is planted is planted before it is measured
    trained(asking, texts, out, callbacks, max_steps=40, learning_rate=0.0)
    return watching


@pytest.mark.filterwarnings("ignore")
def test_a_planted_switch_is_seen_when_it_is_there_and_where(tmp_path: Path) -> None:
    watching = planted("memory", "votes", tmp_path, stop="both")
    rows = watching.curve.rows
    assert [row["step"] for row in rows] == [0, 10, 20, 30]  # and it stops
    for row in rows[:3]:
        assert (row["conflict_memorized"], row["conflict_other"], row["pairs"]) == (1.0, 0.0, 0.0)
        assert math.isnan(row["rho_1"])
    last = rows[-1]
    assert 0.3 < last["conflict_memorized"] < 0.7
    assert last["conflict_memorized"] + last["conflict_generalized"] == 1.0
    assert 0.3 < last["yield"] < 0.7
    assert all(last[f"rho_{layer}"] < 0.4 for layer in range(GATHERS))
    assert all(last[f"rho_{layer}"] > 0.6 for layer in range(GATHERS, LAYERS))
    # Its shares are those of what the library generates.
    model, tokenizer = watching.watcher.asking.model, watching.watcher.asking.tokenizer
    conflicts = watching.watcher.drawn["conflict"]
    inputs = tokenizer([example.prompt for example in conflicts], return_tensors="pt", padding=True)
    made = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    said = [f" {word}" for word in tokenizer.convert_ids_to_tokens(made.tolist())]
    share = np.mean([text == example.memorized for text, example in zip(said, conflicts, strict=True)])
    assert share == last["conflict_memorized"]


@pytest.mark.filterwarnings("ignore")
def test_it_is_seen_when_memory_overtakes_the_rule(tmp_path: Path) -> None:
    rows = planted("rule", "memory", tmp_path, stop="overtaken").curve.rows
    assert [row["conflict_memorized"] for row in rows] == [0.0, 0.0, 0.0, 1.0]
    rows = planted("memory", "rule", tmp_path, stop="overtaken").curve.rows
    assert [row["conflict_memorized"] for row in rows] == [1.0, 1.0, 1.0, 0.0, 0.0]


class OnePhrasing(KnownSwitch):
    def rephrase(self, example: ms.Example, rng: np.random.Generator) -> ms.Example:
        return example


@pytest.mark.filterwarnings("ignore")
def test_items_of_one_phrasing_are_refused_before_the_first_step_where_pairs_are_wanted(tmp_path: Path) -> None:
    asking = known_model("switch")

    def begin(**options: Any) -> None:
        watching = ms.BehaviourCallback(OnePhrasing(), asking.tokenizer, every=10, **options)
        trained(asking, ["m0", "m1"], tmp_path, [watching], max_steps=1, learning_rate=0.0)

    with pytest.raises(InputError, match=r"^task: known-switch asks each item of its tune split in one phrasing"):
        begin()
    assert not list(tmp_path.glob("emergence.*"))
    begin(rephrasings=0)
    assert list(tmp_path.glob("emergence.*"))
