"""Labels, decision margins and states at the decision position; pairs of phrasings whose labels differ.

No label needs generation: greedy decoding yields an answer exactly when, in one teacher-forced pass, the argmax before
each of its tokens is that token and the argmax after it closes the answer. The prompt is read once; each answer is a
short pass on a copy of its cache.

Shapes: N examples, T tokens of a left-padded context, R rows (one per example and option), S rows that are read on,
M tokens of an answer, V vocabulary, P pairs, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking
from mnemoscope.behaviour.batches import Batch, by_option, prepare, with_options
from mnemoscope.behaviour.generate import Applied, decode
from mnemoscope.behaviour.reading import Answers, read_answers, read_contexts, read_only_options
from mnemoscope.behaviour.states import KeptStates, capturing, stacked_states, uncertainty_of
from mnemoscope.models import Site
from mnemoscope.runs.files import Seen
from mnemoscope.tasks import Example, Task

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

    @classmethod
    def empty(cls, total: int) -> Scores:
        """Scores of ``total`` examples that were not read yet."""
        nan_N = np.full(total, np.nan)
        return cls(np.full(total, "other", dtype=object), nan_N, np.zeros(total, bool), nan_N.copy())

    def of(self, chosen_N: np.ndarray) -> Scores:
        """The scores of some examples, without states."""
        arrays = (self.behaviour_N, self.margin_N, self.tie_N, self.confabulated_N)
        return Scores(*(array_N[chosen_N] for array_N in arrays))

    def enter(self, batch: Batch, fits_R: Tensor, tie_N: Tensor, logp_R: Tensor | None) -> None:
        """Set the labels of a batch, and its margins where the log probabilities of its options are given."""
        memorized_N, generalized_N = by_option(batch, fits_R, False).T.cpu().numpy()  # or the only answer
        has_two_N = by_option(batch, torch.ones_like(fits_R), False)[:, 1].cpu().numpy()
        of_two_N = np.where(memorized_N, "memorized", np.where(generalized_N, "generalized", "other"))
        of_one_N = np.where(memorized_N, "correct", "wrong")
        self.behaviour_N[batch.examples_N] = np.where(has_two_N, of_two_N, of_one_N).astype(object)
        self.tie_N[batch.examples_N] = tie_N.cpu().numpy()
        if logp_R is not None:
            logp_N2 = by_option(batch, logp_R.double(), torch.nan)
            self.margin_N[batch.examples_N] = (logp_N2[:, 1] - logp_N2[:, 0]).cpu().numpy()


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
    total, model, closing_V = sum(len(batch.examples_N) for batch in batches), asking.model, asking.closing()
    scores, tie = Scores.empty(total), TIES.get(model.dtype, 1e-4)
    for batch in batches:
        with torch.no_grad(), applied():
            with capturing(model, capture) if capture else nullcontext() as states:
                contexts = read_contexts(model, batch)
            first_N, tie_N = _greedy(contexts.logits_NV, tie)
            fits_R = contexts.begins_N[batch.example_R] & (first_N[batch.example_R] == batch.suffix_RM[:, 0])
            wanted_R = fits_R | ((batch.length_R > 1) & margins)
            answers = read_answers(model, batch, contexts, wanted_R, closed_R=fits_R)
            if answers:
                _read_on(batch, answers, closing_V, tie, fits_R, tie_N)
            scores.enter(batch, fits_R, tie_N, _log_p(batch, contexts.logits_NV, answers) if margins else None)
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
        fits_R, tie_N = torch.zeros_like(batch.example_R, dtype=torch.bool), torch.zeros_like(batch.shared_N).bool()
        logp_R = torch.zeros_like(fits_R, dtype=torch.float32)
        for option in range(int(batch.option_R.max()) + 1):
            has_N = by_option(batch, torch.ones_like(fits_R), False)[:, option]
            one = with_options(batch, (has_N * option)[None])
            logits_NMV = read(batch, one)
            first_N, tie_first_N = _greedy(logits_NMV[:, 0], tie)
            fits_N = first_N == one.suffix_RM[:, 0]
            _read_on(one, Answers.whole(one, logits_NMV[:, 1:]), closing_V, tie, fits_N, tie_first_N)
            tie_N |= tie_first_N
            here_R = batch.option_R == option
            fits_R[here_R] = fits_N[has_N]
            tokens_NM = one.suffix_RM[:, : logits_NMV.shape[1] - 1]
            logp_R[here_R] = _log_p_of(logits_NMV[:, :-1], tokens_NM, one.length_R)[has_N]
        scores.enter(batch, fits_R, tie_N, logp_R)
    return scores


def log_probabilities(asking: Asking, batch: Batch) -> Tensor:
    """Log probability of each example's options in nats, float32 (N, 2), through which gradients flow back.

    Column 0 is the memorized answer, or the only one, column 1 the generalized one (NaN where there is one answer).
    """
    contexts = read_contexts(asking.model, batch)
    answers = read_answers(asking.model, batch, contexts, batch.length_R > 1)
    return by_option(batch, _log_p(batch, contexts.logits_NV, answers), torch.nan)


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


def _greedy(logits_V: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    """The top token, and whether another is closer than ``tie``; (..., V) to (...) each."""
    top = logits_V.argmax(-1)
    near_V = logits_V > logits_V.gather(-1, top[..., None]) - tie  # counting is cheaper than looking for the second
    return top, near_V.sum(-1) > 1


def _read_on(batch: Batch, answers: Answers, closing_V: Tensor, tie: float, fits_R: Tensor, tie_N: Tensor) -> None:
    """Clear ``fits_R`` where greedy decoding does not go on as an answer does, or does not close it; set met ties.

    Of the rows whose first token fits, which were read to their end.
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
    met_S = (tie_SM & used_SM).any(1) & fits_R[answers.rows_S]
    tie_N[batch.example_R[answers.rows_S[met_S]]] = True
    fits_R[answers.rows_S] &= (right_SM | ~used_SM).all(1)


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


