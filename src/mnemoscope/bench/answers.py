"""What a model answers under an intervention: labels, texts, and its divergence on neutral text.

Shapes: N prompts, M tokens of an answer, T tokens (columns), V vocabulary.
"""

from __future__ import annotations

import math
import re
import string
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import (
    Asking,
    Batch,
    Encoded,
    Scores,
    as_batch,
    by_length,
    cache_prefixes,
    continued,
    cost_of,
    prepare,
    read_only_options,
    score,
    score_read,
    states_at_the_end,
    with_options,
    without_prefix,
    written,
)
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import Intervention, Quoted, SteeringVector, Toward
from mnemoscope.interventions.contract import Seen
from mnemoscope.interventions.detect import Detector, Reading
from mnemoscope.models import Precision, cache_of, in_precision, pass_inputs, quick_precision, with_last_logits
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

NOTHING = Intervention(toward=Toward.GENERALIZED)
EARLIEST = 8  # tokens before a cut in neutral text, at least


def scores(one: Intervention, prompts: Prompts, margins: bool = False, roughly: bool = False) -> Scores:
    """Label prompts under an intervention: what greedy decoding with it in place would answer.

    ``roughly``: passes over whole prompts in bfloat16 where that is quicker, for choices between settings.
    """
    asking, batches, asked = prompts.asking, prompts.batches, worded(one, prompts)
    if asked is not prompts.examples:
        batches = prepare(asking, asked)
    elif one.everywhere:
        batches = [part for batch in map(without_prefix, batches) for part in by_length(batch)]
    if not one.contrast and not one.in_one_go:
        precision: Precision = quick_precision(asking.model) if roughly and one.everywhere else "float32"
        with in_precision(asking.model, precision):
            return score(asking, batches, margins=margins, applied=partial(one.apply, asking.model))
    bares = dict(zip(map(id, batches), prompts.contrast_batches(one.contrast), strict=True)) if one.contrast else {}

    def read(batch: Batch, each: Batch) -> Tensor:
        return _logits(asking, _marked(one, prompts, each.examples_N, each.mask_NT), each, bares.get(id(batch)))

    return score_read(asking, batches, read)


def steered(asking: Asking, batches: Sequence[Batch], vector: SteeringVector, margins: bool = True) -> Scores:
    """Label prepared examples under a vector, from cached prefixes unless it acts on all tokens."""
    if vector.everywhere:
        batches = [part for batch in map(without_prefix, batches) for part in by_length(batch)]
    return score(asking, batches, margins=margins, applied=partial(vector.apply, asking.model))


def _logits(asking: Asking, one: Intervention, single: Batch, bare: Batch | None = None) -> Tensor:
    """Logits that predict each token of one option and what closes it, float32 (N, M + 1, V).

    ``bare``: what the same rows are contrasted with, with all their options.
    """
    # Recorded outputs of blocks would be replayed inside passes that hooks appear in later.
    ready = replace(single, unshifted=None) if one.in_one_go else single
    with one.apply(asking.model, start=0 if one.everywhere else single.ids_NT.shape[1] - 1):
        mine_NMV, mine = _watched(one, asking.model, ready)
    if bare is None:
        return mine_NMV
    other_NMV, other = _watched(one, asking.model, with_options(bare, single.option_R[None]))
    return one.join(mine_NMV, other_NMV, mine, other)


def _watched(one: Intervention, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Any]:
    """Logits of a pass over options, (N, M + 1, V), and what an intervention sees at these tokens."""
    with one.watched(model) as seen:
        logits_NMV = read_only_options(model, batch, closed=True)
    return logits_NMV, seen(logits_NMV.shape[1])


def _marked(one: Intervention, prompts: Prompts, chosen_N: Sequence[int] | np.ndarray, mask_NT: Tensor) -> Intervention:
    """The intervention for a batch of some prompts, told where their texts stand if it asks."""
    return one if type(one).marked is Intervention.marked else one.marked(prompts.text_columns(chosen_N, mask_NT))


def worded(one: Intervention, prompts: Prompts) -> list[Example]:
    """The examples with the prompts that an intervention asks; the list itself where these are the same."""
    if type(one).prompt is Intervention.prompt:
        return prompts.examples
    both = zip(prompts.examples, map(one.prompt, prompts.quoted), strict=True)
    return [replace(example, prompt=prompt) for example, prompt in both]


