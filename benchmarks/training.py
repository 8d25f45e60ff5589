"""Seconds a step, and until a model shows both behaviours: our loop, and ``transformers.Trainer`` with two recipes.

    pip install '.[bench]'
    OMP_NUM_THREADS=2 python benchmarks/training.py [--study quickstart] [--cells inference addition] [--seeds 2]

All train the same model on the same instances in the same order, and are measured by the study's stop rule on the same
tune examples after as many steps. They take turns of ``evaluate_every`` steps. ``CONTESTANTS`` says what each is.

Shapes: B instances of a batch, T tokens.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import ratios
from tables import origin, put
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from turns import Training, Turn, Turns, in_turns

from mnemoscope.behaviour import Asking
from mnemoscope.config import CellConfig, TrainingConfig, load_study
from mnemoscope.models import build_gpt2, in_precision, quick_precision, word_tokenizer
from mnemoscope.models.passes import Precision
from mnemoscope.paper.loop import Evaluation, train
from mnemoscope.paper.optimizers import optimizers_for, rate_factor
from mnemoscope.runs.processes import quiet_library, settle
from mnemoscope.tasks import Task, answer_of, build_task
from mnemoscope.watch.curve import unmet
from mnemoscope.watch.instances import batches, row_lengths, weighted_loss

OURS, RECIPE, PLAIN = "Mnemoscope", "Trainer, our recipe", "Trainer, plain"
CONTESTANTS = f"""\
- **{OURS}**: `mnemoscope.paper.loop.train` with the recipe of the study.
- **{RECIPE}**: `transformers.Trainer` with that recipe, by our own functions: optimizers (Muon and AdamW), learning
  rates, weights of tokens in the loss, precision of the passes, encoded instances. Only the loop differs: the library's
  data loader, bookkeeping and callbacks, and one padded pass where ours cuts a batch into short and long rows.
