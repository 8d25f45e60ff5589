"""Training until one model shows both behaviours: one loop, one stop rule.

Shapes: B instances of a batch, R of them that are read together, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.behaviour import Asking, Batch, prepare, score
from mnemoscope.config import StopConfig, TrainingConfig
from mnemoscope.errors import InputError
from mnemoscope.models import context_length, core_of, is_adapted
from mnemoscope.tasks import Example, Instance, Kind, Task, answer_of, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MEASURED: tuple[Kind, ...] = ("novel", "memory", "conflict")  # in the order in which their examples are drawn
HOPELESS = 0.7  # of novel accuracy, at `give_up_at` steps
AHEAD = 32  # batches that are generated and tokenized together
MUCH_PADDING = 0.15  # share of a batch's columns that reading it in two passes must save
MOST_LOGITS = 2**27  # of a pass, 512 MiB; its gradient and its log-probabilities take as much again each


def unmet(stop: StopConfig, measured: dict[str, float]) -> list[str]:
    """What the stop rule still misses, in words; empty when it holds."""
    wanted = [
        ("novel_accuracy", ">=", stop.novel_accuracy),
        ("recall", ">=", stop.recall),
        ("conflict_memorized", ">=", stop.conflict_each),
        ("conflict_generalized", ">=", stop.conflict_each),
        ("conflict_other", "<=", stop.conflict_other),
    ]
    return [
        f"{name} {measured[name]:.3f}{_part_at(measured, name)} (wanted {sign} {bound})"
        for name, sign, bound in wanted
        if not (measured[name] >= bound if sign == ">=" else measured[name] <= bound)
    ]


def _part_at(measured: dict[str, float], name: str) -> str:
    """Of which part of a task a measure is, where it has several."""
    parts = [
        key.removesuffix(f".{name}")
        for key, value in measured.items()
        if key.endswith(f".{name}") and value == measured[name]
    ]
    return f" in {parts[0]}" if parts else ""


@dataclass(frozen=True, slots=True)
class Trained:
    """What training came to.

    Attributes:
        curve: one dict per measurement with the columns of ``records/training.parquet``; see ``measure`` for a task
            of several parts.
        steps: optimizer steps taken.
        seconds: wall time.
        unmet: what the stop rule still misses; empty where both behaviours are there.
    """

    curve: list[dict[str, Any]]
    steps: int
    seconds: float
    unmet: list[str]


def train(
    asking: Asking,
    task: Task,
    config: TrainingConfig,
    rng: np.random.Generator,
    progress: Callable[[int, dict[str, float]], None] = lambda step, measured: None,
) -> Trained:
    """Train a model in place on a task until the stop rule holds; of an adapted model only the adapter.

    Once the rule holds, training goes on for ``settle_steps`` while the learning rate falls to 0. The model ends with
    the weights of the last measurement in which the rule held, or with the last ones where it never did.

    Args:
        asking: the model, its tokenizer and what closes an answer.
        rng: draws training and evaluation data.
        progress: called at every step with the latest measurement.

    Raises:
        InputError: the task lacks a kind of example that the stop rule needs, an instance is too long, or the tokenizer
            merges its answer with its prompt.
    """
    started = time.perf_counter()
    torch.manual_seed(int(rng.integers(2**31)))  # dropout draws from the global generator
    evaluation = prepare_evaluation(asking, task, config.evaluation_examples, rng)
    state = _State(asking.model, config)
    for ids_BT, weights_BT in batches(asking, task, config, rng):
        state.step(ids_BT, weights_BT)
        if state.steps % config.evaluate_every == 0 or state.is_last():
            state.before_measuring()
            state.note(measure(evaluation))
        progress(state.steps, state.measured)
        if state.is_last():
            break
    state.finish()
    return Trained(state.curve, state.steps, time.perf_counter() - started, unmet(config.stop, state.kept_row()))


class _State:
    """A training run as it goes: optimizers, curve, and the last weights with which the stop rule held."""

    def __init__(self, model: PreTrainedModel, config: TrainingConfig) -> None:
        self.model, self.config = model, config
        self.optimizers = optimizers_for(model, config)
        self.steps = 0
        self.first_met: int | None = None
        self.curve: list[dict[str, Any]] = []
        self.measured: dict[str, float] = {}
        self._losses: list[float] = []
        self._mixed: dict[str, Tensor] | None = None
        # One schedule for all: the rate of a step depends on when the rule first held, which only the run knows.
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(o, self._rate) for o in self.optimizers]

    def step(self, ids_BT: Tensor, weights_BT: Tensor) -> None:
        """One optimizer step."""
        self.model.train()
        self._losses.append(_step(self.model, ids_BT, weights_BT, self.optimizers, self._schedules))
        self.steps += 1

    def before_measuring(self) -> None:
        """No dropout in an adapted model, which may have been made with some, nor in its adapter.

        A model from scratch has none but ``settle_dropout``, under which it has been measured from the beginning:
        without it all its later steps, and the figures of docs/LOG.md, would be others.
        """
        if is_adapted(self.model):
            self.model.eval()

    def is_last(self) -> bool:
        """Whether the steps have run out, before the rule held or after."""
        if self.first_met is None:
            return self.steps >= self.config.steps or self._is_hopeless()
        return self.steps >= self.first_met + self.config.settle_steps

    def _is_hopeless(self) -> bool:
        """Whether memory was there first and left nothing to learn from, which more steps do not change."""
        measured = self.curve[-1] if self.curve else None
        at = self.config.give_up_at
        return at is not None and measured is not None and self.steps >= at and measured["novel_accuracy"] < HOPELESS

    def note(self, measured: dict[str, float]) -> None:
        """Add a row to the curve; remember the weights where the rule holds."""
        met = not unmet(self.config.stop, measured)
        row = {"step": self.steps, "loss": float(np.mean(self._losses)), **measured, "met": met, "kept": False}
        self.curve.append(row)
        self.measured = measured
        self._losses.clear()
        if met:
            named = self.model.named_parameters()
            self._mixed = {name: weight.detach().clone() for name, weight in named if weight.requires_grad}
            if self.first_met is None:
                self.first_met = self.steps
                _set_dropout(self.model, self.config.settle_dropout)

    def kept_row(self) -> dict[str, Any]:
        """The last row in which the rule held, else the last one."""
        return next((row for row in reversed(self.curve) if row["met"]), self.curve[-1])

    def finish(self) -> None:
        """Put the kept weights back."""
        if self._mixed is not None:
            self.model.load_state_dict(self._mixed, strict=False)  # the others never changed
        _set_dropout(self.model, 0.0)
        self.model.eval()
        self.kept_row()["kept"] = True

    def _rate(self, step: int) -> float:
        """Factor on the learning rate: warm-up, constant, linear decay at the end; then settling down to 0."""
        config = self.config
        factor = min(1.0, (step + 1) / max(1, config.warmup_steps))
        if config.decay_steps:
            factor *= max(0.02, min(1.0, (config.steps - step) / config.decay_steps))
        if self.first_met is not None and config.settle_steps:
            factor *= max(0.0, 1.0 - (step - self.first_met) / config.settle_steps)
        return factor


def _set_dropout(model: PreTrainedModel, share: float) -> None:
    """Of every dropout layer, save that of attention weights, which would leave the fused kernel, and an adapter's."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not name.endswith("attn_dropout") and "lora_dropout" not in name:
            module.p = share