@dataclass(frozen=True)
class Texts:
    """Generated texts of N prompts, the mean seconds of one prompt, and what the texts cost the model itself.

    ``nats_N``: mean cost a token under the model without an intervention, behind the prompt as it was asked; NaN where
    it was not measured.
    ``repeated_N``: share of a text's pairs of neighbouring tokens that it had before.
    """

    texts: Sequence[str]
    seconds: float
    nats_N: np.ndarray
    repeated_N: np.ndarray


def answered(one: Intervention, prompts: Prompts, tokens: int = 20) -> list[str]:
    """Generate greedily behind prompts under an intervention: texts, without special tokens.

    Raises InputError where two passes are joined and a prompt has no bare question.
    """
    lacking = [n for n, bare in enumerate(prompts.bares, 1) if one.contrast and bare is None]
    if lacking:
        raise InputError(
            f"bare: prompt {lacking[0]} quotes no text that can be told from its question, with which {one.method} "
            "contrasts it; give the questions without their texts (bare), or use another lever"
        )
    decode = prompts.asking.tokenizer.batch_decode
    return [
        text
        for ids_NT, _, width, _ in _generated(one, prompts, tokens)
        for text in decode(ids_NT[:, width:], skip_special_tokens=True)
    ]


def texts_of(one: Intervention, prompts: Prompts, tokens: int, measured: float = math.inf) -> Texts:
    """Generate greedily behind prompts under an intervention; the cost of about the first ``measured`` is computed."""
    model, tokenizer = prompts.asking.model, prompts.asking.tokenizer
    texts, nats, repeated, seconds = list[str](), list[float](), list[float](), 0.0
    for ids_NT, mask_NT, width, took in _generated(one, prompts, tokens):
        seconds += took
        nats += cost_of(model, ids_NT, mask_NT, width).tolist() if len(nats) < measured else []
        texts += tokenizer.batch_decode(ids_NT[:, width:], skip_special_tokens=True)
        for ids, mask in zip(ids_NT[:, width:].tolist(), mask_NT[:, width:].tolist(), strict=True):
            repeated.append(_repeated(ids[: sum(mask)]))
    nats += [math.nan] * (len(texts) - len(nats))
    return Texts(texts, seconds / max(1, len(prompts)), np.array(nats), np.array(repeated))


@torch.no_grad()
def _generated(one: Intervention, prompts: Prompts, tokens: int) -> Iterator[tuple[Tensor, Tensor, int, float]]:
    """By batch, ids and mask (N, T) of prompts and answers, how many columns are the prompts, and seconds."""
    asking, examples = prompts.asking, worded(one, prompts)
    contrast = prompts.contrast(one.contrast) if one.contrast else []
    for start in range(0, len(examples), asking.batch_size):
        chosen = slice(start, start + asking.batch_size)
        inputs = asking.padded([asking.text(e.prompt) for e in examples[chosen]])
        began = time.perf_counter()
        others = [asking.text(other.prompt) for other in contrast[chosen]]
        marked = _marked(one, prompts, range(len(prompts))[chosen], inputs.attention_mask)
        with marked.apply(asking.model), one.watched(asking.model) as seen:
            joined = [_Joined(one, asking.model, asking.padded(others), seen)] if others else []
            found = continued(asking.model, asking.tokenizer, inputs, tokens, processors=joined)
        yield *found, time.perf_counter() - began


