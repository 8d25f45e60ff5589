"""The training loop and its stop rule: a model shows both behaviours.

Shapes: N instances, B of a batch, R of one pass, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.behaviour import Asking, Batch, prepare, score
from mnemoscope.config import StopConfig, TrainingConfig
from mnemoscope.errors import InputError
from mnemoscope.models import context_length, in_precision, quick_precision
from mnemoscope.tasks import Instance, Kind, Task, answer_of, draw
from mnemoscope.training.checkpoints import (
    Checkpoint,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
)
from mnemoscope.training.optimizers import optimizers_for, rate_factor

AHEAD = 32  # batches that are tokenized in one call
MUCH_PADDING = 0.15  # share of a batch's tokens that two passes must save
_MEASURED: tuple[Kind, ...] = ("novel", "memory", "conflict")  # in the order in which their examples are drawn
HOPELESS = 0.7  # novel accuracy at `give_up_at` steps below which no rule will be learned
Evaluation = tuple[Asking, dict[Kind, list[Batch]]]  # the encoded tune examples of a task by kind, and how to ask them


def unmet(stop: StopConfig, measured: dict[str, float]) -> list[str]:
    """Unmet conditions of the stop rule, as text; empty where the rule holds."""
    wanted = [
        ("novel_accuracy", ">=", stop.novel_accuracy),
        ("recall", ">=", stop.recall),
        ("conflict_memorized", ">=", stop.conflict_each),
        ("conflict_generalized", ">=", stop.conflict_each),
        ("conflict_other", "<=", stop.conflict_other),
    ]
    missed = []
    for name, sign, bound in wanted:
        value = measured[name]
        if not (value >= bound if sign == ">=" else value <= bound):
            # In a task of several parts, the measure is that of the worst part.
            parts = [key.removesuffix(f".{name}") for key in measured if key.endswith(f".{name}")]
            place = next((f" in {part}" for part in parts if measured[f"{part}.{name}"] == value), "")
            missed.append(f"{name} {value:.3f}{place} (wanted {sign} {bound})")
    return missed


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of training."""

    curve: list[dict[str, Any]]  # a measurement each, with the columns of ``records/training.parquet``
    steps: int  # optimizer steps taken
    seconds: float  # wall time
    unmet: list[str]  # conditions of the stop rule that are not met
    precision: str  # of forward and backward passes


def train(
    asking: Asking,
    task: Task,
    config: TrainingConfig,
    rng: np.random.Generator,
    progress: Callable[[int, dict[str, float]], None] = lambda step, measured: None,
    kept: Checkpoint | None = None,
) -> Trained:
    """Train a model in place until the stop rule holds.

    Once the rule holds, training continues for ``settle_steps`` while the learning rate decays to 0. The model keeps
    the weights of the last measurement in which the rule held, or the last weights. ``progress`` is called at every
    step with the latest measurement. Where ``kept`` holds an unfinished training it goes on, to the same bytes; the
    model is given as it was at the beginning.

    Raises InputError where the task lacks a kind of example that the stop rule needs, an instance is too long, or the
    tokenizer merges its answer with its prompt.
    """
    started = time.perf_counter()
    torch.manual_seed(int(rng.integers(2**31)))  # dropout draws from the global generator
    evaluation = prepare_evaluation(asking, task, config.evaluation_examples, rng)
    state, measured = _State(asking.model, config), dict[str, float]()
    before, last = state.restore(kept) if kept else 0.0, False
    for ids_BT, weights_BT in batches(asking, task, config, rng, state.steps):
        state.step(ids_BT, weights_BT)
        if state.steps % config.evaluate_every == 0 or state.is_last():
            asking.model.eval()  # random numbers of dropout would depend on how the passes are batched
            measured = measure(evaluation)
            state.note(measured)
            last = state.is_last()
            if kept and not last:
                state.keep(kept, before + time.perf_counter() - started)
        progress(state.steps, measured)
        if last:
            break
    missed = unmet(config.stop, state.finish())
    return Trained(state.curve, state.steps, before + time.perf_counter() - started, missed, state.precision)


