"""Labels, decision margins and states at the decision position; plain greedy generation.

No label needs generation: greedy decoding yields an answer exactly when, in one teacher-forced pass, the argmax before
each of its tokens is that token and the argmax after it closes the answer. The prompt is read once; each answer is a
short pass on a copy of its cache.

Shapes: N examples, T tokens of a left-padded context, R rows (one per example and option), M tokens of an answer,
V vocabulary, L layers, D neurons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking, Batch, as_batch, encode
from mnemoscope.behaviour.reading import (
    Answers,
    Contexts,
    by_option,
    read_answers,
    read_contexts,
    read_only_options,
    with_options,
)
from mnemoscope.behaviour.states import capturing, stacked_states, uncertainty_of
from mnemoscope.models import PLAINLY, Site, context_length, end_ids
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Applied = Callable[[], AbstractContextManager[Any]]
PHRASE_ENDS = ("", "\n", ".", ",")
# Two logits closer than this may swap places with the batch size, by precision; 1e-4 in float32.
TIES = {torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(slots=True)
class Scores:
    """Labels and margins of N examples.

    Attributes:
        behaviour_N: ``memorized``, ``generalized`` or ``other`` for conflicts, else ``correct`` or ``wrong``.
        margin_N: float64, ``log p(generalized) - log p(memorized)`` in nats over the whole answers without what closes
            them; NaN for examples with one answer, or without ``margins``.
        tie_N: bool, the top two logits lay within ``TIES`` at a token that decides.
        confabulated_N: float64, 1 where the behaviour is ``other`` and the answer has the memorized format, else 0; NaN
            where both formats are the same, or before ``mark_confabulations``.
        states_NLD, uncertainty_N2: see ``States``; None without ``capture``.
    """

    behaviour_N: np.ndarray
    margin_N: np.ndarray
    tie_N: np.ndarray
    confabulated_N: np.ndarray
    states_NLD: np.ndarray | None = None
    uncertainty_N2: np.ndarray | None = None

    def of(self, chosen_N: np.ndarray) -> Scores:
        """The scores of some examples, without states."""
        arrays = (self.behaviour_N, self.margin_N, self.tie_N, self.confabulated_N)
        return Scores(*(array_N[chosen_N] for array_N in arrays))

    @classmethod
    def empty(cls, total: int) -> Scores:
        """Scores of ``total`` examples that were not read yet."""
        nan_N = np.full(total, np.nan)
        return cls(np.full(total, "other", dtype=object), nan_N, np.zeros(total, bool), nan_N.copy())


def score(
    asking: Asking,
    batches: Sequence[Batch],
    *,
    margins: bool = True,
    capture: Site | None = None,
    applied: Applied = nullcontext,
) -> Scores:
    """Label prepared examples, in the order in which they were given to ``prepare``.

    Args:
        margins: whether to compute margins; without them an option is not read on once its first token does not fit.
        capture: a site whose states at the decision position, and the uncertainty there, are returned as well.
        applied: makes the context in which each batch is read, for example a steering vector's. Where prefixes are
            cached it may act by hooks only, and from the decision position on.
    """
    total = sum(len(batch.examples_N) for batch in batches)
    scores = Scores.empty(total)
    closing_V = asking.closing()
    for batch in batches:
        with torch.no_grad(), applied():
            with capturing(asking.model, capture) if capture else nullcontext() as states:
                contexts = read_contexts(asking.model, batch)
            _score_batch(asking.model, batch, contexts, closing_V, scores, margins)
        if states:
            states_NLD = stacked_states(states)[0]
            if scores.states_NLD is None or scores.uncertainty_N2 is None:
                scores.states_NLD = np.empty((total, *states_NLD.shape[1:]), dtype=np.float32)
                scores.uncertainty_N2 = np.empty((total, 2))
            scores.states_NLD[batch.examples_N] = states_NLD
            scores.uncertainty_N2[batch.examples_N] = uncertainty_of(contexts.logits_NV)
    return scores


@torch.no_grad()
def score_read(asking: Asking, batches: Sequence[Batch], read: Callable[[Batch, Batch], Tensor]) -> Scores:
    """Label prepared examples by logits that a function reads: for interventions of more than one pass.

    Args:
        read: (batch, the same contexts with one option each) -> logits that predict each token of the options and what
            closes them, float32 (N, M + 1, V), as ``read_only_options`` gives them with ``closed``. The options of an
            example must not share tokens before its decision position (``Asking.from_prompt``).
    """
    scores = Scores.empty(sum(len(batch.examples_N) for batch in batches))
    closing_V, tie = asking.closing(), TIES.get(asking.model.dtype, 1e-4)
    for batch in batches:
        fits_R, tie_N = torch.zeros_like(batch.example_R, dtype=torch.bool), np.zeros(len(batch.examples_N), bool)
        logp_R = torch.zeros(len(batch.example_R), dtype=torch.float64, device=batch.example_R.device)
        for option in range(int(batch.option_R.max()) + 1):
            here_R = batch.option_R == option
            has_N = by_option(batch, torch.ones_like(fits_R), False)[:, option]
            one = with_options(batch, (has_N * option)[None])
            logits_NMV = read(batch, one)
            first_N, tie_first_N = _greedy(logits_NMV[:, 0], tie)
            answers = Answers.whole(one, logits_NMV[:, 1:])
            ends_N, ties_N = _ends(answers, closing_V, tie)
            fits_N = (first_N == one.suffix_RM[:, 0]) & ends_N
            fits_R[here_R] = fits_N[has_N]
            logp_R[here_R] = _log_p_of(logits_NMV[:, :-1], answers.suffix_SM, one.length_R).double()[has_N]
            tie_N |= (tie_first_N | (ties_N & (first_N == one.suffix_RM[:, 0]))).cpu().numpy()
        scores.behaviour_N[batch.examples_N] = _behaviour(batch, fits_R)
        scores.tie_N[batch.examples_N] = tie_N
        logp_N2 = by_option(batch, logp_R, torch.nan)
        scores.margin_N[batch.examples_N] = (logp_N2[:, 1] - logp_N2[:, 0]).cpu().numpy()
    return scores


def log_probabilities(asking: Asking, batch: Batch) -> Tensor:
    """Log probability of each example's options in nats, float32 (N, 2), through which gradients flow back.

    Column 0 is the memorized answer, or the only one, column 1 the generalized one (NaN where there is one answer).
    """
    contexts = read_contexts(asking.model, batch)
    answers = read_answers(asking.model, batch, contexts, batch.length_R > 1)
    return by_option(batch, _log_p(batch, contexts.logits_NV, answers), torch.nan)


def next_logits(asking: Asking, batch: Batch) -> Tensor:
    """Logits of the token behind each context, float32 (N, V), through which gradients flow back."""
    return read_contexts(asking.model, batch).logits_NV


def only_log_probability(asking: Asking, batch: Batch) -> Tensor:
    """Log probability of each example's only option in nats, float32 (N,), through which gradients flow back.

    A vector that is applied needs the decision position (``start``); see ``reading.read_only_options``.
    """
    logits_NMV = read_only_options(asking.model, batch)
    return _log_p_of(logits_NMV, batch.suffix_RM[:, : logits_NMV.shape[1]], batch.length_R)


def first_and_rest(asking: Asking, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each example's only option, what may come first and the rest, in nats; gradients flow back.

    Log probabilities of all first tokens, float32 (N, V), and of the tokens behind the option's first, (N,).
    """
    logits_NMV = read_only_options(asking.model, batch)
    rest_NM = batch.suffix_RM[:, 1 : logits_NMV.shape[1]]
    return logits_NMV[:, 0].log_softmax(-1), _log_p_of(logits_NMV[:, 1:], rest_NM, batch.length_R - 1)


