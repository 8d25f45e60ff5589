"""The measurement as a callback of the library's Trainer, and of every trainer that is one (TRL's among them)."""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mnemoscope.emergence.curve import FILE, PICTURE, WHEN, Curve, Wanted, When, reached
from mnemoscope.emergence.measuring import Watcher
from mnemoscope.errors import InputError
from mnemoscope.models import Site
from mnemoscope.report.emergence import draw_curve
from mnemoscope.tasks import Split, Task, named_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Trainer, TrainerControl, TrainerState, TrainingArguments

LOGGED = ("recall", "novel_accuracy", "conflict_memorized", "conflict_generalized", "conflict_other", "yield", "margin")


class BehaviourCallback(TrainerCallback):
    """Measures before a training, and when it evaluates, whether the model memorizes or generalizes, and logs it.

    It asks conflicts, memory and novel questions of the task by teacher forcing, finds phrasings whose behaviour flips,
    and logs through ``Trainer.log``, so that whatever reports has it: ``eval_recall``, ``eval_novel_accuracy``,
    ``eval_conflict_memorized``, ``eval_conflict_generalized``, ``eval_conflict_other``, ``eval_yield``,
    ``eval_margin``. They are in the metrics of an evaluation too, so ``metric_for_best_model="recall"`` works. A table,
    ``emergence.parquet``, with intervals and counts, and a picture, ``emergence.png``, grow in ``output_dir``.

    Attributes:
        curve: the measurements so far.
        watcher: the questions and, in ``watcher.answers``, how each was answered last; None before the training begins.
        seconds: that the measurements took.

    The training is not touched: its losses are the same without the callback. In several processes each measures, on
    the same questions, and the first one writes.
    """

    def __init__(
        self,
        task: Task | str | Path,
        tokenizer: PreTrainedTokenizerFast,
        *,
        every: int | None = None,
        examples: int = 32,
        rephrasings: int = 1,
        split: Split = "tune",
        contrast: Site | None = None,
        stop: When | None = None,
        save: When | None = None,
        wanted: Wanted | None = None,
        batch_size: int = 64,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Nothing is drawn before the training begins.

        Args:
            task: one, its name, or the path of a JSONL file; ``options`` are the task's.
            every: steps between measurements; None: when the trainer evaluates.
            examples: of each kind, at most.
            rephrasings: of each conflict, to find pairs.
            split: of the task, whose phrasings the training should not hold.
            contrast: a site where the behaviours of pairs are compared by layer; ``rho_L`` and ``cosine_L`` are in the
                table, their largest and mean are logged.
            stop: ends the training when ``both`` behaviours are there (``wanted``), or when memory has ``overtaken``
                the rule among conflicts.
            save: has a checkpoint saved at the first measurement where that is so.

        Raises:
            InputError: an argument is not allowed.
        """
        if every is not None and every < 1:
            raise InputError(f"every: {every!r}; allowed is a number of steps from 1 on")
        for name, when in (("stop", stop), ("save", save)):
            if when is not None and when not in WHEN:
                raise InputError(f"{name}: {when!r} is not one of {', '.join(WHEN)}")
        self.task = named_task(task, options, seed)
        self.tokenizer, self.every, self.stop, self.save = tokenizer, every, stop, save
        self.wanted, self.curve, self.seconds = wanted or Wanted(), Curve(), 0.0
        self._drawing: dict[str, Any] = {"examples": examples, "rephrasings": rephrasings, "split": split}
        self._drawing |= {"contrast": contrast, "batch_size": batch_size, "seed": seed}
        self.watcher: Watcher | None = None
        self._trainer: weakref.ReferenceType[Trainer] | None = None
        self._saved = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the questions and measure what the model shows before; go on with the table of a resumed training.

        Raises InputError where the trainer never evaluates and ``every`` is not given, or shards the weights.
        """
        if self.every is None and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise InputError(
                "every: this trainer does not evaluate (eval_strategy); give the steps between measurements"
            )
        if args.fsdp or getattr(args, "deepspeed", None):
            raise InputError("fsdp: weights are in shards while this trains; measure its checkpoints instead")
        trainer = _trainer_of(state)
        self._trainer = weakref.ref(trainer) if trainer is not None else None
        path, self.curve, self._saved = Path(str(args.output_dir)) / FILE, Curve(), False
        if state.global_step and path.is_file():
            self.curve = Curve([row for row in Curve.open(path).rows if row["step"] <= state.global_step])
        self.watcher = Watcher(kwargs["model"], self.tokenizer, self.task, **self._drawing)
        if not state.global_step:
            self._measure(args, state, control, kwargs["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where the trainer evaluates."""
        if self.every is None and self.watcher is not None:
            found = self._measure(args, state, control, kwargs["model"])
            kwargs.get("metrics", {}).update(found)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure every so many steps."""
        if self.every is not None and state.global_step % self.every == 0:
            self._measure(args, state, control, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last weights, if that was not done."""
        if self.watcher is not None and (not self.curve.rows or self.curve.rows[-1]["step"] != state.global_step):
            self._measure(args, state, control, kwargs["model"])

    def _measure(self, args: Any, state: Any, control: Any, model: Any) -> dict[str, float]:
        assert self.watcher is not None
        began = time.perf_counter()
        row: Mapping[str, float] = self.watcher.measure(model)
        last = self.curve.rows[-1]["step"] if self.curve.rows else 0
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry and entry["step"] >= last]
        loss = sum(losses) / len(losses) if losses else math.nan
        self.curve.add(state.global_step, {"epoch": state.epoch, "loss": loss, **row})
        families = [name for name in row if ":" in name and f"{name}_n" in row]
        logged = {f"eval_{name}": row[name] for name in (*LOGGED, *families) if name in row}
        logged = {name: value for name, value in logged.items() if not math.isnan(value)}
        for name, of_all in (("rho", max), ("cosine", lambda values: sum(values) / len(values))):
            values = [v for key, v in row.items() if key.startswith(f"{name}_") and not math.isnan(v)]
            logged |= {f"eval_{name}": of_all(values)} if values else {}
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            self.curve.save(folder)
            draw_curve(self.curve.table, folder / PICTURE)
        begun = state.global_step > 0
        if begun and self.stop and reached(self.stop, self.curve.rows, self.wanted):
            control.should_training_stop = True
        if begun and self.save and not self._saved and reached(self.save, self.curve.rows, self.wanted):
            control.should_save = self._saved = True
        self.seconds += time.perf_counter() - began
        trainer = self._trainer() if self._trainer else None
        if trainer is not None:
            logs_loss = control.should_log
            trainer.log(dict(logged))
            control.should_log = logs_loss  # each log of a trainer ends what it was about to log
        else:
            state.log_history.append({**logged, "step": state.global_step})
        return logged


def _trainer_of(state: TrainerState) -> Any:
    """The trainer of a state, whose ``log`` reaches everything that reports; callbacks are not given it."""
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and found.state is state:
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None