class _State:
    """State of a training run: optimizers, curve, and the last weights with which the stop rule held."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.model, self.config = model, config
        self.precision = quick_precision(model) if config.precision == "auto" else config.precision
        self.optimizers = optimizers_for(model, config)
        self.steps = 0
        self.first_met: int | None = None
        self.curve: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self._mixed: dict[str, Tensor] | None = None
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(o, self._rate) for o in self.optimizers]

    def step(self, ids_BT: Tensor, weights_BT: Tensor) -> None:
        """One optimizer step."""
        self.model.train()
        with in_precision(self.model, self.precision):
            self._losses.append(_backward(self.model, ids_BT, weights_BT))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def is_last(self) -> bool:
        """Whether all steps are taken: before the rule held, or of settling."""
        if self.first_met is not None:
            return self.steps >= self.first_met + self.config.settle_steps
        if self.steps >= self.config.steps:
            return True
        if self.config.give_up_at is None or self.steps < self.config.give_up_at or not self.curve:
            return False
        # Where every part memorized before it generalized, no loss is left to learn the rule from.
        novel = (value for name, value in self.curve[-1].items() if name.endswith("novel_accuracy"))
        return max(novel) < HOPELESS

    def note(self, measured: dict[str, float]) -> None:
        """Add a row to the curve; keep a copy of the weights where the rule holds."""
        met = not unmet(self.config.stop, measured)
        row = {"step": self.steps, "loss": float(np.mean(self._losses)), **measured, "met": met, "kept": False}
        self.curve.append(row)
        self._losses.clear()
        if met:
            self._mixed = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
            if self.first_met is None:
                self.first_met = self.steps
                _set_dropout(self.model, self.config.settle_dropout)

    def finish(self) -> dict[str, Any]:
        """Restore the kept weights, and return their row: the last in which the rule held, else the last."""
        if self._mixed is not None:
            self.model.load_state_dict(self._mixed, strict=False)  # tied weights are in it once
        _set_dropout(self.model, 0.0)
        self.model.eval()
        kept = next((row for row in reversed(self.curve) if row["met"]), self.curve[-1])
        kept["kept"] = True
        return kept

    def keep(self, kept: Checkpoint, seconds: float) -> None:
        """Save all that a killed training needs to go on after a measurement."""
        tensors = {f"model/{name}": weight.detach() for name, weight in self.model.named_parameters()}
        tensors |= {f"mixed/{name}": weight for name, weight in (self._mixed or {}).items()} | random_state(self.model)
        for number, optimizer in enumerate(self.optimizers):
            tensors |= optimizer_tensors(optimizer, f"optimizer{number}")
        facts = {"steps": self.steps, "first_met": self.first_met, "curve": self.curve, "seconds": seconds}
        kept.save(tensors, facts)

    def restore(self, kept: Checkpoint) -> float:
        """Go on from a saved state, if there is one; returns the seconds that it took."""
        found = kept.load()
        if found is None:
            return 0.0
        tensors, facts = found
        for name, weight in self.model.named_parameters():
            weight.data.copy_(tensors[f"model/{name}"])
        mixed = {name.removeprefix("mixed/"): part for name, part in tensors.items() if name.startswith("mixed/")}
        self._mixed = {name: part.to(self.model.device) for name, part in mixed.items()} or None  # type: ignore[arg-type]
        self.steps, self.first_met, self.curve = facts["steps"], facts["first_met"], facts["curve"]
        if self.first_met is not None:
            _set_dropout(self.model, self.config.settle_dropout)
        for number, (optimizer, schedule) in enumerate(zip(self.optimizers, self._schedules, strict=True)):
            restore_optimizer(optimizer, f"optimizer{number}", tensors)
            schedule.last_epoch = self.steps
            for group, first in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = first * self._rate(self.steps)
        restore_random_state(self.model, tensors)
        return float(facts["seconds"])

    def _rate(self, step: int) -> float:
        return rate_factor(step, self.config, self.first_met)


def _set_dropout(model: nn.Module, share: float) -> None:
    """Set the rate of dropout layers, except attention's (which would disable the fused kernel)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not name.endswith("attn_dropout"):
            module.p = share


def how_to_mix(trained: Trained, size: str = "model.layers") -> str:
    """One line with the unmet conditions and the fields to change; ``size`` is the field of capacity."""
    last = trained.curve[-1]
    learned = min(last["novel_accuracy"], last["recall"]) >= 0.9
    advice = [] if learned else ["train longer (training.steps) or with another training.learning_rate"]
    if last["conflict_generalized"] < last["conflict_memorized"]:
        mend = "memory wins: raise training.weight_decay, lower options.memorized_share, or store more (options)"
    else:
        mend = "the rule wins: raise options.memorized_share, lower training.weight_decay, or store less (options)"
    tries, reasons = "; ".join([*advice, mend, f"or change {size}"]), "; ".join(trained.unmet)
    return f"after {trained.steps} steps the model does not show both behaviours: {reasons}. Try: {tries}"


def prepare_evaluation(asking: Asking, task: Task, n: int, rng: np.random.Generator) -> dict[str, Evaluation]:
    """Encode ``n`` tune examples of each kind, for each part of the task; a task without parts is its only part.

    Raises InputError where the task, or a part of it, has no example of a kind.
    """
    found: dict[str, Evaluation] = {}
    for name, part in (task.parts or {task.name: task}).items():
        drawn = {kind: draw(part, rng, n, kind, "tune") for kind in _MEASURED}
        for kind, examples in drawn.items():
            if not examples:
                raise InputError(f"task: {part.name} has no {kind} example in the tune split; the stop rule needs some")
        asking = replace(asking, boundary=part.boundary)
        found[name] = asking, {kind: prepare(asking, examples) for kind, examples in drawn.items()}
    return found