def _score_batch(
    model: PreTrainedModel, batch: Batch, contexts: Contexts, closing_V: Tensor, scores: Scores, margins: bool
) -> None:
    tie = TIES.get(model.dtype, 1e-4)
    first_N, tie_N = _greedy(contexts.logits_NV, tie)
    fits_R = contexts.begins_N[batch.example_R] & (first_N[batch.example_R] == batch.suffix_RM[:, 0])
    answers = read_answers(model, batch, contexts, fits_R | ((batch.length_R > 1) & margins), closed_R=fits_R)
    if answers:
        ends_S, tie_S = _ends(answers, closing_V, tie)
        tie_N[batch.example_R[answers.rows_S[tie_S & fits_R[answers.rows_S]]]] = True
        fits_R[answers.rows_S] &= ends_S
    scores.behaviour_N[batch.examples_N] = _behaviour(batch, fits_R)
    scores.tie_N[batch.examples_N] = tie_N.cpu().numpy()
    if margins:
        logp_N2 = by_option(batch, _log_p(batch, contexts.logits_NV, answers).double(), torch.nan)
        scores.margin_N[batch.examples_N] = (logp_N2[:, 1] - logp_N2[:, 0]).cpu().numpy()


def _greedy(logits_V: Tensor, tie: float = 0.0) -> tuple[Tensor, Tensor]:
    """The top token, and whether another is closer than ``tie``; (..., V) to (...) each."""
    top = logits_V.argmax(-1)
    near_V = logits_V > logits_V.gather(-1, top[..., None]) - tie  # counting is cheaper than looking for the second
    return top, near_V.sum(-1) > 1


