"""A task and a model set by hand, whose switch between memory and rule is known neuron by neuron.

Five cue words of a prompt vote, each for the rule or for memory, and the majority decides; the item says which two
answers are at stake. Filler words move other neurons further than the votes move the switch, and nothing follows.

The state at the decision position is made of
    CODE      bits of the item's two answers, from layer 0 on
    FILLER    what the filler words put there, from layer 0 on; every attention and MLP adds to it
    SWITCH    the votes, with the signs SIGNS, from layer GATHERS on
    VERDICT   the sum of the votes, written by two neurons (READERS) of the MLP of layer READS
    DONE      0; says after an answer that it was given.
The head takes the choice from SWITCH or from VERDICT; the other one then tells the behaviours apart and does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.behaviour import Asking
from mnemoscope.config import ModelConfig
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.tasks import SPLITS, Example, Instance, Kind, Task
from mnemoscope.tasks.base import assign_splits

LAYERS, WIDTH = 3, 64
GATHERS, READS = 1, 2  # layers: before GATHERS no state at the decision position knows the votes

SWITCH = np.array([9, 22, 37, 50])
SIGNS = np.array([1.0, -1.0, -1.0, 1.0])  # of what a vote for the rule adds
VERDICT, DONE = np.array([30, 44]), np.array([2, 61])  # each a number and its negative
READERS = np.array([77, 180])  # they take what is for the rule, and what is against it
CODE = np.array([0, 4, 11, 15, 20, 27, 33, 41, 46, 53, 58, 63])  # 2 answers x 3 bits x (bit, its negative)
FILLER = np.setdiff1d(np.arange(WIDTH), np.concatenate([SWITCH, VERDICT, DONE, CODE]))

VOTES = 5  # odd, so that there is always a majority
LENGTH = 2 * VOTES + 2  # of a prompt: an item, cues, as many fillers, "="
ITEMS = [f"item{i}" for i in range(400)]
MEMORIZED, GENERALIZED = [f"m{i}" for i in range(8)], [f"g{i}" for i in range(8)]
# Every split has cue words of its own, every second of them for the rule: what they share is in the model alone.
CUES = {split: [f"{split}{i}" for i in range(40)] for split in SPLITS}
FILLERS = [f"filler{i}" for i in range(150)]
VOCABULARY = [*ITEMS, *MEMORIZED, *GENERALIZED, *(cue for split in SPLITS for cue in CUES[split]), *FILLERS, "="]

Decider = Literal["switch", "verdict"]


class KnownSwitch(Task):
    """The task; all of it are conflicts, and nobody is trained on it."""

    name = "known-switch"
    boundary = ("",)

    def __init__(self) -> None:
        self.split_of = assign_splits(ITEMS, np.random.default_rng(0))

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        return iter(())

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        return [self._asked(int(i), rng) for i in rng.integers(len(ITEMS), size=n)] if kind == "conflict" else []

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        return self._asked(ITEMS.index(example.item), rng)

    def _asked(self, i: int, rng: np.random.Generator) -> Example:
        split = self.split_of[ITEMS[i]]
        words = [*rng.choice(CUES[split], VOTES, replace=False), *rng.choice(FILLERS, VOTES, replace=False)]
        return Example(
            item=ITEMS[i],
            prompt=" ".join([ITEMS[i], *rng.permutation(words), "="]),
            kind="conflict",
            group=ITEMS[i],
            split=split,
            memorized=f" {MEMORIZED[i % 8]}",
            generalized=f" {GENERALIZED[i // 8 % 8]}",
        )


def known_model(decider: Decider) -> Asking:
    """The model, ready to be asked; ``decider``: where the head takes the choice from."""
    tokenizer = word_tokenizer(VOCABULARY, 2 * LENGTH)
    model = build_gpt2(tokenizer, ModelConfig(layers=LAYERS, width=WIDTH, heads=1, context=2 * LENGTH), 0)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))  # no longer that of the embedding
    for parameter in model.parameters():
        parameter.data.zero_()
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        # Next to such an epsilon any variance is 0: the norm takes away the mean, which is 0, and nothing else.
        # A smaller one leaks gradient into idle neurons, where Adam (method "learned") steps as far as at the switch.
        norm.eps = 1e12
        norm.weight.data.fill_(1e6)
    ids = tokenizer.get_vocab()
    blocks = model.transformer.h
    _set_rows(model.transformer.wte.weight, ids, _embeddings())
    _gather(blocks[0].attn, CODE)
    _gather(blocks[GATHERS].attn, SWITCH)
    for layer, block in enumerate(blocks):
        _gather(block.attn, FILLER, share=0.08 if layer else 1.0)  # later layers gather what gathered already
        _stir(block.mlp, seed=layer)
    _sum_up(blocks[READS].mlp)
    _set_rows(model.lm_head.weight, ids, _head(decider, tokenizer.eos_token))
    return Asking(model, tokenizer, KnownSwitch.boundary, batch_size=4096)


def _embeddings() -> dict[str, np.ndarray]:
    """What each word gives to the states that gather it; zero in sum over neurons, for the sake of the layer norms."""
    rng = np.random.default_rng(1)
    rows = {item: 3.0 * (_code(0, i % 8) + _code(1, i // 8 % 8)) for i, item in enumerate(ITEMS)}
    rows |= {answer: _state(DONE, [1.0, -1.0]) for answer in (*MEMORIZED, *GENERALIZED)}
    for cues in CUES.values():
        for i, cue in enumerate(cues):
            vote = SIGNS if i % 2 else -SIGNS
            # Neurons also have a part of their own, at right angles to SIGNS, so that the votes' sum does not know it.
            own = 0.4 * (rng.normal() * np.array([1, 1, -1, -1]) + rng.normal() * np.array([1, -1, 1, -1]))
            rows[cue] = _state(SWITCH, vote + own)
    for word in FILLERS:  # they move their neurons 1.3 times as far as the votes move SWITCH
        rows[word] = _state(FILLER, 0.5 * _centred(rng.normal(size=len(FILLER))))
    return rows


def _head(decider: Decider, end: str) -> dict[str, np.ndarray]:
    """How the logit of each word reads the last state; 4 nats of decision margin for each vote of the majority."""
    read = _state(SWITCH, SIGNS / 2) if decider == "switch" else _state(VERDICT, [1.0, -1.0])
    rows = {word: _code(0, i) - read for i, word in enumerate(MEMORIZED)}
    rows |= {word: _code(1, i) + read for i, word in enumerate(GENERALIZED)}
    return rows | {end: _state(DONE, [500.0, -500.0])}


def _gather(attention: nn.Module, neurons: np.ndarray, share: float = 1.0) -> None:
    """Every token looks at all of the prompt alike: a share of the sum of these neurons reaches the prompt's end."""
    for neuron in neurons:
        attention.c_attn.weight.data[neuron, 2 * WIDTH + neuron] = share * LENGTH  # a value; queries and keys stay 0
        attention.c_proj.weight.data[neuron, neuron] = 1.0