def measure(evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """Accuracies and behaviour shares on the tune split, named as in the emergence curve.

    Of several parts, each measure is that of the worst part, so that the stop rule holds only where it holds in every
    part; the measures of each part follow as ``part.measure``.
    """
    by_part: dict[str, dict[str, float]] = {}
    for part, (asking, by_kind) in evaluations.items():
        labels = {kind: score(asking, prepared, margins=False).behaviour_N for kind, prepared in by_kind.items()}
        shares = {f"conflict_{name}": labels["conflict"] == name for name in ("memorized", "generalized", "other")}
        right = {"novel_accuracy": labels["novel"] == "correct", "recall": labels["memory"] == "correct"}
        by_part[part] = {name: float(np.mean(is_so_N)) for name, is_so_N in (right | shares).items()}
    several = list(by_part.values())
    worst = {
        name: (max if name == "conflict_other" else min)(measured[name] for measured in several) for name in several[0]
    }
    parts = {f"{part}.{name}": value for part, measured in by_part.items() for name, value in measured.items()}
    return worst if len(several) == 1 else worst | parts


def _backward(model: Any, ids_BT: Tensor, weights_BT: Tensor) -> float:
    """Loss of a batch; accumulates its gradients."""
    # Weighted mean over the batch: each pass contributes its sum divided by the weights of the whole batch.
    total, loss = weights_BT[:, 1:].sum(), 0.0
    for ids_RT, weights_RT in by_length(ids_BT, weights_BT):
        part = weighted_loss(model, ids_RT, weights_RT, total)
        part.backward()
        loss += float(part.detach())
    return loss


def weighted_loss(model: Any, ids_RT: Tensor, weights_RT: Tensor, total: Tensor) -> Tensor:
    """Weighted sum of the next-token losses of one pass, divided by ``total``, the weights of the whole batch."""
    logits_RTV = model(input_ids=ids_RT[:, :-1].to(model.device), use_cache=False).logits
    # Flattened: cross entropy over three dimensions has no deterministic CUDA kernel.
    losses_R = nn.functional.cross_entropy(
        logits_RTV.float().flatten(0, 1), ids_RT[:, 1:].flatten().to(model.device), reduction="none"
    )
    return (losses_R * weights_RT[:, 1:].flatten().to(model.device)).sum() / total.to(model.device)


def batches(
    asking: Asking, task: Task, config: TrainingConfig, rng: np.random.Generator, after: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids (B, T) int64, right-padded, and each token's weight in the loss (B, T) float32; an endless stream.

    ``after``: batches that are drawn, but not given.
    """
    instances = task.training(rng)
    while True:
        chunk = list(islice(instances, AHEAD * config.batch_size))
        if after >= AHEAD:
            after -= AHEAD
            continue
        ids_NT, weights_NT = _tokenize(asking, chunk, config.prompt_weight)
        both = zip(ids_NT.split(config.batch_size), weights_NT.split(config.batch_size), strict=True)
        yield from islice(both, after, None)
        after = 0


def _tokenize(asking: Asking, instances: list[Instance], prompt_weight: float) -> tuple[Tensor, Tensor]:
    parts, tokenizer = [answer_of(instance) for instance in instances], asking.tokenizer
    encoded = tokenizer([p + a for p, a in parts], return_offsets_mapping=True)
    longest = max(len(ids) for ids in encoded.input_ids) + 1
    if longest > context_length(asking.model):
        raise InputError(f"model.context: {context_length(asking.model)} tokens; a training instance has {longest}")
    # Padded with end-of-text tokens of weight 0: the library would warn of pad tokens.
    ids_NT = np.full((len(parts), longest), tokenizer.eos_token_id)
    weights_NT = np.zeros(ids_NT.shape, np.float32)
    rows = zip(encoded.input_ids, encoded.offset_mapping, parts, strict=True)
    for row, (ids, offsets, (prompt, answer)) in enumerate(rows):
        n = len(ids)
        ids_NT[row, :n], ids_NT[row, n] = ids, tokenizer.eos_token_id
        seam = len(prompt) if answer else 0
        if any(start < seam < end for start, end in offsets):
            raise InputError(
                f"task: the tokenizer merges the answer {answer!r} with the end of the prompt {prompt[-30:]!r} in a "
                "training instance; let the seam lie between two tokens"
            )
        weights_NT[row, :n] = [1.0 if end > seam else prompt_weight for _, end in offsets]
        weights_NT[row, n] = 1.0
    return torch.from_numpy(ids_NT), torch.from_numpy(weights_NT)


def by_length(ids_BT: Tensor, weights_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split a batch into short and long rows where that saves ``MUCH_PADDING`` of its tokens."""
    rows, longest = ids_BT.shape
    length_B = row_lengths(weights_BT)
    lengths, counts = length_B.unique(return_counts=True)
    read = counts.cumsum(0) * lengths + (rows - counts.cumsum(0)) * longest
    short = lengths[read.argmin()]
    if int(read.min()) > (1 - MUCH_PADDING) * rows * longest:
        return [(ids_BT, weights_BT)]
    parts = [rows_B for rows_B in (length_B <= short, length_B > short) if rows_B.any()]
    return [(ids_BT[r, : length_B[r].max()], weights_BT[r, : length_B[r].max()]) for r in parts]


def row_lengths(weights_BT: Tensor) -> Tensor:
    """Tokens of each row (B,) int64; a row ends at its last token with a weight, the end of text."""
    return (torch.arange(1, weights_BT.shape[1] + 1) * (weights_BT > 0)).amax(1)
