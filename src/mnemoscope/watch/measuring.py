"""What a model in training shows at one step: shares of behaviour, pairs whose behaviour flips, and how they differ.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from mnemoscope.behaviour import PLAIN, Asking, Batch, Prompting, draw_candidates, prepare, score
from mnemoscope.models import SITES, Site
from mnemoscope.runs.errors import InputError, check_one_of
from mnemoscope.statistics import cosine, mean, proportion
from mnemoscope.statistics.contrast import PairedMoments
from mnemoscope.tasks import SPLITS, Example, Kind, Split, Task, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RIGHT: dict[Kind, str] = {"novel": "novel_accuracy", "memory": "recall"}
ANSWERS = ("memorized", "generalized", "other")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a model in training.

    Args:
        examples: of each kind, at most.
        rephrasings: of each conflict, to find pairs whose behaviour flips; 0: none, and no pairs.
        split: of the task, whose phrasings the training should not hold.
        contrast: a site where the behaviours of pairs are compared by layer; None: not at all.
        batch_size: questions a pass, at most.
        seed: decides which questions are drawn.
        prompting: the format of prompts, such as ``Prompting(chat=True)`` of a model that is taught conversations.
        kinds: of examples, in the order in which they are drawn.

    Raises InputError where a value is not allowed.
    """

    examples: int = 32
    rephrasings: int = 1
    split: Split = "tune"
    contrast: Site | None = None
    batch_size: int = 64
    seed: int = 0
    prompting: Prompting = PLAIN
    kinds: Sequence[Kind] = ("conflict", "novel", "memory")

    def __post_init__(self) -> None:
        for name, least in (("examples", 1), ("rephrasings", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: {getattr(self, name)!r}; allowed is a number from {least} on")
        check_one_of("split", self.split, SPLITS)
        check_one_of("contrast", self.contrast, (None, *SITES))


class Watcher:
    """The same questions of a task, drawn once and asked again and again of a model that changes, by teacher forcing.

    Attributes:
        drawn: the questions of each kind, without rephrasings.
        direction_LD: the contrast of the last measurement, to which the next one is compared; None before it.
        answers: of the last measurement, a row a question: ``kind``, ``item``, ``prompt`` and ``behaviour``:
            ``memorized``, ``generalized`` or ``other`` of conflicts, rephrased ones too, else ``correct`` or ``wrong``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        task: Task,
        asked: Asked = Asked(),
        rng: np.random.Generator | None = None,
    ) -> None:
        """Draw the questions.

        Args:
            model: plain, or with an adapter; it is kept, so later measurements read its weights of then.
            rng: draws the questions instead of one with the seed of ``asked``.

        Raises:
            InputError: the task has no conflict in that split, or none in two phrasings, or an adapter puts trained
                tokens before the prompt, which the cache that answers are read behind lacks.
        """
        for name, adapter in getattr(model, "peft_config", {}).items():
            if adapter.is_prompt_learning:
                raise InputError(
                    f"model: its adapter {name!r} puts trained tokens before the prompt ({adapter.peft_type.value}); "
                    "allowed are adapters of the weights"
                )
        self.asking = Asking(model, tokenizer, task.boundary, asked.batch_size, asked.prompting.of(task))
        self.contrast = asked.contrast
        rng = np.random.default_rng(asked.seed) if rng is None else rng
        self.drawn = {kind: draw(task, rng, asked.examples, kind, asked.split) for kind in asked.kinds}
        conflicts, of_split = self.drawn["conflict"], f"{asked.split} split"
        if not conflicts:
            raise InputError(f"task: {task.name} has no conflict in its {of_split}, so no answer reveals a behaviour")
        self.candidates = list(draw_candidates(task, conflicts, rng, asked.rephrasings))
        if asked.rephrasings and not self.candidates:
            raise InputError(
                f"task: {task.name} asks each item of its {of_split} in one phrasing, so no behaviour can flip; add "
                "phrasings that are not trained on, or ask without pairs (rephrasings=0)"
            )
        phrased = {(e.prompt, e.options): e for e in (*conflicts, *(b for _, b in self.candidates))}
        self.phrased = list(phrased.values())
        self._place = {question: n for n, question in enumerate(phrased)}
        self._encoded: dict[tuple[Kind, int, int], list[Batch]] = {}
        self.direction_LD: np.ndarray | None = None
        self.answers = pd.DataFrame()

    def labels(self, kind: Kind, begin: int, end: int) -> np.ndarray:
        """Behaviour (N,) of some of the drawn questions of a kind, which are encoded once."""
        if (kind, begin, end) not in self._encoded:
            self._encoded[kind, begin, end] = prepare(self.asking, self.drawn[kind][begin:end])
        return score(self.asking, self._encoded[kind, begin, end], margins=False).behaviour_N

    def measure(self, model: PreTrainedModel | None = None) -> dict[str, float]:
        """What the model shows now: a row of the curve, without its step.

        Keys: ``recall``, ``novel_accuracy`` (where the task has such questions; of several families also
        ``recall:FAMILY``), ``conflict_memorized``, ``conflict_generalized``, ``conflict_other``, each with ``_low``,
        ``_high`` (95 %), ``_n``; ``margin``, mean log p(generalized) - log p(memorized) in nats; ``yield``, share of
        candidates that are pairs; ``pairs`` and ``groups`` of pairs. With ``contrast`` for each layer ``rho_0``, ...,
        the largest correlation of a neuron with the behaviour, and ``cosine_0``, ..., of the mean difference with that
        of the measurement before. Undefined is NaN. Raises InputError where an answer cannot be read.
        """
        asking = self.asking if model is None else replace(self.asking, model=model)
        kinds = [kind for kind in RIGHT if self.drawn[kind]]
        batches = {kind: self._batches(asking, self.drawn[kind]) for kind in kinds}
        batches["conflict"] = self._batches(asking, self.phrased)
        with undisturbed(asking.model):
            labels = {kind: score(asking, batches[kind], margins=False).behaviour_N for kind in kinds}
            scores = score(asking, batches["conflict"], capture=self.contrast)
        asked = [*(example for kind in labels for example in self.drawn[kind]), *self.phrased]
        rows = [(example.kind, example.item, example.prompt) for example in asked]
        behaviour_N = np.concatenate([*labels.values(), scores.behaviour_N])
        self.answers = pd.DataFrame(rows, columns=["kind", "item", "prompt"]).assign(behaviour=behaviour_N)
        found: dict[str, float] = {}
        for kind, labels_N in labels.items():
            found |= _share(RIGHT[kind], labels_N == "correct", self.drawn[kind])
            families_N = np.array([example.family for example in self.drawn[kind]])
            for family in np.unique(families_N) if len(set(families_N)) > 1 else ():
                of_family = [e for e in self.drawn[kind] if e.family == family]
                found |= _share(f"{RIGHT[kind]}:{family}", labels_N[families_N == family] == "correct", of_family)
        conflicts = self.drawn["conflict"]
        own_N = [self._place[e.prompt, e.options] for e in conflicts]
        for behaviour in ANSWERS:
            found |= _share(f"conflict_{behaviour}", scores.behaviour_N[own_N] == behaviour, conflicts)
        margin = mean(scores.margin_N[own_N], np.array([example.group for example in conflicts]))
        found |= {"margin": margin.estimate, "margin_low": margin.low, "margin_high": margin.high}
        return found | self._of_pairs(scores)

    def _batches(self, asking: Asking, examples: list[Example]) -> list[Batch]:
        """Questions, as many at a time as there is memory for now, and in every process: shards are gathered."""
        batches = prepare(asking, examples)
        if not in_several_processes() or not batches:
            return batches
        least = torch.tensor(max(len(batch.examples_N) for batch in batches), device=asking.model.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return prepare(replace(asking, batch_size=int(least)), examples)

    def _of_pairs(self, scores: Any) -> dict[str, float]:
        places = [[self._place[e.prompt, e.options] for e in pair] for pair in self.candidates]
        side_N2 = np.array(places, int).reshape(-1, 2)
        labels_N2 = scores.behaviour_N[side_N2]
        is_pair_N = (labels_N2 == "generalized").any(1) & (labels_N2 == "memorized").any(1)
        examples = [a for a, _ in self.candidates]
        found = _share("yield", is_pair_N, examples)
        found["pairs"] = float(is_pair_N.sum())
        found["groups"] = float(len({e.group for e, is_one in zip(examples, is_pair_N, strict=True) if is_one}))
        if scores.states_NLD is None:
            return found
        rho_L = cosine_L = np.full(scores.states_NLD.shape[1], np.nan)
        if found["pairs"] > 1:
            pairs_P2, labels_P2 = side_N2[is_pair_N], labels_N2[is_pair_N]
            moments = PairedMoments.empty(scores.states_NLD.shape[1:])
            moments.add(*(scores.states_NLD[pairs_P2[labels_P2 == name]] for name in ("generalized", "memorized")))
            rho_L = np.fmax.reduce(np.abs(moments.rho_LD), axis=1)  # NaN where no neuron varies
            if self.direction_LD is not None:
                cosine_L = np.array([*map(cosine, moments.nmd_LD, self.direction_LD)])
            self.direction_LD = moments.nmd_LD
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
    states, devices = (np.random.get_state(), random.getstate()), []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = [*range(torch.cuda.device_count())]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            if callable(reshard := getattr(module, "reshard", None)):  # FSDP 2 keeps what the root gathered
                reshard()
        np.random.set_state(states[0])
        random.setstate(states[1])


def _share(name: str, hits_N: np.ndarray, examples: list[Example]) -> dict[str, float]:
    found = proportion(hits_N, np.array([example.group for example in examples]))
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_n": float(found.n)}