def _ends(answers: Answers, closing_V: Tensor, tie: float = 0.0) -> tuple[Tensor, Tensor]:
    """Whether greedy decoding goes on as each answer does and closes it, and whether a tie was met on the way; (S,).

    Of answers that were read to their end.
    """
    top_K, tie_K = _greedy(answers.logits_KV, tie)
    places = answers.read_SM.nonzero(as_tuple=True)
    top_SM = torch.zeros_like(answers.suffix_SM[:, : answers.read_SM.shape[1]]).index_put(places, top_K)
    tie_SM = torch.zeros_like(answers.read_SM).index_put(places, tie_K)
    step_M = torch.arange(top_SM.shape[1], device=top_SM.device)
    used_SM = step_M < answers.length_S[:, None]
    inside_SM = step_M < answers.length_S[:, None] - 1  # tokens that are followed by a further token of the answer
    goes_on_SM = top_SM == torch.roll(answers.suffix_SM, -1, dims=1)[:, : top_SM.shape[1]]
    right_SM = torch.where(inside_SM, goes_on_SM, closing_V[top_SM.clamp(max=len(closing_V) - 1)])
    return (right_SM | ~used_SM).all(1), (tie_SM & used_SM).any(1)


def _log_p(batch: Batch, logits_NV: Tensor, answers: Answers | None) -> Tensor:
    """Log probability of each row's option without what closes it, in nats; (R,).

    ``answers`` must hold every option of more than one token.
    """
    logp_R = logits_NV[batch.example_R, batch.suffix_RM[:, 0]] - logits_NV.logsumexp(1)[batch.example_R]
    if answers is None or answers.suffix_SM.shape[1] == 1:
        return logp_R
    step_M = torch.arange(answers.read_SM.shape[1], device=answers.rows_S.device)
    goes_on_SM = answers.read_SM & (step_M < answers.length_S[:, None] - 1)  # not where an answer ends
    next_J = torch.roll(answers.suffix_SM, -1, dims=1)[:, : goes_on_SM.shape[1]][goes_on_SM]
    logits_JV = answers.logits_KV[goes_on_SM[answers.read_SM]]
    logp_J = logits_JV.gather(1, next_J[:, None])[:, 0] - logits_JV.logsumexp(1)
    return logp_R.index_add(0, answers.rows_S[goes_on_SM.nonzero()[:, 0]], logp_J)