class _Joined:
    """A logits processor that joins each token's logits with those that the model gives behind the contrast."""

    def __init__(self, one: Intervention, model: PreTrainedModel, contrast: Any, seen: Seen) -> None:
        self.one, self.model, self.seen = one, model, seen
        self.cache: Any = None
        self.ids_NT, self.mask_NT = contrast.input_ids, contrast.attention_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Joined logits, float32 (N, V)."""
        mine = self.seen(1)
        if self.cache is not None:
            self.ids_NT = input_ids[:, -1:]
            self.mask_NT = torch.cat([self.mask_NT, torch.ones_like(self.ids_NT)], dim=1)
        with self.one.watched(self.model) as seen:
            output = with_last_logits(self.model, pass_inputs(self.model, self.ids_NT, self.mask_NT, self.cache))
        self.cache = cache_of(output)
        return self.one.join(scores[:, None].float(), output.logits[:, -1:].float(), mine, seen(1))[:, 0]


def _repeated(ids: Sequence[int]) -> float:
    """Share of the pairs of neighbours that came before."""
    pairs = list(pairwise(ids))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def is_exact(text: str, answer: str) -> bool:
    """Whether the first line of a text is an answer, but for case, punctuation, articles and spaces.

    The normal form is that of SQuAD (Rajpurkar et al. 2016), but punctuation becomes a space instead of nothing.
    """
    first = next(iter(text.strip().splitlines()), "")
    return _normal(first) == _normal(answer)


def is_said(text: str, answer: str, other: str) -> bool:
    """Whether a text, a sentence maybe, names an answer, and not the other one before it; normal forms, whole words."""
    mine, theirs = (f" {_normal(text)} ".find(f" {_normal(one)} ") for one in (answer, other))
    return mine >= 0 and not 0 <= theirs < mine


def _normal(text: str) -> str:
    bare = "".join(" " if sign in string.punctuation else sign for sign in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


class Neutral:
    """Cuts in text that the model wrote itself, and its distributions behind them.

    The text is sampled at temperature 1 without any prompt: there the divergence of one token after another adds up to
    that of whole texts.
    """

    def __init__(
        self, asking: Asking, cuts: int, texts: int, length: int, following: int, rng: np.random.Generator
    ) -> None:
        """Draw them; none where the model reads too few tokens for ``following`` ones behind a cut."""
        import pandas as pd  # here, as answers alone need no table

        self.asking = asking
        self.encoded, self.batches, self.plain, places = list[Encoded](), list[Batch](), list[Tensor](), list[int]()
        if not cuts or length < EARLIEST + following:
            return
        written_NT = written(asking, min(texts, cuts), length, int(rng.integers(2**31)))
        for number in range(cuts):
            row, place = (
                written_NT[number % len(written_NT)].tolist(),
                int(rng.integers(EARLIEST, length - following + 1)),
            )
            self.encoded.append(Encoded(row[:place], 0, (row[place : place + following],)))
            places.append(place)
        order, size = np.argsort(places, kind="stable"), asking.batch_size
        self.batches = [as_batch(asking, self.encoded, order[start : start + size]) for start in range(0, cuts, size)]
        cache_prefixes(asking, self.batches)
        self.plain = [self._logp(NOTHING, batch) for batch in self.batches]
        self.rows = pd.DataFrame({"text": order % len(written_NT), "place": np.array(places)[order]})

    @torch.no_grad()
    def _logp(self, one: Intervention, batch: Batch) -> Tensor:
        """Log probabilities at the cut and behind it, float32 (N, M, V)."""
        ready = without_prefix(batch) if one.everywhere else batch
        one = one.marked(torch.zeros_like(batch.mask_NT, dtype=torch.bool))  # it quotes no text
        return _logits(self.asking, one, ready)[:, :-1].log_softmax(-1)

    def read(self, detector: Detector) -> Reading:
        """The detector's estimates at the cuts, in the order of ``measured``."""
        model, found = self.asking.model, [np.empty((0, *detector.weights_LD.shape), np.float32)]
        for batch in self.batches:
            found.append(states_at_the_end(model, batch.ids_NT, batch.mask_NT, detector.site))
        return detector.read(np.concatenate(found))

    def measured(self, one: Intervention) -> pd.DataFrame:
        """A row a cut: ``text``, ``place``, divergence of the intervention from the model itself in nats, and whether
        the likeliest next token stays (``same_top``).

        KL at the cut (``kl_first``) and the mean of the tokens behind it (``kl_next``). No row where two passes are
        joined, as neutral text has no bare question.
        """
        import pandas as pd

        batches, found = ([] if one.contrast else self.batches), list[pd.DataFrame]()
        if batches and (sentence := one.prompt(Quoted("", "", ""))):
            ids = self.asking.tokenizer(sentence, add_special_tokens=False).input_ids
            encoded = [replace(e, context=[e.context[0], *ids, *e.context[1:]]) for e in self.encoded]
            batches = [as_batch(self.asking, encoded, batch.examples_N) for batch in batches]
        for batch, plain_NMV in zip(batches, self.plain[: len(batches)], strict=True):
            with_NMV = self._logp(one, batch)
            kl_NM = (plain_NMV.exp() * (plain_NMV - with_NMV)).sum(-1).double().cpu().numpy()
            same_N = (plain_NMV[:, 0].argmax(-1) == with_NMV[:, 0].argmax(-1)).cpu().numpy()
            found.append(pd.DataFrame({"kl_first": kl_NM[:, 0], "kl_next": kl_NM[:, 1:].mean(1), "same_top": same_N}))
        return self.rows.join(pd.concat(found, ignore_index=True)) if found else self.unmeasured()

    @staticmethod
    def unmeasured() -> pd.DataFrame:
        """What ``measured`` returns without a row."""
        import pandas as pd

        return pd.DataFrame({name: np.empty(0) for name in ("text", "place", "kl_first", "kl_next", "same_top")})