def how_to_mix(trained: Trained, size: str = "model.layers") -> str:
    """One line that says what is missing and which dials to turn; ``size`` is the dial of how much can be learned."""
    last = trained.curve[-1]
    advice = []
    if last["novel_accuracy"] < 0.9 or last["recall"] < 0.9:
        advice.append("train longer (training.steps) or with another training.learning_rate")
    if last["conflict_generalized"] < last["conflict_memorized"]:
        advice.append(
            "memory wins: raise training.weight_decay, lower options.memorized_share, or store more (options)"
        )
    else:
        advice.append(
            "the rule wins: raise options.memorized_share, lower training.weight_decay, or store less (options)"
        )
    advice.append(f"or change {size}")
    return (
        f"after {trained.steps} steps the model does not show both behaviours: {'; '.join(trained.unmet)}. "
        f"Dials to turn: {'; '.join(advice)}"
    )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Tune examples of one task, ready to be scored again and again.

    Attributes:
        asking: the model, and what closes an answer of this task.
        by_kind: batches of examples, by kind.
    """

    asking: Asking
    by_kind: dict[Kind, list[Batch]]


def prepare_evaluation(asking: Asking, task: Task, n: int, rng: np.random.Generator) -> dict[str, Evaluation]:
    """``n`` tune examples of each kind, for each part of the task; a task without parts is its only one.

    Raises:
        InputError: the task, or a part of it, has no example of a kind.
    """
    parts: dict[str, Task] = getattr(task, "parts", {task.name: task})
    return {name: _evaluation(replace(asking, boundary=part.boundary), part, n, rng) for name, part in parts.items()}


def _evaluation(asking: Asking, task: Task, n: int, rng: np.random.Generator) -> Evaluation:
    by_kind: dict[Kind, list[Batch]] = {}
    for kind in _MEASURED:
        examples: list[Example] = draw(task, rng, n, kind, "tune")
        if not examples:
            raise InputError(f"task: {task.name} has no {kind} example in the tune split, which the stop rule needs")
        by_kind[kind] = prepare(asking, examples)
    return Evaluation(asking, by_kind)


def measure(evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """Both behaviours as they stand: accuracies and shares, in the names of the emergence curve.

    Of several parts each measure is the worst part's, so that the stop rule holds exactly where it holds in every part;
    the parts' own measures follow as ``part.measure``.
    """
    by_part = {name: _measure(evaluation) for name, evaluation in evaluations.items()}
    if len(by_part) == 1:
        return next(iter(by_part.values()))
    measures = next(iter(by_part.values()))
    worst = {
        name: (max if name == "conflict_other" else min)(measured[name] for measured in by_part.values())
        for name in measures
    }
    return worst | {f"{part}.{name}": value for part, measured in by_part.items() for name, value in measured.items()}


def _measure(evaluation: Evaluation) -> dict[str, float]:
    labels = {
        kind: score(evaluation.asking, batches_, margins=False).behaviour_N
        for kind, batches_ in evaluation.by_kind.items()
    }
    return {
        "novel_accuracy": float(np.mean(labels["novel"] == "correct")),
        "recall": float(np.mean(labels["memory"] == "correct")),
        **{f"conflict_{b}": float(np.mean(labels["conflict"] == b)) for b in ("memorized", "generalized", "other")},
    }


def batches(
    asking: Asking, task: Task, config: TrainingConfig, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids (B, T) int64, right-padded, and each token's weight in the loss (B, T) float32; without end."""
    instances = task.training(rng)
    while True:
        chunk = list(islice(instances, AHEAD * config.batch_size))
        ids_NT, weights_NT = _tokenize(asking, chunk, config.prompt_weight)
        yield from zip(ids_NT.split(config.batch_size), weights_NT.split(config.batch_size), strict=True)


