"""What several test files share."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnemoscope.behaviour import Asking, Scores, prepare, score
from mnemoscope.bench.lists import Bench
from mnemoscope.config import StopConfig, TrainingConfig
from mnemoscope.interventions import SteeringVector, Toward, shifts
from mnemoscope.interventions.methods import learned
from mnemoscope.interventions.shifts import Setting, made
from mnemoscope.interventions.sources import ANSWERED, FitLists, Labels
from mnemoscope.models import blocks_of
from mnemoscope.paper.checkpoints import Checkpoint
from mnemoscope.paper.loop import train
from mnemoscope.runs.digests import read_marker, write_marker
from mnemoscope.tasks import KINDS, Example, Task, build_task

MINI_TASKS = {
    "inference": {"memorized_names": 24, "free_names": 24, "statements": 3, "questions": 3, "memorized_share": 0.1},
    "addition": {"digits": 2, "stored": 96, "memorized_share": 0.4},
    "addition-digits": {"digits": 2, "stored": 96, "memorized_share": 0.4},
}
# Bounds that 24 memory and 96 conflict examples of the tune split can show, and that are reached on every processor.
_SUMS = TrainingConfig(
    steps=600,
    learning_rate=0.005,
    evaluate_every=25,
    evaluation_examples=100,
    evaluation_most=200,
    stop=StopConfig(novel_accuracy=0.6, recall=0.6, conflict_each=0.12, conflict_other=0.4),
)
_NAMES = {"steps": 800, "learning_rate": 0.004, "batch_size": 32}
_NAMES |= {"stop": StopConfig(novel_accuracy=0.2, recall=0.6, conflict_each=0.1, conflict_other=0.6)}
MINI_TRAINING = {"inference": _SUMS.model_copy(update=_NAMES), "addition": _SUMS, "addition-digits": _SUMS}

MINI_STUDY = """
study: mini
seeds: 1
cells:
  addition:
    task: addition
    options: {digits: 2, stored: 96, memorized_share: 0.4}
    model: {layers: 2, width: 64, heads: 4, context: 32}
    training:
      steps: 600
      attempts: 5
      batch_size: 64
      evaluate_every: 25
      learning_rate: 0.005
      evaluation_examples: 100
      evaluation_most: 200
      stop: {novel_accuracy: 0.6, recall: 0.6, conflict_each: 0.12, conflict_other: 0.4}
    pairs: {behaviour_examples: 100, fit_examples: 200, tune_examples: 100, test_examples: 100, permutations: 99}
    probes: {offsets: [0, 2], learning: [10, 25]}
    steering:
      grids:
        block: {layers: [all, each], tops: [0.1, 0.5], strengths: [0.1, 0.3]}
        neuron: {layers: ["0-1"], tops: [0.5], strengths: [0.3]}
      methods: [nmd, gradient, learned, low-rank]
      low_rank: {layers: 2, steps: 8, factors: [1.0], refits: 2}
      learned_steps: 10
      norm_draws: 2
      draws: 3
      conflict_draws: 3
      tune_refits: 1
      tune_draws: 2
      judged_examples: 100
      tune_pairs: 50
      tune_others: 40
      fit_pairs: 60
      fit_others: 60
    effects: {pairs: 40, doses: [0, 1, 2], ablated: [0.1], draws: 2}
    detection: {fitted: true, examples: 200, others: 60}
    neutral: {cuts: 20, texts: 4, length: 28, following: 4, doses: [0, 1], batch_size: 8}
    samples: {prompts: 3, tokens: 8}
"""


def mini_examples(name: str, n: int, seed: int = 0) -> list[Example]:
    """``n`` examples of a miniature task, all kinds, and the rephrasings of its conflicts."""
    task = build_task(name, MINI_TASKS[name], seed=0)
    rng = np.random.default_rng(seed)
    examples = [e for kind in KINDS for e in task.examples(rng, n, kind)]
    examples += [task.rephrase(e, rng) for e in examples if e.kind == "conflict"]
    return [examples[i] for i in rng.permutation(len(examples))[:n]]


def label(asking: Asking, examples: list[Example], **options: object) -> Scores:
    """Score examples in one call."""
    return score(asking, prepare(asking, examples), **options)  # type: ignore[arg-type]


def sign(folder: Path) -> None:
    """Give changed files whose stages are in a folder the digests that a stranger would give them."""
    for path in (folder / "stages").glob("*.json"):
        facts = read_marker(path)
        files = [folder / name for name in facts.pop("files")]
        there = [file for file in files if os.path.lexists(file) and stat.S_ISREG(file.lstat().st_mode)]
        write_marker(folder, path.stem, there, facts)


def hook_count(model: object) -> int:
    """How many hooks hang in a model, but for those that transformers leaves once `output_hidden_states` was asked."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]  # type: ignore[attr-defined]
    return sum(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks)


@contextmanager
def shifted_by_hand(model: Any, shifts: Mapping[int, torch.Tensor], start: int) -> Iterator[None]:
    """The oracle of steering: plain transformers, with each block's output overwritten from a column on."""

    def adder(shift_D: torch.Tensor) -> Callable[..., object]:
        def add(module: torch.nn.Module, args: object, output: Any) -> object:
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[:, start:] += shift_D
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return add

    handles = [blocks_of(model)[layer].register_forward_hook(adder(shift)) for layer, shift in shifts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class StoppedError(Exception):
    """Ends a training in the middle, as a kill does."""


def check_that_a_killed_training_goes_on(
    untrained: Callable[[], Asking], task: Task, config: TrainingConfig, kept: Checkpoint
) -> None:
    """A training that is stopped four times ends as one that is not; every measurement is saved."""
    whole = untrained()
    expected = train(whole, task, config, np.random.default_rng(0))
    assert expected.steps == 90

    def stopped_at(stop: int, step: int, measured: object) -> None:
        if step == stop:
            raise StoppedError

    for number, stop in enumerate((5, 37, 52, 78, None)):
        assert kept.path.exists() == (number >= 2)
        kept, asking = replace(kept), untrained()
        try:
            found = train(asking, task, config, np.random.default_rng(0), partial(stopped_at, stop), kept)
        except StoppedError:
            assert stop is not None
    assert (found.curve, found.steps, found.unmet) == (expected.curve, expected.steps, expected.unmet)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, asking.model.state_dict()[name]), name


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenBench(Bench):
    """A bench of given pairs and lists."""

    given: FitLists
    both: list[tuple[Example, Example]]

    @property
    def pairs(self) -> list[tuple[Example, Example]]:
        return self.both

    @property
    def lists(self) -> FitLists:
        return self.given


def vector_of(
    bench: Bench, method: str, toward: Toward = Toward.GENERALIZED, labels: Labels = ANSWERED, **other: Any
) -> SteeringVector:
    """The vector of a method in a setting."""
    facts: Any = {"unit": "norm", "site": "block", "layers": (0, 1), "top": 1.0, "strength": 0.2} | other
    setting = Setting(**facts)
    if method == "learned":
        (shift_LD,) = learned._learned(bench, toward, setting[:3], ((setting.strength, labels),))
        return made(bench, method, toward, setting, shift_LD)
    return shifts.vector(bench, method, toward, setting, labels)
