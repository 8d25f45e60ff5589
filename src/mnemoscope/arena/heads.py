"""Scaled attention heads: which of them help, and how they are scaled in one pass or by a first one.

Li et al. (2025), "Taming knowledge conflicts in language models", arXiv 2503.10996 (ICML 2025).

Shapes: N prompts, R rows, T tokens (columns), L layers, H heads, W numbers of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.arena.contract import Applied
from mnemoscope.arena.lists import Bench, as_bare, spread_groups
from mnemoscope.arena.varied import told_twice
from mnemoscope.behaviour import capturing, only_log_probability, with_options
from mnemoscope.directions import with_prefixes
from mnemoscope.models import blocks_of, cache_argument, cache_of, core_of, forked, heads_of, replaced_forward
from mnemoscope.steering import Edit, Toward, edited
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIED = (1.0, 3.0, 5.0, 10.0, 30.0, -1.0, -2.0, -5.0)  # what a head's output is multiplied with, beside itself
EXAMPLES = 4  # of each set, as in the paper


@dataclass(frozen=True)
class Ranked:
    """Heads that help in every set of examples, best first, and heads that hurt in every set, worst first."""

    help: Sequence[tuple[int, int]]
    hurt: Sequence[tuple[int, int]]


def ranked(bench: Bench, toward: Toward) -> Ranked:
    """Rank heads by how the wanted answer's probability moves when their outputs are scaled up and down.

    A head's effect in a set is the mean change under factors above 0 less that under factors below 0. It helps where
    it is above 0 in all sets, and is ranked by its smallest one.
    """
    sets = _sets(bench, toward)
    effects_NLH = _effects(bench, [example for examples in sets for example in examples])
    ends = np.cumsum([len(examples) for examples in sets])[:-1]
    effects_SLH = np.stack([part_NLH.mean(0) for part_NLH in np.split(effects_NLH, ends)])
    least_LH, most_LH = effects_SLH.min(0), effects_SLH.max(0)
    heads = least_LH.shape[1]

    def order(rank_LH: np.ndarray) -> list[tuple[int, int]]:
        places = np.argsort(-rank_LH.ravel(), kind="stable")
        return [divmod(int(place), heads) for place in places if rank_LH.ravel()[place] > 0]

    return Ranked(order(least_LH), order(-most_LH))


def _sets(bench: Bench, toward: Toward) -> list[list[Example]]:
    """Examples without a conflict, with a plain one, and with one that the text says twice; each wants one answer."""
    drawn = bench.fit.prompts["conflict"]
    conflicts = spread_groups(drawn.examples)[:EXAMPLES]
    quoted = {example.prompt: one for example, one in zip(drawn.examples, drawn.quoted, strict=True)}
    bares = [bench.task.without_context(e) for e in conflicts]
    plain = [_wants(e, toward) for e in conflicts]
    # Memory's answer is right without a text; what a text says needs one, which agrees.
    agreeing = spread_groups(bench.fit.prompts["agreeing"].examples)[:EXAMPLES]
    none = [as_bare(bare) for bare in bares if bare] if toward == "memorized" else agreeing
    twice = [told_twice(example, quoted[e.prompt]) for e, example in zip(conflicts, plain, strict=True)]
    return [examples for examples in (none, plain, [example for example in twice if example]) if examples]


def _wants(example: Example, toward: Toward) -> Example:
    """A conflict with the wanted answer only."""
    return replace(example, kind="memory", answer=getattr(example, toward), memorized=None, generalized=None)


@torch.no_grad()
def _effects(bench: Bench, examples: Sequence[Example]) -> np.ndarray:
    """Mean change of p(first token of the answer) under factors above 0 less that under others; float64 (N, L, H)."""
    asking, model = bench.asking, bench.asking.model
    heads, width = heads_of(model, 0)
    up_K = torch.tensor([factor > 0 for factor in TRIED])
    effects_NLH = np.zeros((len(examples), len(blocks_of(model)), heads))
    for whole in with_prefixes(asking, examples):
        batch = replace(whole, suffix_RM=whole.suffix_RM[:, :1], length_R=torch.ones_like(whole.length_R))
        n = len(batch.examples_N)
        before_N = only_log_probability(asking, with_options(batch, _first(n, 1))).exp()
        rows = with_options(batch, _first(n, len(TRIED)))  # factor k of every example, then the next factor
        factor_R = torch.tensor(TRIED).repeat_interleave(n)
        for layer in range(len(blocks_of(model))):
            for head in range(heads):
                scale_RW = torch.zeros(len(factor_R), heads, width)
                scale_RW[:, head] = factor_R[:, None]
                edit = _adding_rows(scale_RW.flatten(1))
                with edited(model, {layer: edit}, "head", start=batch.ids_NT.shape[1] - 1):
                    after_KN = only_log_probability(asking, rows).exp().view(len(TRIED), n)
                change_KN = (after_KN - before_N).double().cpu()
                change_N = change_KN[up_K].mean(0) - change_KN[~up_K].mean(0)
                effects_NLH[batch.examples_N, layer, head] = change_N.numpy()
    return effects_NLH


def _first(n: int, copies: int) -> Tensor:
    return torch.zeros(copies, n, dtype=torch.long)


def _adding_rows(scale_RD: Tensor) -> Edit:
    return lambda states_RTD: states_RTD + scale_RD[:, None].to(states_RTD) * states_RTD


Factors = Mapping[int, Tensor]  # by layer, (H * W,): what multiplies the outputs that are added


def factors_of(model: PreTrainedModel, ranks: Ranked, count: int, up: float, down: float) -> dict[int, Tensor]:
    """Factors of the first ``count`` heads that help and of those that hurt; empty where both factors are 0."""
    heads, width = heads_of(model, 0)
    found: dict[int, Tensor] = {}
    for some, factor in ((ranks.help, up), (ranks.hurt, -down)):
        for layer, head in some[:count] if factor else ():
            found.setdefault(layer, torch.zeros(heads, width))[head] = factor
    return {layer: factor_HW.flatten() for layer, factor_HW in found.items()}


def in_one_pass(model: PreTrainedModel, factors: Factors) -> Applied:
    """Heads get their own outputs once more, times the factor, in the pass itself."""

    def scaled(factor_D: Tensor) -> Edit:
        return lambda states_NTD: states_NTD + factor_D.to(states_NTD) * states_NTD

    return lambda start: edited(model, {n: scaled(f) for n, f in factors.items()}, "head", start=start)


def in_two_passes(model: PreTrainedModel, factors: Factors) -> Applied:
    """Heads get what they gave in a first, unchanged pass, times the factor; see ``_twice``."""
    return lambda start: _twice(model, factors, start)


@contextmanager
def _twice(model: PreTrainedModel, factors: Factors, start: int | None) -> Iterator[None]:
    """Inside the context every pass runs twice: unchanged, with a cache of its own, then with what its heads gave.

    Prompts may be read behind a prefix: it belongs to both runs, as nothing acts before the decision position.
    """
    if not factors:
        yield
        return
    first, layers = _FirstRun(), sorted(factors)
    core = core_of(model)
    name = cache_argument(model)

    def adding(layer: int) -> Edit:
        def add(states_NTD: Tensor) -> Tensor:
            if first.runs:
                return states_NTD
            given_NTD = first.given[layer][:, -states_NTD.shape[1] :]
            return states_NTD + factors[layer].to(states_NTD) * given_NTD.to(states_NTD)

        return add

    def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with first.running(kwargs, name), capturing(model, "head", layers, offsets=None) as given:
                first.cache = cache_of(forward(*args, **kwargs | {name: first.cache, "use_cache": True}))
            first.given = dict(zip(layers, given, strict=True))
            output = forward(*args, **kwargs)
            first.behind = kwargs.get(name) if kwargs.get(name) is not None else output.get(name)
            return output

        return run

    with (
        edited(model, {layer: adding(layer) for layer in layers}, "head", start=start),
        replaced_forward([core], twice),
    ):
        yield


class _FirstRun:
    """The unchanged run: its cache, what its heads gave, and the cache of the second run that it belongs to."""

    def __init__(self) -> None:
        self.runs = False
        self.cache: Any = None
        self.behind: Any = None
        self.given: dict[int, Tensor] = {}

    @contextmanager
    def running(self, kwargs: Mapping[str, Any], name: str) -> Iterator[None]:
        """While it runs; a pass behind another cache than that of the pass before begins a prompt."""
        second = kwargs.get(name)
        if second is None or second is not self.behind:
            self.cache = None if second is None else forked(second)
        self.runs = True
        try:
            yield
        finally:
            self.runs = False