def _tokenize(asking: Asking, instances: list[Instance], prompt_weight: float) -> tuple[Tensor, Tensor]:
    parts = [answer_of(instance) for instance in instances]
    tokenizer = asking.tokenizer
    encoded = tokenizer([p + a for p, a in parts], return_offsets_mapping=True)
    longest = max(len(ids) for ids in encoded.input_ids) + 1
    if longest > context_length(asking.model):
        raise InputError(f"model.context: {context_length(asking.model)} tokens; a training instance has {longest}")
    # What stands behind the end has no weight; the library would warn of pad tokens.
    ids_NT = np.full((len(parts), longest), tokenizer.eos_token_id)
    weights_NT = np.zeros(ids_NT.shape, np.float32)
    for row, (ids, offsets, (prompt, answer)) in enumerate(
        zip(encoded.input_ids, encoded.offset_mapping, parts, strict=True)
    ):
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


def optimizers_for(model: PreTrainedModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, biases and norms; AdamW for all of an adapter.

    Muon (K. Jordan et al., 2024, torch.optim.Muon) learns sums and reading in a third of AdamW's steps or fewer here
    (docs/LOG.md); its step is scaled to AdamW's root mean square, so one learning rate serves both. An adapter's two
    matrices are factors of the one that is learned, so making the step of each orthogonal is not Muon's step.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in embeddings]
    inside = {id(p) for p in matrices}
    rest = [p for p in trainable if id(p) not in inside]
    if config.optimizer == "adamw" or is_adapted(model):
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))]
    return [
        torch.optim.Muon(
            matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _step(
    model: PreTrainedModel,
    ids_BT: Tensor,
    weights_BT: Tensor,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[torch.optim.lr_scheduler.LambdaLR],
) -> float:
    # The loss is the mean over the whole batch, so its parts are summed and divided by the batch's weights.
    total, loss = weights_BT[:, 1:].sum(), 0.0
    for ids_RT, weights_RT in _passes(ids_BT, weights_BT, _vocabulary(model)):
        logits_RTV = model(input_ids=ids_RT[:, :-1].to(model.device), use_cache=False).logits
        losses_RT = nn.functional.cross_entropy(
            logits_RTV.float().transpose(1, 2), ids_RT[:, 1:].to(model.device), reduction="none"
        )
        part = (losses_RT * weights_RT[:, 1:].to(model.device)).sum() / total.to(model.device)
        part.backward()
        loss += float(part.detach())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


def _vocabulary(model: PreTrainedModel) -> int:
    return int(core_of(model).config.get_text_config().vocab_size)


def _passes(ids_BT: Tensor, weights_BT: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of a batch that are read one after the other, none with more logits than ``MOST_LOGITS``."""
    for ids_RT, weights_RT in _by_length(ids_BT, weights_BT):
        rows = max(1, MOST_LOGITS // (ids_RT.shape[1] * vocabulary))
        yield from zip(ids_RT.split(rows), weights_RT.split(rows), strict=True)


def _by_length(ids_BT: Tensor, weights_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A batch whole, or its short rows apart from its long ones where padding is much of it.

    A row ends at its last token with a weight, the end of text.
    """
    rows, longest = ids_BT.shape
    length_B = (torch.arange(1, longest + 1) * (weights_BT > 0)).amax(1)
    lengths, counts = length_B.unique(return_counts=True)
    read = counts.cumsum(0) * lengths + (rows - counts.cumsum(0)) * longest
    short = lengths[read.argmin()]
    if int(read.min()) > (1 - MUCH_PADDING) * rows * longest:
        return [(ids_BT, weights_BT)]
    parts = [rows_B for rows_B in (length_B <= short, length_B > short) if rows_B.any()]
    return [(ids_BT[r, : length_B[r].max()], weights_BT[r, : length_B[r].max()]) for r in parts]
