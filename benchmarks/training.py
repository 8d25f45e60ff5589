"""Seconds until a model shows both behaviours: our loop with the recipe of a study, and ``transformers.Trainer``.

    OMP_NUM_THREADS=2 python benchmarks/training.py [--study quickstart] [--cells inference addition] [--seeds 2]

Both train the same model on the same task and are measured by the same stop rule, on the same tune examples, as often;
that time counts for both. Ours is the study's recipe. The Trainer's is the one that this project began with: AdamW and
the library's schedule; its instances are tokenized many at a time and padded by the library's collator, and its passes
are in bfloat16 where that is quicker for it (``--bf16``). It is given up after ``--most`` times our seconds. What the
Trainer does with our optimizers is ours but for the loop, and is not measured.

Shapes: B instances of a batch, T tokens.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import origin, put
from torch import nn

from mnemoscope.behaviour import Asking
from mnemoscope.config import CellConfig, TrainingConfig, load_study
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.processes import settle
from mnemoscope.tasks import Task, answer_of, build_task
from mnemoscope.training import measure, prepare_evaluation, train, unmet

# What the project began with: AdamW, the loss on answers only for sums and on everything for statements.
ADAMW = {"adam_beta1": 0.9, "adam_beta2": 0.98, "weight_decay": 0.1, "lr_scheduler_type": "constant_with_warmup"}
RATES = {"inference": 1e-3, "addition": 2e-3}


@dataclass(frozen=True)
class Found:
    """How long a way took.

    Attributes:
        seconds: until the rule first held, or until it was given up.
        steps: optimizer steps by then.
        missed: what the stop rule still missed; empty where it held.
        whole: seconds until the way ended, steps after the rule held included.
    """

    seconds: float
    steps: int
    missed: list[str]
    whole: float


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="quickstart")
    parser.add_argument("--cells", nargs="+", default=["inference", "addition"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=float, default=4.0, help="times our seconds for the Trainer")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--bf16", nargs="*", default=[], help="cells in which the Trainer's passes are in bfloat16")
    parser.add_argument("--write", type=Path, help="file for the table, as peers.py writes it")
    arguments = parser.parse_args()
    settle(arguments.threads)
    study = load_study(arguments.study)
    lines = [
        "| cell, seed | way | seconds to both | steps | to its end | times ours | |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for label in arguments.cells:
        cell = study.cells[label]
        for seed in range(arguments.seeds):
            mine = _ours(cell, seed)
            lines.append(_said(label, seed, "Mnemoscope", mine, mine))
            if not arguments.ours_only:
                theirs = _trainers(cell, label, seed, arguments.most * mine.whole, label in arguments.bf16)
                lines.append(_said(label, seed, "transformers.Trainer, AdamW", theirs, mine))
    if arguments.write:
        what = "Seconds until both behaviours were there first (by the stop rule of the study), one after the other."
        put(arguments.write, "training", ["## training", "", what, "", *lines, "", origin(1, arguments.threads), ""])


def _said(label: str, seed: int, who: str, found: Found, mine: Found) -> str:
    missed = "; ".join(found.missed)
    times = f"{'more than ' if missed else ''}{found.seconds / mine.seconds:.2f}"
    steps = f"{found.seconds:.1f} | {found.steps} | {found.whole:.1f}"
    line = f"| {label}, {seed} | {who} | {steps} | {times} | {missed or 'both behaviours'} |"
    print(line, flush=True)
    return line


def _begun(cell: CellConfig, seed: int) -> tuple[Asking, Task]:
    task = build_task(cell.task, cell.options, seed)
    tokenizer = word_tokenizer(task.vocabulary or (), cell.model.context)
    return Asking(build_gpt2(tokenizer, cell.model, seed), tokenizer, task.boundary), task


def _ours(cell: CellConfig, seed: int) -> Found:
    asking, task = _begun(cell, seed)
    began, first = time.perf_counter(), []

    def progress(step: int, measured: dict[str, float]) -> None:
        if measured and not first and not unmet(cell.training.stop, measured):
            first.append((time.perf_counter() - began, step))

    trained = train(asking, task, cell.training, np.random.default_rng(seed), progress)
    seconds, steps = first[0] if first else (trained.seconds, trained.steps)
    return Found(seconds, steps, trained.unmet, time.perf_counter() - began)


AHEAD = 2048  # instances that are tokenized together for the Trainer


class _Instances(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """Instances as they come, with labels on what the recipe learns from."""

    def __init__(self, asking: Asking, task: Task, config: TrainingConfig, seed: int) -> None:
        self.asking, self.task, self.answers_only, self.seed = asking, task, config.prompt_weight < 1, seed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        tokenizer, instances = self.asking.tokenizer, self.task.training(np.random.default_rng(self.seed))
        while True:
            parts = [answer_of(instance) for instance in islice(instances, AHEAD)]
            prompts = tokenizer([prompt for prompt, _ in parts]).input_ids
            texts = tokenizer([prompt + answer for prompt, answer in parts]).input_ids
            for (_, answer), prompt_ids, text_ids in zip(parts, prompts, texts, strict=True):
                given = len(prompt_ids) if answer and self.answers_only else 0
                ids = [*text_ids, tokenizer.eos_token_id]
                yield {"input_ids": ids, "labels": [-100] * given + ids[given:]}


def _trainers(cell: CellConfig, label: str, seed: int, most: float, bf16: bool) -> Found:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    asking, task = _begun(cell, seed)
    evaluation = prepare_evaluation(asking, task, cell.training.evaluation_examples, np.random.default_rng(seed))
    to_the_right = copy.deepcopy(asking.tokenizer)
    to_the_right.padding_side = "right"  # positions are counted from the first column
    measured: dict[str, float] = {}
    began = 0.0

    class Stop(TrainerCallback):
        """The study's rule, as often as the study looks."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % cell.training.evaluate_every == 0:
                asking.model.eval()
                measured.update(measure(evaluation))
                asking.model.train()
                if not unmet(cell.training.stop, measured) or time.perf_counter() - began > most:
                    control.should_training_stop = True

    for module in asking.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with tempfile.TemporaryDirectory() as folder:
        given = TrainingArguments(
            output_dir=str(Path(folder)),
            max_steps=100_000,
            per_device_train_batch_size=cell.training.batch_size,
            learning_rate=RATES[label],
            warmup_steps=50,
            seed=seed,
            use_cpu=True,
            bf16=bf16,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
            remove_unused_columns=False,
            **ADAMW,
        )
        trainer = Trainer(
            model=asking.model,
            args=given,
            train_dataset=_Instances(asking, task, cell.training, seed),
            data_collator=DataCollatorForSeq2Seq(to_the_right, padding=True),
            callbacks=[Stop()],
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return Found(seconds, trainer.state.global_step, unmet(cell.training.stop, measured), seconds)


if __name__ == "__main__":
    main()