def _log_p_of(logits_SMV: Tensor, tokens_SM: Tensor, length_S: Tensor) -> Tensor:
    """Log probability of the first ``length_S`` tokens of each row in nats, (S,)."""
    logp_SM = logits_SMV.gather(2, tokens_SM[..., None])[..., 0] - logits_SMV.logsumexp(2)
    used_SM = torch.arange(tokens_SM.shape[1], device=tokens_SM.device) < length_S[:, None]
    return logp_SM.masked_fill(~used_SM, 0.0).sum(1)


def _behaviour(batch: Batch, fits_R: Tensor) -> np.ndarray:
    """Labels, see ``Scores``; object (N,)."""
    fits_2N = by_option(batch, fits_R, False).T.cpu().numpy()
    has_two_N = by_option(batch, torch.ones_like(fits_R), False)[:, 1].cpu().numpy()
    return np.where(has_two_N, _answered(*fits_2N), np.where(fits_2N[0], "correct", "wrong")).astype(object)


def _answered(memorized_N: np.ndarray, generalized_N: np.ndarray) -> np.ndarray:
    """Labels of conflicts by which of the two answers was given."""
    return np.where(memorized_N, "memorized", np.where(generalized_N, "generalized", "other")).astype(object)


def mark_confabulations(
    asking: Asking,
    examples: Sequence[Example],
    scores: Scores,
    has_memorized_format: Callable[[str], bool | None],
    applied: Applied = nullcontext,
) -> None:
    """Decode the answers labelled ``other`` and mark, in place, those that only have the memorized format.

    The task's own ``has_memorized_format`` returns None where both formats are the same, which leaves NaN.
    """
    if not examples or has_memorized_format(examples[0].options[0]) is None:
        return
    scores.confabulated_N[:] = 0.0
    others = [i for i, behaviour in enumerate(scores.behaviour_N) if behaviour == "other"]
    for i, text in zip(others, decode(asking, [examples[i] for i in others], applied), strict=True):
        scores.confabulated_N[i] = float(bool(has_memorized_format(text)))


@torch.no_grad()
def score_contrasted(
    asking: Asking, examples: Sequence[Example], others: Sequence[Example], weights: Sequence[float]
) -> list[Scores]:
    """Label conflicts under context-aware decoding, a baseline: ``(1 + weight) * logits - weight * other logits``.

    A positive weight makes the context count for more, a negative one for less (Shi et al. 2023, "Trusting your
    evidence: hallucinate less with context-aware decoding", arXiv 2305.14739).

    Args:
        others: the same questions without their contexts, one for each example, with the same answers.
        weights: both prompts are read once for all of them.

    Returns:
        Scores of N examples for each weight, without ties and states.
    """
    fits_W2N, logp_W2N = (np.zeros((len(weights), 2, len(examples)), kind) for kind in (bool, float))
    closing_V = asking.closing()
    for start, option in product(range(0, len(examples), asking.batch_size), (0, 1)):
        chosen = slice(start, start + asking.batch_size)
        batch, mine_NMV = _read_option(asking, examples[chosen], option)
        _, theirs_NMV = _read_option(asking, others[chosen], option)
        token_NM, length_N = batch.suffix_RM, batch.length_R
        for number, weight in enumerate(weights):
            logits_NMV = (1 + weight) * mine_NMV - weight * theirs_NMV
            first_N, _ = _greedy(logits_NMV[:, 0])
            ends_N, _ = _ends(Answers.whole(batch, logits_NMV[:, 1:]), closing_V)
            fits_W2N[number, option, chosen] = ((first_N == token_NM[:, 0]) & ends_N).cpu().numpy()
            logp_W2N[number, option, chosen] = _log_p_of(logits_NMV[:, :-1], token_NM, length_N).cpu().numpy()
    found = [Scores.empty(len(examples)) for _ in weights]
    for scores, fits_2N, logp_2N in zip(found, fits_W2N, logp_W2N, strict=True):
        scores.behaviour_N, scores.margin_N = _answered(*fits_2N), logp_2N[1] - logp_2N[0]
    return found