def _stir(mlp: nn.Module, seed: int) -> None:
    """All neurons of an MLP read FILLER, each in a direction of its own, and write to it what they make of it."""
    inner = mlp.c_fc.weight.shape[1]
    mix_IF = np.linalg.qr(np.random.default_rng(seed).normal(size=(inner, len(FILLER))))[0]
    mlp.c_fc.weight.data[FILLER] = _tensor(1.5 * mix_IF.T)
    mlp.c_proj.weight.data[:, FILLER] = _tensor(_centred(0.25 * mix_IF))


def _sum_up(mlp: nn.Module) -> None:
    """READERS turn SWITCH into VERDICT instead; gelu(x) - gelu(-x) = x, so that the two together are linear."""
    mlp.c_fc.weight.data[:, READERS] = 0.0
    mlp.c_proj.weight.data[READERS] = 0.0
    mlp.c_fc.weight.data[np.ix_(SWITCH, READERS)] = _tensor(np.outer(SIGNS, [1.0, -1.0]))
    mlp.c_proj.weight.data[np.ix_(READERS, VERDICT)] = _tensor(np.outer([0.25, -0.25], [1.0, -1.0]))


def _code(place: int, number: int) -> np.ndarray:
    """The bits of an answer's number, +1 or -1, each beside its negative."""
    bits = np.array([1.0 if number >> bit & 1 else -1.0 for bit in range(3)])
    return _state(CODE[6 * place : 6 * place + 6], np.stack([bits, -bits], axis=1).ravel())


def _state(neurons: np.ndarray, values: object) -> np.ndarray:
    """A state that is zero everywhere else."""
    state_D = np.zeros(WIDTH)
    state_D[neurons] = values
    return state_D


def _set_rows(weight_VD: Tensor, ids: Mapping[str, int], rows: Mapping[str, np.ndarray]) -> None:
    for word, row_D in rows.items():
        weight_VD.data[ids[word]] = _tensor(row_D)


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(-1, keepdims=True)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()