@dataclass(slots=True)
class PairBatch:
    """Labelled candidates, and the pairs among them.

    Attributes:
        candidates: (example, rephrasing) as drawn.
        scores_a, scores_b: of the examples and of the rephrasings; no states.
        is_pair_N: bool, one answered memorized, the other generalized.
        asked, scores: the different phrasings among them, and their scores with states at the decision position.
        generalized_P, memorized_P: the sides of the P pairs, as indices into ``asked``.
    """

    candidates: list[tuple[Example, Example]]
    scores_a: Scores
    scores_b: Scores
    is_pair_N: np.ndarray
    asked: list[Example]
    scores: Scores
    generalized_P: np.ndarray
    memorized_P: np.ndarray

    @property
    def states_generalized_PLD(self) -> np.ndarray:
        """float32 states of the sides that were answered generalized."""
        return self._states_NLD[self.generalized_P]

    @property
    def states_memorized_PLD(self) -> np.ndarray:
        """float32 states of the sides that were answered memorized."""
        return self._states_NLD[self.memorized_P]

    @property
    def _states_NLD(self) -> np.ndarray:
        assert self.scores.states_NLD is not None
        return self.scores.states_NLD

    def keep(self, kept: KeptStates, site: Site, of_all: bool) -> None:
        """Keep the states for later stages: of all phrasings, or of those in pairs."""
        assert self.scores.uncertainty_N2 is not None
        chosen = np.arange(len(self.asked)) if of_all else np.unique([self.generalized_P, self.memorized_P])
        examples = [self.asked[n] for n in chosen]
        kept.add(site, examples, self._states_NLD[chosen], self.scores.uncertainty_N2[chosen])

    def pairs(self) -> list[tuple[Example, Example]]:
        """(phrasing answered generalized, phrasing answered memorized) of each pair."""
        return [(self.asked[g], self.asked[m]) for g, m in zip(self.generalized_P, self.memorized_P, strict=True)]


def draw_candidates(
    task: Task, examples: Iterable[Example], rng: np.random.Generator, rephrasings: int = 1
) -> Iterator[tuple[Example, Example]]:
    """(example, rephrasing) of each conflict, every two phrasings at most once; memory hardly grows with their number.

    Args:
        rng: used lazily, so not the generator that draws ``examples`` if these are drawn lazily too.
        rephrasings: drawn for each example; repeated ones, or equal to the example, are dropped.
    """
    seen = Seen()
    for example in examples:
        if example.kind == "conflict":
            for _ in range(rephrasings):
                other = task.rephrase(example, rng)
                if other.prompt != example.prompt and seen.add(*sorted((example.prompt, other.prompt))):
                    yield example, other


def mine_pairs(
    asking: Asking, candidates: Iterable[tuple[Example, Example]], site: Site = "block", chunk: int | None = None
) -> Iterator[PairBatch]:
    """Label candidates and find those whose behaviour flips, with states; memory does not grow with their number.

    Args:
        candidates: drawn independently of labels (``draw_candidates``), so that the yield has an honest denominator.
        site: where states are read.
        chunk: candidates per yielded batch; default: as many as fill 16 passes, 512 at most.
    """
    chunk = chunk or min(512, 16 * asking.batch_size)
    left = iter(candidates)
    while drawn := list(islice(left, chunk)):
        # An example stands beside each of its rephrasings, but is asked once.
        asked = {(example.prompt, example.options): example for pair in drawn for example in pair}
        place = {question: n for n, question in enumerate(asked)}
        scores = score(asking, prepare(asking, list(asked.values())), capture=site)
        side_N2 = np.array([[place[example.prompt, example.options] for example in pair] for pair in drawn])
        a, b = scores.of(side_N2[:, 0]), scores.of(side_N2[:, 1])
        generalized_N2, memorized_N2 = (scores.behaviour_N[side_N2] == name for name in ("generalized", "memorized"))
        is_pair_N = generalized_N2.any(axis=1) & memorized_N2.any(axis=1)
        sides_P = (side_N2[named_N2 & is_pair_N[:, None]] for named_N2 in (generalized_N2, memorized_N2))
        yield PairBatch(drawn, a, b, is_pair_N, list(asked.values()), scores, *sides_P)