- **{PLAIN}**: `transformers.Trainer` with the recipe that this project began with: AdamW, and the library's schedule,
  loss and collator; its bfloat16 in the cells of `--bf16`, where that is quicker for it, else float32. It is known
  not to learn `inference`."""
WHAT = """\
All take turns of as many steps and a measurement, one at work at a time. A step is without measurements; its ratios are
median (range) over the turns taken beside ours, the first left out. To both: until the stop rule of the study first
held, with measurements, without settling. On a shared machine, trust processor time."""
CLOCK, PROCESSOR = 0, 1  # times of a turn
# What the project began with: AdamW, the loss on answers only for sums and on everything for statements.
ADAMW = {"adam_beta1": 0.9, "adam_beta2": 0.98, "weight_decay": 0.1, "lr_scheduler_type": "constant_with_warmup"}
RATES = {"inference": 1e-3, "addition": 2e-3}
AHEAD = 2048  # instances that are tokenized together for the plain Trainer


@dataclass(frozen=True)
class Begun:
    """What every contestant begins with."""

    asking: Asking
    task: Task
    config: TrainingConfig
    seed: int


Contestant = Callable[[Begun, Turns], None]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="quickstart")
    parser.add_argument("--cells", nargs="+", default=["inference", "addition"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trainers", nargs="*", default=[RECIPE, PLAIN], choices=[RECIPE, PLAIN])
    parser.add_argument(
        "--most", type=float, default=4.0, help="times our processor time, after which a Trainer is given up"
    )
    parser.add_argument("--bf16", nargs="*", default=[], help="cells with the plain Trainer's passes in bfloat16")
    parser.add_argument("--write", type=Path, help="file for the table, as peers.py writes it")
    arguments = parser.parse_args()
    study = load_study(arguments.study)
    lines = [
        "| cell, seed | contestant | ms a step | times ours | in processor time | steps to both | seconds | times ours "
        "| in processor time | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for label in arguments.cells:
        cell, plain = study.cells[label], partial(with_adamw, rate=RATES[label], bf16=label in arguments.bf16)
        contestants: dict[str, Contestant] = {OURS: ours, RECIPE: with_our_recipe, PLAIN: plain}
        for seed in range(arguments.seeds):
            trainings: dict[str, Training] = {
                name: partial(_begin, contestants[name], cell, seed, arguments.threads)
                for name in [OURS, *arguments.trainers]
            }
            turns = in_turns(trainings, cell.training.evaluate_every, partial(_is_over, arguments.most))
            lines += _rows(f"{label}, {seed}", turns)
    if arguments.write:
        head = ["## training", "", CONTESTANTS, "", WHAT, ""]
        put(arguments.write, "training", [*head, *lines, "", origin(1, arguments.threads), ""])


def _begin(contestant: Contestant, cell: CellConfig, seed: int, threads: int, turns: Turns) -> None:
    settle(threads)
    quiet_library()
    task = build_task(cell.task, cell.options, seed)
    tokenizer = word_tokenizer(task.vocabulary or (), cell.model.context)
    asking = Asking(build_gpt2(tokenizer, cell.model, seed), tokenizer, task.boundary)
    turns.begin()
    training = cell.training.model_copy(update={"hold": None, "averaged": 1})  # which the Trainer lacks
    contestant(Begun(asking, task, training, seed), turns)


def _is_over(most: float, name: str, turns: Mapping[str, list[Turn]]) -> bool:
    if not turns[name][-1].missed:
        return True
    mine, its = turns[OURS], turns[name]
    return bool(mine) and not mine[-1].missed and _whole(its, PROCESSOR) > most * _whole(mine, PROCESSOR)


def _whole(turns: list[Turn], which: int) -> float:
    return sum(turn.whole[which] for turn in turns)


def _rows(place: str, turns: dict[str, list[Turn]]) -> list[str]:
    rows = []
    for name, found in turns.items():
        ms, times = _per_step(turns, name, CLOCK)
        step = f"{ms:.1f} | {times} | {_per_step(turns, name, PROCESSOR)[1]}"
        missed = "; ".join(found[-1].missed)
        ratio = [
            f"{'more than ' if missed else ''}{_whole(found, which) / _whole(turns[OURS], which):.2f}"
            for which in (CLOCK, PROCESSOR)
        ]
        both = f"{found[-1].steps} | {_whole(found, CLOCK):.1f} | {' | '.join(ratio)} | {missed or 'both behaviours'}"
        rows.append(f"| {place} | {name} | {step} | {both} |")
    print("\n".join(rows), flush=True)
    return rows


def _per_step(turns: dict[str, list[Turn]], name: str, which: int) -> tuple[float, str]:
    """Milliseconds, and the ratio to ours."""
    beside = slice(1, min(len(turns[name]), len(turns[OURS])))
    taken = {key: np.array([turn.per_step[which] for turn in turns[key][beside]]) for key in (OURS, name)}
    middle, least, most = ratios(taken, OURS)[name]
    return 1e3 * float(np.median(taken[name])), f"{middle:.2f} ({least:.2f} to {most:.2f})"


def ours(begun: Begun, turns: Turns) -> None:
    """Train by our loop."""
    config = begun.config

    def progress(step: int, measured: dict[str, float]) -> None:
        turns.stepped(step)
        if step % config.evaluate_every == 0:
            turns.measured(step, unmet(config.stop, measured))

    train(begun.asking, begun.task, config, np.random.default_rng(begun.seed), progress)


class _Turned(TrainerCallback):
    """The study's rule, as often as the study looks."""

    def __init__(self, begun: Begun, rng: np.random.Generator, turns: Turns) -> None:
        self.begun, self.turns = begun, turns
        self.evaluation = Evaluation(begun.asking, begun.task, begun.config, rng)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        config, model = self.begun.config, self.begun.asking.model
        self.turns.stepped(state.global_step)
        if state.global_step % config.evaluate_every == 0:
            model.eval()
            self.turns.measured(state.global_step, unmet(config.stop, self.evaluation.measure().shares))