def _read_option(asking: Asking, examples: Sequence[Example], option: int) -> tuple[Batch, Tensor]:
    """Examples that have one option only, as a batch in their order, and the logits around it, (N, M + 1, V)."""
    alone = [replace(e, kind="memory", memorized=None, generalized=None, answer=e.options[option]) for e in examples]
    batch = as_batch(asking, encode(asking, alone), np.arange(len(alone)))
    return batch, read_only_options(asking.model, batch, closed=True)


def decode(asking: Asking, examples: Sequence[Example], applied: Applied = nullcontext) -> list[str]:
    """Generate an answer to each example, up to what closes it; where any word end does, up to the end of a phrase."""
    phrase = asking if asking.boundary else replace(asking, boundary=PHRASE_ENDS)
    tokenizer, closing = asking.tokenizer, phrase.boundary_ids()
    options = [option for example in examples for option in example.options]
    longest = max(map(len, tokenizer(options, add_special_tokens=False).input_ids)) if options else 0
    texts: list[str] = []
    for start in range(0, len(examples), asking.batch_size):
        inputs = asking.padded([asking.text(e.prompt) for e in examples[start : start + asking.batch_size]])
        with applied():
            room = context_length(asking.model) - inputs.input_ids.shape[1]
            output = _generate(asking.model, inputs, min(longest + 1, room), closing, asking.pad_id)
        answers = output[:, inputs.input_ids.shape[1] :].tolist()
        ends = [next((i for i, token in enumerate(answer) if token in closing), len(answer)) for answer in answers]
        texts += tokenizer.batch_decode([answer[:end] for answer, end in zip(answers, ends, strict=True)])
    return texts


def phrase_of(text: str) -> str:
    """A text up to the end of its first phrase: a line's end, or a punctuation mark before white space or the end."""
    begins = len(text) - len(text.lstrip())
    end = re.search(r"[.,;:!?]+(?=\s|$)|\n", text[begins:])
    return text[: begins + end.start()] if end else text


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Any, max_new_tokens: int = 20
) -> list[str]:
    """Generate a continuation of each prompt; see ``continued``."""
    ids_NT, _, width = continued(model, tokenizer, inputs, max_new_tokens)
    return tokenizer.batch_decode(ids_NT[:, width:], skip_special_tokens=True)


def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Any, max_new_tokens: int
) -> tuple[Tensor, Tensor, int]:
    """Generate behind the prompts of a left-padded batch (``Asking.padded``).

    Returns ids (N, T), their mask (N, T), which is 0 behind an end of text, and how many columns are the prompts.
    Raises InputError where the prompts leave no room for another token in the model's context.
    """
    width, limit = inputs.input_ids.shape[1], context_length(model)
    if width >= limit:
        raise InputError(f"prompt: {width} tokens leave no room for an answer; the model reads at most {limit}")
    ends = end_ids(model, tokenizer)
    output = _generate(model, inputs, min(max_new_tokens, limit - width), ends or None, tokenizer.pad_token_id)
    ends_NT = torch.isin(output[:, width:], torch.tensor(ends, dtype=torch.long, device=output.device)).long()
    text_NT = (ends_NT.cumsum(1) - ends_NT) == 0  # the end itself belongs to the text
    return output, torch.cat([inputs.attention_mask, text_NT.long()], dim=1), width


@torch.no_grad()
def _generate(model: Any, inputs: Any, most: int, ends: list[int] | None, pad: int | None) -> Tensor:
    """Prompts and what is generated behind them, (N, T)."""
    return model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=most,
        do_sample=False,
        **PLAINLY,
        eos_token_id=ends,
        pad_token_id=pad,
    )
