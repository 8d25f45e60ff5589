"""Scaled heads in one pass: heads that help are enlarged, heads that hurt suppressed.

Li et al. (2025), "Taming knowledge conflicts in language models", arXiv 2503.10996 (ICML 2025).

Shapes: N prompts, R rows, L layers, H heads, W numbers of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import only_log_probability, with_options
from mnemoscope.interventions import Intervention, Quoted, Scale, SteeringVector, Toward, edited
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.learning import Asked, log_p
from mnemoscope.interventions.shifts import once
from mnemoscope.interventions.sources import spread_groups, with_prefixes
from mnemoscope.models import blocks_of, heads_of
from mnemoscope.tasks import Example, as_bare

Heads = Sequence[tuple[int, int]]  # layer and head
COUNTS = (5, 10)  # heads of either kind
UP = (0.0, 0.5, 1.0, 3.0, 5.0)
DOWN = (0.0, 1.0, 3.0)
SETTINGS = [(count, up, down) for count, up, down in product(COUNTS, UP, DOWN) if up or down]
TRIED = (1.0, 3.0, 5.0, 10.0, 30.0, -1.0, -2.0, -5.0)  # multiples of a head's output that are added to it
EXAMPLES = 4  # of each set, as in the paper


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of heads and pair of factors; InputError for a model whose heads are not found."""
    return scaled_heads(bench, toward, "june", SteeringVector)


def scaled_heads(bench: Bench, toward: Toward, method: str, kind: type[SteeringVector]) -> list[Intervention]:
    """Heads that help enlarged and heads that hurt made smaller, in every setting."""
    shape, ranks, found = heads_of(bench.asking.model, 0), ranked(bench, toward), list[Intervention]()
    for count, up, down in SETTINGS:
        setting = {"heads": count, "up": up, "down": down}
        found.append(kind(toward, factors_of(shape, ranks, count, up, down), "head", method=method, setting=setting))
    return found


def factors_of(
    shape: tuple[int, int], ranks: tuple[Heads, Heads], count: int, up: float, down: float
) -> dict[int, Scale]:
    """Factors of the first ``count`` heads that help and of those that hurt; empty where both factors are 0."""
    found: dict[int, Tensor] = {}
    for some, factor in zip(ranks, (up, -down), strict=True):
        for layer, head in some[:count] if factor else ():
            found.setdefault(layer, torch.zeros(shape))[head] = factor
    return {layer: Scale(factor_HW.flatten()) for layer, factor_HW in found.items()}


@once
def ranked(bench: Bench, toward: Toward) -> tuple[Heads, Heads]:
    """Heads that help in every set of examples, best first, and heads that hurt in every set, worst first.

    By how the wanted answer's probability moves when their outputs are scaled up and down: a head's effect in a set is
    the mean change under factors above 0 less that under factors below 0. It helps where it is above 0 in all sets, and
    is ranked by its smallest one.
    """
    sets = _sets(bench, toward)
    effects_NLH = _effects(bench, [example for examples in sets for example in examples])
    ends = np.cumsum([len(examples) for examples in sets])[:-1]
    effects_SLH = np.stack([part_NLH.mean(0) for part_NLH in np.split(effects_NLH, ends)])

    def order(rank_LH: np.ndarray) -> Heads:
        places = np.argsort(-rank_LH.ravel(), kind="stable")
        return [divmod(int(place), rank_LH.shape[1]) for place in places if rank_LH.ravel()[place] > 0]

    return order(effects_SLH.min(0)), order(-effects_SLH.max(0))


def told_twice(example: Example, quoted: Quoted) -> Example | None:
    """The example with its text told twice, so that it coheres; None where its prompt quotes none."""
    if not quoted.text:
        return None
    return replace(example, prompt=quoted.with_text(f"{quoted.text.rstrip()} Everybody agrees: {quoted.text.strip()}"))


def _sets(bench: Bench, toward: Toward) -> list[list[Example]]:
    """Examples without a conflict, with a plain one, and with one that the text says twice; each wants one answer."""
    drawn = bench.fit_conflicts
    conflicts = spread_groups(drawn.examples)[:EXAMPLES]
    quoted = {example.prompt: one for example, one in zip(drawn.examples, drawn.quoted, strict=True)}
    bares = [bench.task.without_context(e) for e in conflicts]
    plain = [replace(e, kind="memory", answer=getattr(e, toward), memorized=None, generalized=None) for e in conflicts]
    # Memory's answer is right without a text; what a text says needs one, which agrees.
    agreeing = spread_groups(bench.fit_agreeing.examples)[:EXAMPLES]
    none = [as_bare(bare) for bare in bares if bare] if toward == "memorized" else agreeing
    twice = [told_twice(example, quoted[example.prompt]) for example in plain]
    return [examples for examples in (none, plain, [example for example in twice if example]) if examples]


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
        before_N = log_p(asking, [Asked.first(batch)], everywhere=False).exp()
        # Factor k of every example, then the next.
        rows = with_options(batch, torch.zeros(len(TRIED), n, dtype=torch.long))
        factor_R = torch.tensor(TRIED).repeat_interleave(n)
        for layer, head in product(range(len(blocks_of(model))), range(heads)):
            scale_RHW = torch.zeros(len(factor_R), heads, width)
            scale_RHW[:, head] = factor_R[:, None]
            edit = Scale(scale_RHW.flatten(1)[:, None])
            with edited(model, {layer: edit}, "head", start=batch.ids_NT.shape[1] - 1):
                after_KN = only_log_probability(asking, rows).exp().view(len(TRIED), n)
            change_KN = (after_KN - before_N).double().cpu()
            change_N = change_KN[up_K].mean(0) - change_KN[~up_K].mean(0)
            effects_NLH[batch.examples_N, layer, head] = change_N.numpy()
    return effects_NLH