class _Rows(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Instances as they come."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows


def _arguments(begun: Begun, folder: str, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=begun.config.batch_size,
        seed=begun.seed,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        **more,
    )


class _Together(torch.optim.Optimizer):
    """Several optimizers as the one that the Trainer takes; their groups are its groups."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the library moves the state, empty yet, to the device this way, and would replace the groups."""


class _OurRecipe(Trainer):
    """The library's loop around our loss, in our precision."""

    precision: Precision

    def training_step(self, model: Any, *given: Any, **more: Any) -> Tensor:
        with in_precision(model, self.precision):
            return super().training_step(model, *given, **more)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *given: Any, **more: Any) -> Tensor:
        weights_BT = inputs["weights"]
        return weighted_loss(model, inputs["input_ids"], weights_BT, weights_BT[:, 1:].sum())


def with_our_recipe(begun: Begun, turns: Turns) -> None:
    """Train by the library's Trainer with the recipe of the study."""
    config, asking, rng = begun.config, begun.asking, np.random.default_rng(begun.seed)
    turned = _Turned(begun, rng, turns)
    optimizer = _Together(optimizers_for(asking.model, config))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_factor, config=config))

    def rows() -> Iterator[dict[str, Tensor]]:
        for ids_BT, weights_BT in batches(asking, begun.task, config, rng):
            for ids_T, weights_T, n in zip(ids_BT, weights_BT, row_lengths(weights_BT).tolist(), strict=True):
                yield {"input_ids": ids_T[:n], "weights": weights_T[:n]}

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids_BT = pad_sequence([row["input_ids"] for row in rows], True, asking.tokenizer.eos_token_id)  # as ours pads
        return {"input_ids": ids_BT, "weights": pad_sequence([row["weights"] for row in rows], True)}

    with tempfile.TemporaryDirectory() as folder:
        trainer = _OurRecipe(
            model=asking.model,
            args=_arguments(begun, folder, max_steps=config.steps, max_grad_norm=1.0),
            train_dataset=_Rows(rows()),
            data_collator=collate,
            callbacks=[turned],
            optimizers=(optimizer, schedule),
        )
        trainer.precision = quick_precision(asking.model) if config.precision == "auto" else config.precision
        trainer.train()


def with_adamw(begun: Begun, turns: Turns, rate: float, bf16: bool) -> None:
    """Train by the library's Trainer with AdamW, its own loss and collator."""
    tokenizer, rng = begun.asking.tokenizer, np.random.default_rng(begun.seed)
    turned, instances = _Turned(begun, rng, turns), begun.task.training(rng)
    to_the_right = copy.deepcopy(tokenizer)
    to_the_right.padding_side = "right"  # positions are counted from the first column

    def rows() -> Iterator[dict[str, list[int]]]:
        while True:
            parts = [answer_of(instance) for instance in islice(instances, AHEAD)]
            prompts = tokenizer([prompt for prompt, _ in parts]).input_ids
            texts = tokenizer([prompt + answer for prompt, answer in parts]).input_ids
            for (_, answer), prompt_ids, text_ids in zip(parts, prompts, texts, strict=True):
                given = len(prompt_ids) if answer and begun.config.prompt_weight < 1 else 0
                ids = [*text_ids, tokenizer.eos_token_id]
                yield {"input_ids": ids, "labels": [-100] * given + ids[given:]}

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=begun.asking.model,
            args=_arguments(
                begun, folder, max_steps=4 * begun.config.steps, learning_rate=rate, warmup_steps=50, bf16=bf16, **ADAMW
            ),
            train_dataset=_Rows(rows()),
            data_collator=DataCollatorForSeq2Seq(to_the_right, padding=True),
            callbacks=[turned],
        ).train()


if __name__ == "__main__":
    main()
