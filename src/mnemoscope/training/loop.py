"""The training loop and its stop rule: a model shows both behaviours.

Shapes: N instances, B of a batch, R of one pass, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.behaviour import Asking, Batch, prepare, score
from mnemoscope.config import StopConfig, TrainingConfig
from mnemoscope.errors import InputError
from mnemoscope.models import context_length, in_precision, quick_precision
from mnemoscope.statistics import proportion
from mnemoscope.tasks import Example, Instance, Kind, Task, answer_of, draw
from mnemoscope.training.checkpoints import (
    Checkpoint,
    optimizer_tensors,
    restore_optimizer,
)
from mnemoscope.training.optimizers import optimizers_for, rate_factor

AHEAD = 8  # batches that are tokenized in one call
MUCH_PADDING = 0.15  # share of a batch's tokens that two passes must save
MEASURED: tuple[Kind, ...] = ("novel", "memory", "conflict")  # in the order in which their examples are drawn
HOPELESS = 0.7  # novel accuracy at `give_up_at` steps below which no rule will be learned
LEAST_SHARE, MOST_SHARE = 0.02, 0.98  # between which a dial is moved
# What is measured, of which kind of example and answered how: True where the rule asks for at least so much.
MEASURES: dict[str, tuple[Kind, str, bool]] = {
    "novel_accuracy": ("novel", "correct", True),
    "recall": ("memory", "correct", True),
    "conflict_memorized": ("conflict", "memorized", True),
    "conflict_generalized": ("conflict", "generalized", True),
    "conflict_other": ("conflict", "other", False),
}


def bounds_of(stop: StopConfig) -> dict[str, float]:
    """The bound of each measure: the least, of `conflict_other` the most."""
    each = {"conflict_memorized": stop.conflict_each, "conflict_generalized": stop.conflict_each}
    return {name: each[name] if name in each else getattr(stop, name) for name in MEASURES}


def unmet(stop: StopConfig, measured: Mapping[str, float], surely: Mapping[str, float] | None = None) -> list[str]:
    """Unmet conditions of the stop rule, as text; empty where the rule holds.

    ``surely``: the end of each measure's interval that the rule looks at; without it the measures themselves count.
    """
    missed = []
    for name, bound in bounds_of(stop).items():
        at_least, value = MEASURES[name][2], measured[name]
        reached = value if surely is None else surely[name]
        if not (reached >= bound if at_least else reached <= bound):
            # In a task of several parts, the measure is that of the worst part.
            parts = [key.removesuffix(f".{name}") for key in measured if key.endswith(f".{name}")]
            place = next((f" in {part}" for part in parts if measured[f"{part}.{name}"] == value), "")
            sure = "" if surely is None else f", surely {reached:.3f}"
            missed.append(f"{name} {value:.3f}{sure}{place} (wanted {'>=' if at_least else '<='} {bound})")
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
    """Train a model in place until the stop rule holds beyond its intervals, or all steps are taken.

    Weights are averaged over the last steps, exponentially (Polyak and Juditsky, 1992): what is measured, and what the
    model has in the end, are these averages, which hold a mixture that single steps pass by. ``progress`` is called at
    every step with the latest measurement. Where ``kept`` holds an unfinished training it goes on, to the same bytes;
    the model is given as it was at the beginning.

    Raises InputError where the task lacks a kind of example that the stop rule needs or has too few of it, or the dial
    of ``hold``, an instance is too long, or the tokenizer merges its answer with its prompt.
    """
    started = time.perf_counter()
    evaluation = Evaluation(asking, task, config, rng)
    state, measured = _State(asking.model, config, *dial_of(task, config)), dict[str, float]()
    before = state.restore(kept) if kept else 0.0
    for ids_BT, weights_BT in batches(asking, task, config, rng, state.steps, state.dial_at):
        state.step(ids_BT, weights_BT)
        if state.steps % config.evaluate_every == 0 or state.steps >= config.steps or state.steps == config.give_up_at:
            with state.averaged():
                measured = state.note(evaluation.measure())
            if kept and not state.is_last():
                state.keep(kept, before + time.perf_counter() - started)
        progress(state.steps, measured)
        if state.is_last():
            break
    state.finish()
    state.curve[-1]["kept"] = True
    return Trained(state.curve, state.steps, before + time.perf_counter() - started, state.missed, state.precision)


def dial_of(task: Task, config: TrainingConfig) -> tuple[float | None, int]:
    """First value of the option that holds the mixture, and which way it teaches memory; InputError without such."""
    if config.hold is None:
        return None, 1
    if config.hold.dial not in task.dials:
        allowed = ", ".join(task.dials) or "none, so leave training.hold out"
        raise InputError(f"training.hold.dial: {config.hold.dial!r}; task {task.name!r} has {allowed}")
    return float(getattr(task, config.hold.dial)), task.dials[config.hold.dial]


class _State:
    """State of a training run: optimizers, averaged weights, and the curve with what its last row misses.

    ``dial``: first value of the option that holds the mixture of behaviours; None where nothing holds it. ``way``: 1
    where a larger one teaches memory, else -1.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, dial: float | None = None, way: int = 1) -> None:
        self.model, self.config, self.dial, self.way = model, config, dial, way
        self.precision = quick_precision(model) if config.precision == "auto" else config.precision
        self.optimizers = optimizers_for(model, config)
        self.steps = 0
        self.curve: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self._losses: list[float] = []
        self._averages = {name: weight.detach().clone() for name, weight in model.named_parameters()}
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
        for name, weight in self.model.named_parameters():
            self._averages[name].lerp_(weight.detach(), 1 / min(self.steps, self.config.averaged))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the context the model has the averaged weights, and does not train."""
        latest = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.finish()
        yield
        self.model.load_state_dict(latest, strict=False)  # tied weights are in it once

    def finish(self) -> None:
        """Give the model the averaged weights."""
        self.model.load_state_dict(self._averages, strict=False)
        self.model.eval()

    def is_last(self) -> bool:
        """Whether the training ends with the last measurement: the rule holds, no step is left, or no hope."""
        if not self.curve or self.curve[-1]["step"] < self.steps:
            return False
        # Where every part memorized before it generalized, no loss is left to learn the rule from.
        novel = max(value for name, value in self.curve[-1].items() if name.endswith("novel_accuracy"))
        hopeless = self.config.give_up_at is not None and self.steps >= self.config.give_up_at and novel < HOPELESS
        return not self.missed or self.steps >= self.config.steps or hopeless

    def note(self, measured: Measured) -> dict[str, float]:
        """Add a row to the curve, and move the dial; returns the shares."""
        self.missed = unmet(self.config.stop, *measured)
        row = {
            "step": self.steps,
            "loss": float(np.mean(self._losses)),
            **measured.shares,
            "met": not self.missed,
            "kept": False,
        }
        self.curve.append(row)
        if self.dial is not None:
            row["dial"] = self._moved(self.dial)
        self._losses.clear()
        return measured.shares

    def dial_at(self, step: int) -> float | None:
        """Value of the dial for instances that are drawn behind so many steps."""
        return next((row["dial"] for row in reversed(self.curve) if row["step"] <= step), self.dial)

    def _moved(self, first: float) -> float:
        """The dial after the last measurement, against what is ahead; log odds keep it between 0 and 1."""
        hold, now, total = self.config.hold, 0.0, 0.0
        assert hold is not None, "there is a dial"
        for row in self.curve:
            memorized, generalized = row["conflict_memorized"], row["conflict_generalized"]
            answered = memorized + generalized
            now = (
                memorized / answered - hold.target if answered and row["novel_accuracy"] >= hold.novel_accuracy else 0.0
            )
            total += now
        held = float(np.clip(first, LEAST_SHARE, MOST_SHARE))
        odds = math.log(held / (1 - held)) - self.way * (hold.proportional * now + hold.integral * total)
        return float(np.clip(1 / (1 + math.exp(-odds)), LEAST_SHARE, MOST_SHARE))

    def keep(self, kept: Checkpoint, seconds: float) -> None:
        """Save all that a killed training needs to go on after a measurement."""
        tensors = {f"model/{name}": weight.detach() for name, weight in self.model.named_parameters()}
        tensors |= {f"average/{name}": weight for name, weight in self._averages.items()}
        for number, optimizer in enumerate(self.optimizers):
            tensors |= optimizer_tensors(optimizer, f"optimizer{number}")
        kept.save(tensors, {"steps": self.steps, "curve": self.curve, "missed": self.missed, "seconds": seconds})

    def restore(self, kept: Checkpoint) -> float:
        """Go on from a saved state, if there is one; returns the seconds that it took."""
        found = kept.load()
        if found is None:
            return 0.0
        tensors, facts = found
        for name, weight in self.model.named_parameters():
            weight.data.copy_(tensors[f"model/{name}"])
            self._averages[name].copy_(tensors[f"average/{name}"])
        self.steps, self.curve, self.missed = facts["steps"], facts["curve"], facts["missed"]
        for number, (optimizer, schedule) in enumerate(zip(self.optimizers, self._schedules, strict=True)):
            restore_optimizer(optimizer, f"optimizer{number}", tensors)
            schedule.last_epoch = self.steps
            for group, first in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = first * self._rate(self.steps)
        return float(facts["seconds"])

    def _rate(self, step: int) -> float:
        return rate_factor(step, self.config)


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


class Measured(NamedTuple):
    """What a model shows on the tune split.

    ``shares``: by measure, named as in the emergence curve; of several parts that of the worst part, so that the stop
    rule holds only where it holds in every part, and then each part's as ``part.measure``. ``surely``: of each measure
    the end of its 95 % interval that the rule looks at, the worst part's.
    """

    shares: dict[str, float]
    surely: dict[str, float]


class Evaluation:
    """Tune examples of each kind, for each part of a task (a task without parts is its only part), and their labels.

    A first look is at ``evaluation_examples`` of each kind. Where the stop rule holds there, but not beyond the
    intervals of so many, twice as many are looked at, and so on up to ``evaluation_most`` or to all there are. Examples
    are taken to be independent: the rule asks about this model's answers to such examples, not about other names.

    Raises InputError where the task, or a part of it, has no example of a kind, or not enough for the rule to hold
    beyond its interval even if all of them were answered as it asks.
    """

    def __init__(self, asking: Asking, task: Task, config: TrainingConfig, rng: np.random.Generator) -> None:
        self.stop, first, most = config.stop, config.evaluation_examples, config.evaluation_most
        self.askings: dict[str, Asking] = {}
        self._examples: dict[tuple[str, Kind], list[Example]] = {}
        self._batches: dict[tuple[str, Kind, int], list[Batch]] = {}
        self._looks = [first]  # examples of each kind that are looked at
        while self._looks[-1] < most:
            self._looks.append(min(2 * self._looks[-1], most))
        for name, part in (task.parts or {task.name: task}).items():
            self.askings[name] = replace(asking, boundary=part.boundary)
            for kind in MEASURED:
                self._examples[name, kind] = drawn = tune_examples(part, rng, self._looks[-1], kind)
                if why := undecidable(self.stop, len(drawn), kind):
                    raise InputError(why)

    def measure(self) -> Measured:
        """Label as many examples as it takes to tell whether the stop rule holds."""
        labels: dict[tuple[str, Kind], np.ndarray] = {key: np.array([], object) for key in self._examples}
        for look in range(len(self._looks)):
            labels = {key: np.append(seen, self._labels(*key, look)) for key, seen in labels.items()}
            measured = self._measured(labels)
            if unmet(self.stop, measured.shares) or not unmet(self.stop, *measured):
                break
        return measured

    def _labels(self, part: str, kind: Kind, look: int) -> np.ndarray:
        """Labels of the examples that a look adds to the ones before."""
        asking, begin = self.askings[part], self._looks[look - 1] if look else 0
        if (part, kind, look) not in self._batches:
            added = self._examples[part, kind][begin : self._looks[look]]
            self._batches[part, kind, look] = prepare(asking, added)
        return score(asking, self._batches[part, kind, look], margins=False).behaviour_N

    def _measured(self, labels: Mapping[tuple[str, Kind], np.ndarray]) -> Measured:
        shares: dict[str, dict[str, float]] = {}
        surely: dict[str, list[float]] = {name: [] for name in MEASURES}
        for part in self.askings:
            for name, (kind, wanted, at_least) in MEASURES.items():
                hits_N = labels[part, kind] == wanted
                shares.setdefault(part, {})[name] = float(hits_N.mean())
                surely[name].append(_sure_end(hits_N, at_least))
        worst = {name: min if at_least else max for name, (_, _, at_least) in MEASURES.items()}
        each = {f"{part}.{name}": value for part, by_name in shares.items() for name, value in by_name.items()}
        together = {name: pick(by_name[name] for by_name in shares.values()) for name, pick in worst.items()}
        ends = {name: pick(surely[name]) for name, pick in worst.items()}
        return Measured(together if len(shares) == 1 else together | each, ends)


def tune_examples(task: Task, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
    """``n`` tune examples of a kind, fewer where there are no more; InputError where there is none."""
    drawn = draw(task, rng, n, kind, "tune")
    if not drawn:
        raise InputError(f"task: {task.name} has no {kind} example in the tune split; the stop rule needs some")
    return drawn


def undecidable(stop: StopConfig, n: int, kind: Kind) -> str:
    """Why ``n`` examples of a kind cannot show that the rule holds, whatever their answers; empty where they can."""
    for name, bound in bounds_of(stop).items():
        of, _, at_least = MEASURES[name]
        right = n // 2 if at_least and of == "conflict" else n if at_least else 0  # at best
        reached = _sure_end(np.arange(n) < right, at_least)
        if kind == of and not (reached >= bound if at_least else reached <= bound):
            field = name if name in StopConfig.model_fields else "conflict_each"
            return (
                f"training.stop.{field}: {bound} cannot be shown by {n} tune examples, whatever the answers; allowed "
                f"is {'at most' if at_least else 'at least'} {reached:.3f}, or more examples (training.evaluation_most)"
            )
    return ""


def _sure_end(hits_N: np.ndarray, at_least: bool) -> float:
    """The lower or upper end of the interval of a share; 0 or 1 where there is none."""
    found = proportion(hits_N, np.arange(len(hits_N)))
    end = found.low if at_least else found.high
    return float(not at_least) if math.isnan(end) else end


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
    asking: Asking,
    task: Task,
    config: TrainingConfig,
    rng: np.random.Generator,
    after: int = 0,
    dial_at: Callable[[int], float | None] = lambda step: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids (B, T) int64, right-padded, and each token's weight in the loss (B, T) float32; an endless stream.

    ``after``: batches that are drawn, but not given. ``dial_at``: the value of the dial of ``config.hold`` for
    instances that are drawn behind so many batches; a stream that goes on draws what it would have drawn.
    """
    task = copy.copy(task)  # whose dial is moved
    instances, drawn = task.training(rng), 0
    while True:
        if config.hold is not None and (value := dial_at(drawn)) is not None:
            setattr(task, config.hold.dial, value)
        chunk = list(islice(instances, AHEAD * config.batch_size))
        drawn += AHEAD
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
