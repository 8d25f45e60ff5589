"""A pretrained model is taught a task in an adapter, by the library's Trainer, until it shows both behaviours.

Shapes: N instances, B of a batch, T tokens.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from mnemoscope.behaviour import Asking
from mnemoscope.config import TrainingConfig
from mnemoscope.models import Precision, core_of, in_precision, quick_precision
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.strict import read_text
from mnemoscope.tasks import Task, draw
from mnemoscope.watch.callback import BehaviourCallback
from mnemoscope.watch.curve import FILE, MEASURED, Curve, Trained, check_kinds, unmet
from mnemoscope.watch.instances import batches

MOST_LOGITS = 2**27  # of a pass, 512 MiB; the gradient and the log-probabilities take as much each
IGNORED = -100  # what the library's loss leaves out
SECONDS = "seconds"  # file with how long a training took until its last checkpoint


def teach(
    asking: Asking,
    task: Task,
    config: TrainingConfig,
    rng: np.random.Generator,
    folder: Path,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, measured: None,
) -> Trained:
    """Train the adapter of a model in place until the stop rule holds, the loss has ``diverged``, or steps are taken.

    The training is the library's: AdamW, its schedule, its checkpoints in ``folder``, from which a killed training goes
    on. ``progress`` is called at every step with the latest measurement.

    Raises InputError where the task lacks a kind of example that the stop rule needs, consists of parts, an instance is
    too long, or the tokenizer merges its answer with its prompt.
    """
    if task.parts:
        raise InputError(f"model.lora: {task.name} consists of {', '.join(task.parts)}; teach one of them")
    seed, started, model = int(rng.integers(2**31)), time.perf_counter(), asking.model
    check_kinds(task, {kind: draw(task, np.random.default_rng(seed), 1, kind, "tune") for kind in MEASURED})
    begun, data = last_checkpoint(folder), _Instances(asking, task, config, seed)
    taken = folder / SECONDS
    before = float(read_text(taken, "training")) if begun and taken.is_file() else 0.0
    watching = _Watching(
        task,
        asking.tokenizer,
        every=config.evaluate_every,
        examples=config.evaluation_examples,
        rephrasings=0,  # the rule does not ask for pairs
        batch_size=asking.batch_size,
        seed=seed,
        stop="both",
        wanted=config.stop,
    )
    watching.progress, watching.took = progress, lambda: before + time.perf_counter() - started
    settings = arguments(model, config, seed, folder, data.parts())
    trainer = _Trainer(model, settings, train_dataset=data, data_collator=together, callbacks=[watching])
    trainer.precision = quick_precision(core_of(model)) if config.precision == "auto" else config.precision
    trainer.remove_callback(PrinterCallback)
    rows = [row for row in Curve.open(folder / FILE).rows if row["step"] <= step_of(begun)] if begun else []
    ended = bool(rows) and (rows[-1]["step"] >= config.steps or not unmet(config.stop, rows[-1]) or diverged(rows))
    if begun and ended and rows[-1]["step"] == step_of(begun):
        from peft import load_peft_weights, set_peft_model_state_dict

        # It had ended, and was not yet saved elsewhere.
        set_peft_model_state_dict(model, load_peft_weights(str(begun), device=str(model.device)))
    else:
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
        rows = watching.curve.rows
    model.eval()
    rows = [row | {"met": not unmet(config.stop, row), "kept": row is rows[-1]} for row in rows]
    missed = unmet(config.stop, rows[-1])
    if diverged(rows):
        missed.append(f"loss {_losses(rows)[-1]:.3f} (it was {min(_losses(rows)):.3f})")
    return Trained(rows, rows[-1]["step"], watching.took(), missed, trainer.precision)


def diverged(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the mean loss since the measurement before is twice the lowest one so far, and half a nat above it."""
    losses = _losses(rows)
    return len(losses) > 1 and losses[-1] > max(2 * min(losses), min(losses) + 0.5)


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if np.isfinite(row["loss"])]  # none at step 0, nor before it is logged


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint whose state is there, which the library writes last; what is half written goes."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of)
    while found:
        try:
            json.loads((found[-1] / "trainer_state.json").read_text())
            return found[-1] if (folder / FILE).is_file() else None
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
    return None


def arguments(model: Any, config: TrainingConfig, seed: int, folder: Path, parts: int) -> TrainingArguments:
    """The settings of a training as the library names them; a batch is read in ``parts``."""
    decays: dict[str, Any] = {"lr_scheduler_type": "warmup_stable_decay"}
    decays |= {"lr_scheduler_kwargs": {"num_decay_steps": config.decay_steps, "min_lr_ratio": 0.02}}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // parts,
        gradient_accumulation_steps=parts,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        warmup_steps=config.warmup_steps,
        **(decays if config.decay_steps else {"lr_scheduler_type": "constant_with_warmup"}),
        seed=seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.evaluate_every,
        save_total_limit=1,
        use_cpu=model.device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )


class _Trainer(Trainer):
    """The library's, with passes in a precision that is quick on a CPU too."""

    precision: Precision = "float32"

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        return in_precision(self.model, self.precision)


class _Watching(BehaviourCallback):
    """Also tells the progress of a training, ends it where it diverged, and notes how long it ``took``."""

    progress: Callable[[int, Mapping[str, float]], None]
    took: Callable[[], float]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.progress(state.global_step, self.curve.rows[-1])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_log(args, state, control, **kwargs)
        control.should_training_stop |= diverged(self.curve.rows)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_atomically(Path(args.output_dir) / SECONDS, f"{self.took()}".encode())


class _Instances(IterableDataset[dict[str, Tensor]]):
    """Training instances of a task, each with its token ids and labels (T,) int64; an endless stream."""

    def __init__(self, *drawn_from: Any) -> None:
        self.asking, self.task, self.config, self.seed = drawn_from

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(self.asking, self.task, self.config, np.random.default_rng(self.seed))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for ids_BT, weights_BT in self.batches():
            for ids_T, weights_T in zip(ids_BT, weights_BT, strict=True):
                end = int(torch.nonzero(weights_T)[-1]) + 1
                labels_T = torch.where(weights_T > 0, ids_T, IGNORED)
                yield {"input_ids": ids_T[:end], "labels": labels_T[:end]}

    def parts(self) -> int:
        """In how many parts a batch must be read for ``MOST_LOGITS``."""
        logits = next(self.batches())[0].numel() * int(core_of(self.asking.model).config.get_text_config().vocab_size)
        rows = self.config.batch_size
        return next((n for n in range(1, rows) if rows % n == 0 and logits <= n * MOST_LOGITS), rows)


def together(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Instances as one batch, padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BT = pad([row["input_ids"] for row in rows], batch_first=True)
    labels_BT = pad([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED)
    mask_BT = pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
