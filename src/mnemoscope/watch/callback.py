"""The measurement as a callback of the library's Trainer, and of every trainer that is one (TRL's among them)."""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback

from mnemoscope.config import StopConfig
from mnemoscope.report.emergence import draw_curve
from mnemoscope.runs.errors import InputError, check_one_of
from mnemoscope.tasks import Task, named_task
from mnemoscope.watch.curve import FILE, PICTURE, WHEN, Curve, When, reached
from mnemoscope.watch.measuring import Asked, Watcher, in_several_processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState, TrainingArguments

LOGGED = ("recall", "novel_accuracy", "conflict_memorized", "conflict_generalized", "conflict_other", "yield", "margin")
WANTED = StopConfig(novel_accuracy=0.9, recall=0.9)
T = TypeVar("T")


class BehaviourCallback(TrainerCallback):
    """Measures before a training, and when it evaluates, whether the model memorizes or generalizes, and logs it.

    It asks questions of the task by teacher forcing, and logs ``eval_`` with the names in ``LOGGED`` through
    ``Trainer.log``, so that whatever reports has them. Without ``every`` they are in the metrics of each evaluation
    too, so ``metric_for_best_model="recall"`` works; early stopping on them comes behind this callback in the list. A
    table, ``emergence.parquet``, with intervals and counts, and a picture, ``emergence.png``, grow in ``output_dir``.

    Attributes:
        curve: the measurements so far.
        watcher: the questions and, in ``watcher.answers``, how each was answered last; None before the training begins.
        seconds: that the questions, the measurements and their logging took.

    Losses are the same without the callback. In several processes each measures, on the same questions, and the first
    one writes; weights that FSDP 2 shards are gathered as they are in training.
    """

    def __init__(
        self,
        task: Task | str | Path,
        tokenizer: PreTrainedTokenizerFast,
        *,
        every: int | None = None,
        stop: When | None = None,
        save: When | None = None,
        wanted: StopConfig = WANTED,
        **options: Any,
    ) -> None:
        """Nothing is drawn before the training begins.

        Args:
            task: one, its name, or the path of a JSONL file.
            every: steps between measurements; None: when the trainer evaluates.
            stop: ends the training when ``both`` behaviours are there (``wanted``), or when memory has ``overtaken``
                the rule among conflicts.
            save: has a checkpoint saved at the first measurement where that is so, unless training has ended by then.
            options: what is asked, ``examples``, ``rephrasings``, ``split``, ``contrast``, ``batch_size``, ``seed`` and
                ``prompting`` of ``mnemoscope.watch.Asked``, and options of the task.

        Raises:
            InputError: an argument is not allowed.
        """
        if every is not None and every < 1:
            raise InputError(f"every: {every!r}; allowed is a number of steps from 1 on")
        for name, when in (("stop", stop), ("save", save)):
            check_one_of(name, when, (None, *WHEN))
        self.asked = Asked(**{field.name: options.pop(field.name) for field in fields(Asked) if field.name in options})
        self.task = named_task(task, options, self.asked.seed)
        self.tokenizer, self.every, self.stop, self.save = tokenizer, every, stop, save
        self.wanted, self.curve, self.seconds = wanted, Curve(), 0.0
        self.watcher: Watcher | None = None
        self._trainer: weakref.ReferenceType[Trainer] | None = None
        self._saved = self._trains = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the questions and measure what the model shows before; go on with the table of a resumed training.

        Raises InputError where the trainer never evaluates, saves the best alone, or shards unlike FSDP 2.
        """
        evaluates, saves = (str(getattr(s, "value", s)) for s in (args.eval_strategy, args.save_strategy))
        if self.every is None and evaluates == "no":
            why = "this trainer does not evaluate (eval_strategy); give the steps between measurements"
            raise InputError(f"every: {why}")
        if self.save and saves == "best":
            raise InputError("save: with save_strategy 'best' a trainer saves nothing else; use no, steps or epoch")
        trainer = _trainer_of(state)
        check_shards(trainer)
        self._trainer = weakref.ref(trainer) if trainer is not None else None
        path, rows = Path(str(args.output_dir)) / FILE, list[dict[str, Any]]()
        if state.global_step and path.is_file() and state.is_world_process_zero:
            rows = [row for row in Curve.open(path).rows if row["step"] <= state.global_step]
        self.curve = Curve(_of_the_first_process(rows))
        self._saved = any(self._holds(self.save, n) for n in range(1, len(self.curve.rows) + 1))
        began = time.perf_counter()
        self.watcher, self._trains = Watcher(kwargs["model"], self.tokenizer, self.task, self.asked), True
        self.seconds += time.perf_counter() - began
        if not state.global_step:
            self._measure(args, state, control, kwargs["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where the trainer evaluates while it trains; the metrics of any evaluation of this step have it."""
        if self.every is None and self._trains and not self._measured(state):
            self._measure(args, state, control, kwargs["model"])
        if self._trains and self._measured(state):
            kwargs.get("metrics", {}).update(_told(self.curve.rows[-1]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure every so many steps, and behind the last one."""
        if self.every is not None and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            self._measure(args, state, control, kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the loss of the step that was just measured, which is logged afterwards."""
        if self._trains and self._measured(state) and "loss" in (kwargs.get("logs") or {}):
            self.curve.rows[-1]["loss"] = self._loss(state)
            if state.is_world_process_zero:
                self.curve.save(Path(str(args.output_dir)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last weights, if that was not done; where the best ones are back already, these are gone."""
        if self._trains and not self._measured(state) and not args.load_best_model_at_end:
            self._measure(args, state, control, kwargs["model"])
        self._trains = False

    def _measured(self, state: Any) -> bool:
        return bool(self.curve.rows) and self.curve.rows[-1]["step"] == state.global_step

    def _holds(self, when: When | None, measurements: int) -> bool:
        """Whether a rule holds at the last of so many measurements; nothing was learned at step 0."""
        rows = self.curve.rows[:measurements]
        return when is not None and rows[-1]["step"] > 0 and reached(when, rows, self.wanted)

    def _loss(self, state: Any) -> float:
        """Mean of the losses logged since the measurement before the last one."""
        before = self.curve.rows[-2]["step"] if len(self.curve.rows) > 1 else 0
        losses = [e["loss"] for e in state.log_history if "loss" in e and before < e["step"] <= state.global_step]
        return sum(losses) / len(losses) if losses else math.nan

    def _measure(self, args: Any, state: Any, control: Any, model: Any) -> None:
        assert self.watcher is not None
        began = time.perf_counter()
        self.curve.add(state.global_step, {"epoch": state.epoch, "loss": math.nan, **self.watcher.measure(model)})
        self.curve.rows[-1]["loss"] = self._loss(state)
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            self.curve.save(folder)
            draw_curve(self.curve.table, folder / PICTURE)
        stops, saves = _of_the_first_process(
            [self._holds(when, len(self.curve.rows)) for when in (self.stop, self.save)]
        )
        control.should_training_stop |= stops
        control.should_save |= saves and not self._saved
        self._saved |= saves
        trainer, logged = self._trainer() if self._trainer else None, _told(self.curve.rows[-1])
        if trainer is not None:
            logs_loss = control.should_log
            # Not the log of a subclass: TRL's takes what it gathered for its own next entry.
            Trainer.log(trainer, dict(logged))
            control.should_log = logs_loss  # each log of a trainer ends what it was about to log
        else:
            state.log_history.append({**logged, "step": state.global_step})
        self.seconds += time.perf_counter() - began


def _told(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row is logged: what is defined."""
    families = [name for name in row if ":" in name and f"{name}_n" in row]
    told = {f"eval_{name}": row[name] for name in (*LOGGED, *families) if name in row}
    told = {name: value for name, value in told.items() if not math.isnan(value)}
    for name, of_all in (("rho", max), ("cosine", lambda values: sum(values) / len(values))):
        values = [v for key, v in row.items() if key.startswith(f"{name}_") and not math.isnan(v)]
        told |= {f"eval_{name}": of_all(values)} if values else {}
    return told


def _of_the_first_process(told: T) -> T:
    """What the first process says: others may round otherwise, or lack its disk."""
    several = [told]
    if in_several_processes():
        torch.distributed.broadcast_object_list(several, 0)
    return several[0]


def check_shards(trainer: Any) -> None:
    """Raises InputError where weights are in shards that no pass of the model itself gathers, as FSDP 2's hooks do."""
    if trainer is None:
        return
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise InputError(
            "fsdp: version 1 wraps what it shards; use version 2 (fsdp_config), or measure its checkpoints, "
            "saved whole (FULL_STATE_DICT)"
        )
    if trainer.is_deepspeed_enabled:
        raise InputError(
            "deepspeed: weights are in shards while this trains; measure its checkpoints instead, saved whole "
            "(stage3_gather_16bit_weights_on_model_save)"
        )


def _trainer_of(state: TrainerState) -> Any:
    """The trainer of a state, whose ``log`` reaches everything that reports; callbacks are not given it."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and found.state is state:
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None
