"""What a model in training shows at one step: shares of behaviour, pairs whose behaviour flips, and how they differ.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from mnemoscope.behaviour import PLAIN, Asking, Batch, Prompting, draw_candidates, prepare, score
from mnemoscope.models import Site
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import mean, proportion
from mnemoscope.statistics.contrast import PairedMoments
from mnemoscope.tasks import Example, Kind, Split, Task, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RIGHT: dict[Kind, str] = {"novel": "novel_accuracy", "memory": "recall"}
ANSWERS = ("memorized", "generalized", "other")


class Watcher:
    """The same questions of a task, asked again and again of a model that changes.

    Everything is drawn once, from ``seed``: conflicts with their rephrasings, memory and novel questions of one split.
    No answer is generated: each revealing answer is read (teacher forcing).

    Attributes:
        conflicts: what is asked, without rephrasings.
        others: memory and novel questions, as ``recall`` and ``novel_accuracy``.
        direction_LD: the contrast of the last measurement, to which the next one is compared; None before it.
        answers: of the last measurement, a row a question: ``kind``, ``item``, ``prompt`` and ``behaviour``, which is
            ``memorized``, ``generalized`` or ``other`` of conflicts and their rephrasings, else ``correct`` or
            ``wrong``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        task: Task,
        examples: int = 32,
        rephrasings: int = 1,
        split: Split = "tune",
        contrast: Site | None = None,
        batch_size: int = 64,
        seed: int = 0,
        prompting: Prompting = PLAIN,
    ) -> None:
        """Draw and encode the questions.

        Args:
            model: plain, or with an adapter; it is kept, so later measurements read its weights of then.
            examples: of each kind, at most.
            rephrasings: of each conflict, to find pairs whose behaviour flips; 0: none, and no pairs.
            split: of the task, whose phrasings the training should not hold.
            contrast: the site where the two behaviours of pairs are compared by layer; None: not at all.
            prompting: the format of prompts.

        Raises:
            InputError: the task has no conflict in that split, or none in two phrasings, an answer cannot be read, or
                an adapter puts trained tokens before the prompt, which the cache that answers are read behind lacks.
        """
        for name, adapter in getattr(model, "peft_config", {}).items():
            if adapter.is_prompt_learning:
                raise InputError(
                    f"model: its adapter {name!r} puts trained tokens before the prompt ({adapter.peft_type.value}); "
                    "allowed are adapters of the weights"
                )
        self.asking = Asking(model, tokenizer, task.boundary, batch_size, prompting.of(task))
        self.contrast, rng = contrast, np.random.default_rng(seed)
        drawn = {kind: draw(task, rng, examples, kind, split) for kind in ("conflict", *RIGHT)}
        self.conflicts = drawn["conflict"]
        if not self.conflicts:
            raise InputError(
                f"task: {task.name} has no conflict in its {split} split, so no answer reveals a behaviour"
            )
        self.candidates = list(draw_candidates(task, self.conflicts, rng, rephrasings))
        if rephrasings and not self.candidates:
            raise InputError(
                f"task: {task.name} asks each item of its {split} split in one phrasing, so no behaviour can flip; add "
                "phrasings that are not trained on, or ask without pairs (rephrasings=0)"
            )
        every = (*self.conflicts, *(b for _, b in self.candidates))
        asked = {(example.prompt, example.options): example for example in every}
        self.asked = list(asked.values())
        self._place = {question: n for n, question in enumerate(asked)}
        self.others = {RIGHT[kind]: drawn[kind] for kind in RIGHT if drawn[kind]}
        self._batches(self.asking)  # refuses what cannot be read
        self.direction_LD: np.ndarray | None = None
        self.answers = pd.DataFrame()

    def measure(self, model: PreTrainedModel | None = None) -> dict[str, float]:
        """What the model shows now: a row of the curve, without its step.

        Keys: ``recall``, ``novel_accuracy`` (where the task has such questions; of several families also
        ``recall:FAMILY``), ``conflict_memorized``, ``conflict_generalized``, ``conflict_other``, each with ``_low``,
        ``_high`` (95 %), ``_n``; ``margin``, mean log p(generalized) - log p(memorized) in nats; ``yield``, share of
        candidates that are pairs; ``pairs`` and ``groups`` of pairs. With ``contrast`` for each layer ``rho_0``, ...,
        the largest correlation of a neuron with the behaviour, and ``cosine_0``, ..., of the mean difference with that
        of the measurement before. Undefined is NaN.
        """
        asking = replace(self.asking, model=model) if model is not None else self.asking
        found: dict[str, float] = {}
        batches = self._batches(asking)
        with undisturbed(asking.model):
            told = {name: score(asking, batches[name], margins=False).behaviour_N for name in self.others}
            scores = score(asking, batches["conflict"], capture=self.contrast)
        asked = [*(example for name in told for example in self.others[name]), *self.asked]
        labels_N = np.concatenate([*told.values(), scores.behaviour_N])
        rows = [(example.kind, example.item, example.prompt) for example in asked]
        self.answers = pd.DataFrame(rows, columns=["kind", "item", "prompt"]).assign(behaviour=labels_N)
        for name, examples in self.others.items():
            found |= _share(name, told[name] == "correct", examples)
            found |= _by_family(name, told[name] == "correct", examples)
        own_N = [self._place[e.prompt, e.options] for e in self.conflicts]
        for behaviour in ANSWERS:
            found |= _share(f"conflict_{behaviour}", scores.behaviour_N[own_N] == behaviour, self.conflicts)
        groups = [example.group for example in self.conflicts]
        margin = mean(scores.margin_N[own_N], np.array(groups))
        found |= {"margin": margin.estimate, "margin_low": margin.low, "margin_high": margin.high}
        return found | self._of_pairs(scores)

    def _batches(self, asking: Asking) -> dict[str, list[Batch]]:
        """All questions, as many at a time as there is memory for now, and in every process: shards are gathered."""
        asked = {"conflict": self.asked, **self.others}
        batches = {name: prepare(asking, some) for name, some in asked.items()}
        if not in_several_processes():
            return batches
        largest = max(len(batch.examples_N) for some in batches.values() for batch in some)
        least = torch.tensor(largest, device=asking.model.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        asking = replace(asking, batch_size=int(least))
        return {name: prepare(asking, some) for name, some in asked.items()}

    def _of_pairs(self, scores: Any) -> dict[str, float]:
        side_N2 = np.array([[self._place[e.prompt, e.options] for e in pair] for pair in self.candidates], int).reshape(
            -1, 2
        )
        labels_N2 = scores.behaviour_N[side_N2]
        is_pair_N = (labels_N2 == "generalized").any(1) & (labels_N2 == "memorized").any(1)
        examples = [a for a, _ in self.candidates]
        found = _share("yield", is_pair_N, examples)
        found["pairs"] = float(is_pair_N.sum())
        found["groups"] = float(len({e.group for e, is_one in zip(examples, is_pair_N, strict=True) if is_one}))
        if scores.states_NLD is None:
            return found
        layers = scores.states_NLD.shape[1]
        rho_L = cosine_L = np.full(layers, np.nan)
        if found["pairs"] > 1:
            pairs_P2, labels_P2 = side_N2[is_pair_N], labels_N2[is_pair_N]
            moments = PairedMoments.empty(scores.states_NLD.shape[1:])
            moments.add(*(scores.states_NLD[pairs_P2[labels_P2 == name]] for name in ("generalized", "memorized")))
            rho_L = np.fmax.reduce(np.abs(moments.rho_LD), axis=1)  # NaN where no neuron varies
            direction_LD = moments.nmd_LD
            if self.direction_LD is not None:
                cosine_L = _cosine(direction_LD, self.direction_LD)
            self.direction_LD = direction_LD
        for name, values_L in (("rho", rho_L), ("cosine", cosine_L)):
            found |= {f"{name}_{layer}": float(value) for layer, value in enumerate(values_L)}
        return found


def in_several_processes() -> bool:
    """Whether other processes measure too."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the context; afterwards modes, shards and random states are as before."""
    modes = {module: module.training for module in model.modules()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            if callable(reshard := getattr(module, "reshard", None)):  # FSDP 2 keeps what the root gathered
                reshard()
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _share(name: str, hits_N: np.ndarray, examples: list[Example]) -> dict[str, float]:
    found = proportion(hits_N, np.array([example.group for example in examples]))
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_n": float(found.n)}


def _by_family(name: str, hits_N: np.ndarray, examples: list[Example]) -> dict[str, float]:
    """The share in each family of phrasings; empty where there is one."""
    families = sorted({example.family for example in examples})
    found: dict[str, float] = {}
    for family in families if len(families) > 1 else ():
        of_N = np.array([example.family == family for example in examples])
        found |= _share(f"{name}:{family}", hits_N[of_N], [e for e in examples if e.family == family])
    return found


def _cosine(a_LD: np.ndarray, b_LD: np.ndarray) -> np.ndarray:
    norms_L = np.linalg.norm(a_LD, axis=1) * np.linalg.norm(b_LD, axis=1)
    return np.divide((a_LD * b_LD).sum(1), norms_L, out=np.full(len(norms_L), np.nan), where=norms_L > 0)
