"""What a model does when asked: labels, decision margins and states at the decision position.

Nothing is generated to find a label: greedy decoding yields an answer exactly when, in one teacher-forced pass, the
argmax before each of its tokens is that token and the argmax after it closes the answer. The prompt is read once;
each revealing answer is a short pass on a copy of its cache.

Shapes: N examples, T tokens of a left-padded context, R rows (one per example and option), M tokens of an answer,
V vocabulary, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking, Batch
from mnemoscope.behaviour.reading import Answers, Contexts, read_answers, read_contexts, read_only_options
from mnemoscope.behaviour.states import capturing, stacked_states, uncertainty_of
from mnemoscope.models import PLAINLY, Site
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIE = 1e-4  # two logits closer than this may swap places with the batch size

Applied = Callable[[], AbstractContextManager[Any]]


@dataclass(slots=True)
class Scores:
    """What a model did with N examples.

    Attributes:
        behaviour_N: ``memorized``, ``generalized`` or ``other`` for conflicts, else ``correct`` or ``wrong``.
        margin_N: float64, ``log p(generalized) - log p(memorized)`` in nats over the whole answers without what closes
            them; NaN for examples with one answer, or where margins were not asked for.
        tie_N: bool, the top two logits lay within 1e-4 where it mattered.
        confabulated_N: float64, 1 where the behaviour is ``other`` and the answer has the memorized format, else 0; NaN
            where both formats are the same or where formats were not asked for.
        states_NLD, uncertainty_N2: float32 states at the decision position and how sure the model is there
            (``States``), or None.
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
        margins: whether decision margins are wanted; without them an option is not read on once its first token
            does not fit.
        capture: a site whose states at the decision position, and the uncertainty there, are returned as well.
        applied: makes the context in which each batch is read, for example a steering vector's. Where prefixes are
            cached it may act by hooks only, and from the decision position on.

    Returns:
        Scores with N entries; ``confabulated_N`` is NaN (see ``mark_confabulations``).
    """
    total = sum(len(batch.examples_N) for batch in batches)
    scores = Scores(
        np.full(total, "other", dtype=object), np.full(total, np.nan), np.zeros(total, bool), np.full(total, np.nan)
    )
    closing = torch.tensor(asking.boundary_ids(), device=asking.model.device)
    for batch in batches:
        with torch.no_grad(), applied():
            contexts, states_NLD = _read_contexts(asking.model, batch, capture)
            _score_batch(asking.model, batch, contexts, closing, scores, margins)
        if states_NLD is not None:
            if scores.states_NLD is None:
                scores.states_NLD = np.empty((total, *states_NLD.shape[1:]), dtype=np.float32)
                scores.uncertainty_N2 = np.empty((total, 2))
            scores.states_NLD[batch.examples_N] = states_NLD
            scores.uncertainty_N2[batch.examples_N] = uncertainty_of(contexts.logits_NV)
    return scores


def _read_contexts(model: PreTrainedModel, batch: Batch, capture: Site | None) -> tuple[Contexts, np.ndarray | None]:
    """Contexts up to the decision position, and the states there, float32 (N, L, D)."""
    if capture is None:
        return read_contexts(model, batch), None
    with capturing(model, capture) as states:
        contexts = read_contexts(model, batch)
    return contexts, stacked_states(states)[0]


def log_probabilities(asking: Asking, batch: Batch) -> Tensor:
    """Log probability of each example's options in nats, float32 (N, 2), through which gradients flow back.

    Column 0 is the memorized answer, or the only one, column 1 the generalized one (NaN where there is one answer).
    """
    contexts = read_contexts(asking.model, batch)
    answers = read_answers(asking.model, batch, contexts, batch.length_R > 1, closed=False)
    return _by_option(batch, _log_p(batch, contexts.logits_NV, answers), torch.nan)


def only_log_probability(asking: Asking, batch: Batch) -> Tensor:
    """Log probability of each example's only option in nats, float32 (N,), through which gradients flow back.

    What is applied meanwhile must be told the decision position; see ``reading.read_only_options``.
    """
    logits_NMV = read_only_options(asking.model, batch)
    next_NM = batch.suffix_RM[:, : logits_NMV.shape[1]]
    logp_NM = _of_tokens(logits_NMV, next_NM)
    used_NM = torch.arange(next_NM.shape[1], device=next_NM.device) < batch.length_R[:, None]
    return logp_NM.masked_fill(~used_NM, 0.0).sum(1)


def _score_batch(
    model: PreTrainedModel, batch: Batch, contexts: Contexts, closing: Tensor, scores: Scores, margins: bool
) -> None:
    first_N, tie_N = _greedy(contexts.logits_NV)
    fits_R = contexts.begins_N[batch.example_R] & (first_N[batch.example_R] == batch.suffix_RM[:, 0])
    answers = read_answers(model, batch, contexts, fits_R | ((batch.length_R > 1) & margins))
    if answers:
        ends_S, tie_S = _ends(answers, closing)
        tie_N[batch.example_R[answers.rows_S[tie_S & fits_R[answers.rows_S]]]] = True
        fits_R[answers.rows_S] &= ends_S
    scores.behaviour_N[batch.examples_N] = _behaviour(batch, fits_R)
    scores.tie_N[batch.examples_N] = tie_N.cpu().numpy()
    if margins:
        logp_N2 = _by_option(batch, _log_p(batch, contexts.logits_NV, answers).double(), torch.nan)
        scores.margin_N[batch.examples_N] = (logp_N2[:, 1] - logp_N2[:, 0]).cpu().numpy()


def _greedy(logits_V: Tensor) -> tuple[Tensor, Tensor]:
    """The top token, and whether another is so close that they may swap places; (..., V) to (...) each."""
    top = logits_V.argmax(-1)
    near_V = logits_V > logits_V.gather(-1, top[..., None]) - TIE  # counting is cheaper than looking for the second
    return top, near_V.sum(-1) > 1


def _ends(answers: Answers, closing: Tensor) -> tuple[Tensor, Tensor]:
    """Whether greedy decoding goes on as each answer does and closes it, and whether a tie was met on the way; (S,)."""
    top_SM, tie_SM = _greedy(answers.logits_SMV)
    step_M = torch.arange(top_SM.shape[1], device=top_SM.device)
    used_SM = step_M < answers.length_S[:, None]
    inside_SM = step_M < answers.length_S[:, None] - 1  # tokens that are followed by a further token of the answer
    goes_on_SM = top_SM == torch.roll(answers.suffix_SM, -1, dims=1)
    right_SM = torch.where(inside_SM, goes_on_SM, torch.isin(top_SM, closing))
    return (right_SM | ~used_SM).all(1), (tie_SM & used_SM).any(1)


def _log_p(batch: Batch, logits_NV: Tensor, answers: Answers | None) -> Tensor:
    """Log probability of each row's option without what closes it, in nats; (R,).

    ``answers`` must hold every option of more than one token.
    """
    logp_R = logits_NV[batch.example_R, batch.suffix_RM[:, 0]] - logits_NV.logsumexp(1)[batch.example_R]
    if answers is None or answers.suffix_SM.shape[1] == 1:
        return logp_R
    next_SM = answers.suffix_SM[:, 1:]
    logits_SMV = answers.logits_SMV[:, : next_SM.shape[1]]
    logp_SM = _of_tokens(logits_SMV, next_SM)
    inside_SM = torch.arange(1, next_SM.shape[1] + 1, device=next_SM.device) < answers.length_S[:, None]
    return logp_R.index_add(0, answers.rows_S, logp_SM.masked_fill(~inside_SM, 0.0).sum(1))


def _of_tokens(logits_SMV: Tensor, tokens_SM: Tensor) -> Tensor:
    """Log probability of each token in nats, (S, M)."""
    return logits_SMV.gather(2, tokens_SM[..., None])[..., 0] - logits_SMV.logsumexp(2)


def _by_option(batch: Batch, values_R: Tensor, missing: float | bool) -> Tensor:
    """Values of rows by example and option; (N, 2)."""
    empty_N2 = torch.full((len(batch.examples_N), 2), missing, dtype=values_R.dtype, device=values_R.device)
    return empty_N2.index_put((batch.example_R, batch.option_R), values_R)


def _behaviour(batch: Batch, fits_R: Tensor) -> np.ndarray:
    """Labels, see ``Scores``; object (N,)."""
    fits_N2 = _by_option(batch, fits_R, False).cpu().numpy()
    has_two_N = _by_option(batch, torch.ones_like(fits_R), False)[:, 1].cpu().numpy()
    conflict_N = np.where(fits_N2[:, 0], "memorized", np.where(fits_N2[:, 1], "generalized", "other"))
    return np.where(has_two_N, conflict_N, np.where(fits_N2[:, 0], "correct", "wrong")).astype(object)


def mark_confabulations(
    asking: Asking,
    examples: Sequence[Example],
    scores: Scores,
    has_memorized_format: Callable[[str], bool | None],
    applied: Applied = nullcontext,
) -> None:
    """Decode what answered neither way and mark, in place, the answers that only look memorized.

    Args:
        has_memorized_format: the task's own; None where both formats are the same, which leaves NaN.
    """
    if not examples or has_memorized_format(examples[0].options[0]) is None:
        return
    scores.confabulated_N[:] = 0.0
    others = [i for i, behaviour in enumerate(scores.behaviour_N) if behaviour == "other"]
    for i, text in zip(others, decode(asking, [examples[i] for i in others], applied), strict=True):
        scores.confabulated_N[i] = float(bool(has_memorized_format(text)))


def decode(asking: Asking, examples: Sequence[Example], applied: Applied = nullcontext) -> list[str]:
    """What the model answers, by plain greedy ``generate``, up to what closes the answer."""
    if not examples:
        return []
    tokenizer, closing = asking.tokenizer, asking.boundary_ids()
    longest = max(len(ids) for e in examples for ids in tokenizer(list(e.options), add_special_tokens=False).input_ids)
    texts: list[str] = []
    for start in range(0, len(examples), asking.batch_size):
        inputs = asking.padded([asking.text(e.prompt) for e in examples[start : start + asking.batch_size]])
        with torch.no_grad(), applied():
            output = asking.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=longest + 1,
                do_sample=False,
                **PLAINLY,
                eos_token_id=closing,
                pad_token_id=asking.pad_id,
            )
        answers = output[:, inputs.input_ids.shape[1] :].tolist()
        ends = [next((i for i, token in enumerate(answer) if token in closing), len(answer)) for answer in answers]
        texts += tokenizer.batch_decode([answer[:end] for answer, end in zip(answers, ends, strict=True)])
    return texts
