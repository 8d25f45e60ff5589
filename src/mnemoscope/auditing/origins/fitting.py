"""Fit a reader on texts with documents; no labels are needed, as swaps make them.

Shapes: N tokens, L layers, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mnemoscope.auditing.origins.labels import ORIGINS, UNSURE, Labelled, labelled
from mnemoscope.auditing.origins.reader import Reader, features, pairs
from mnemoscope.auditing.origins.spans import Pool, Span, mentions, spans_of, swapped
from mnemoscope.auditing.origins.texts import Form, Text, answered, asked
from mnemoscope.behaviour import Asking, read_behind
from mnemoscope.interventions import Binding
from mnemoscope.interventions.detect import likeness
from mnemoscope.models import blocks_of
from mnemoscope.runs.errors import InputError

PLACES = ((0.4,), (0.55,), (0.4, 0.55))  # of all blocks, of which one or two are read
STRENGTHS = (1e-4, 1e-3, 1e-2)  # inverse, of the penalty on standardized weights
BESIDE = 0.25  # weight of a token outside names and numbers
SURENESS = 10.0  # weight of log probability and entropy beside states, of which there are many
FOLDS, LEAST = 5, 20  # of groups, each left out once; spans of each origin that a fit needs


@dataclass(frozen=True)
class Tokens:
    """Tokens of labelled answers: states before and at each by layer, float32 (N, L, 2, D), log probability and entropy
    (N, 2), labels, weights, the group of each, its text and place there (N, 2); ``UNSURE`` ones are left out.
    """

    states_NL2D: np.ndarray
    sure_N2: np.ndarray
    label_N: np.ndarray
    weight_N: np.ndarray
    group_N: np.ndarray
    place_N2: np.ndarray

    @classmethod
    def of(cls, asking: Asking, form: Form, several: Sequence[Labelled], layers: Sequence[int]) -> Tokens:
        """Read labelled answers once."""
        read = read_behind(asking, [(asked(asking, form, one.text), one.ids) for one in several], layers)
        states, sure = zip(*(pairs(one.states_ULD, one.logp_T, one.entropy_T) for one in read), strict=True)
        inside = [np.isin(np.arange(len(one.ids)), [p for s in one.spans for p in one.tokens_of(s)]) for one in several]
        label_N = np.concatenate([one.token_T for one in several])
        groups = [one.text.group or one.text.document for one in several]
        group_N = np.repeat(np.unique(groups, return_inverse=True)[1], [len(one.ids) for one in several])
        parts = np.concatenate(states), np.concatenate(sure), label_N, np.where(np.concatenate(inside), 1.0, BESIDE)
        place_N2 = np.array([(n, place) for n, one in enumerate(several) for place in range(len(one.ids))])
        return cls(*(part[label_N != UNSURE] for part in (*parts, group_N, place_N2)))

    def features(self, places: Sequence[int]) -> np.ndarray:
        """Of some layers, float32 (N, F)."""
        return features(self.states_NL2D[:, places], self.sure_N2, np.float32)

    def folds(self, seed: int) -> np.ndarray:
        """A fold for each token, that of its group."""
        drawn = np.random.default_rng([seed, 73]).permutation(self.group_N.max() + 1)
        return drawn[self.group_N] % FOLDS

    def halves(self, place: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """States before tokens of a layer (N, D): those of all folds but one, and of this one."""
        before_ND, last_N = self.states_NL2D[:, place, 0], self.folds(seed) == 0
        return before_ND[~last_N], before_ND[last_N]


def varied(texts: Sequence[Text], pool: Pool, seed: int) -> list[Text]:
    """Each text with its document, with another answer in it, with another document, and with one that mentions it.

    What an answer says is replaced in its document, or put in the place of a name of its kind in another document.
    """
    rng, found = np.random.default_rng([seed, 72]), list[Text]()
    for n, text in enumerate(texts):
        other = texts[(n + 1 + int(rng.integers(max(1, len(texts) - 1)))) % len(texts)].document
        group = text.group or text.document
        found += [replace(text, group=group), Text(text.question, other, group=group)]
        said = next((one for one in spans_of(text.answer) if mentions(text.document, one.of(text.answer))), None)
        if said is None:
            continue
        what = said.of(text.answer)
        for instead in pool.others(what, said.kind, (text.document, text.question), rng)[:1]:
            found.append(Text(text.question, swapped(text.document, what, instead), group=group))
        there = [s for s in spans_of(other) if s.kind == said.kind and len(s.of(other).split()) == len(what.split())]
        if there:
            placed = there[int(rng.integers(len(there)))].of(other)
            found.append(Text(text.question, swapped(other, placed, what), group=group))
    return found


class Judged(NamedTuple):
    """A name or number with its label and what probes say of it, (3,), that were fitted without its group."""

    text: Text
    span: Span
    label: str
    p_3: np.ndarray

    def row(self) -> dict[str, Any]:
        """As ``report.stories.origins`` shows it."""
        text, p_3 = self.text, {f"p_{name}": p for name, p in zip(ORIGINS, self.p_3.tolist(), strict=True)}
        facts: dict[str, Any] = {"question": text.question, "document": text.document, "answer": text.answer}
        facts |= {"start": self.span.start, "end": self.span.end, "group": text.group or text.document}
        return facts | {"label": self.label, "verdict": ORIGINS[int(self.p_3.argmax())], **p_3}


def fit_reader(
    asking: Asking, form: Form, texts: Sequence[Text], seed: int = 0, tokens: int = 24
) -> tuple[Reader, list[Judged]]:
    """Fit a reader on a model's own answers to questions about documents, and on given ones; see ``fitted_reader``.

    Raises:
        InputError: too few spans of an origin are found.
    """
    pool = Pool([text.document for text in texts])
    given = [text for text in texts if text.answer]
    own = answered(asking, form, [replace(text, answer="") for text in texts], tokens)
    fresh = [text for text in varied(own, pool, seed) if not text.answer]
    several = labelled(asking, form, [*given, *own, *answered(asking, form, fresh, tokens)], pool, seed)
    return fitted_reader(asking, form, several, seed)


def fitted_reader(
    asking: Asking, form: Form, several: Sequence[Labelled], seed: int = 0
) -> tuple[Reader, list[Judged]]:
    """Fit on labelled answers; blocks, penalty and calibration are those that do best on groups that were left out.

    Returns the reader, and what it says of each name and number where it was fitted without its group.
    """
    counts = np.bincount(np.concatenate([one.label_S for one in several]) + 1, minlength=4)[1:]
    if short := [f"{n} from {name}" for n, name in zip(counts, ORIGINS, strict=True) if n < LEAST]:
        raise InputError(f"texts: {', '.join(short)} of {counts.sum()} names and numbers; {LEAST} of each are needed")
    blocks = len(blocks_of(asking.model))
    layers = sorted({int(blocks * place) for places in PLACES for place in places})
    tokens = Tokens.of(asking, form, several, layers)
    chosen = [sorted({layers.index(int(blocks * place)) for place in places}) for places in PLACES]
    fits = [_Fit.of(tokens, places, strength, seed) for places in chosen for strength in STRENGTHS]
    best = min(fits, key=lambda one: one.loss)
    like = likeness(*tokens.halves(best.places[0], seed))
    binding = Binding.of(asking.model, asking.tokenizer)
    figures = {"loss": best.loss, **{name: float(n) for name, n in zip(ORIGINS, counts, strict=True)}}
    made: dict[str, Any] = {"whole_form": form.form, "bare_form": form.bare, "figures": figures, "binding": binding}
    read = [layers[place] for place in best.places]
    reader = Reader(read, best.weights_3F, best.bias_3, *like, prompting=asking.prompting, **made)
    return reader, list(_judged(several, dict(zip(map(tuple, tokens.place_N2.tolist()), best.left_N3, strict=True))))


def _judged(several: Sequence[Labelled], p_of: Mapping[tuple[int, int], np.ndarray]) -> Iterator[Judged]:
    """Of each labelled span, by text and place of its tokens."""
    for n, one in enumerate(several):
        for span, label in zip(one.spans, one.label_S, strict=True):
            read = [p_of[n, place] for place in one.tokens_of(span) if (n, place) in p_of]
            if label != UNSURE and read:
                yield Judged(one.text, span, ORIGINS[label], np.mean(read, axis=0))


@dataclass(frozen=True)
class _Fit:
    """A calibrated probe of some layers; on groups that were left out its log loss, nats a token, and probabilities."""

    places: list[int]
    loss: float
    weights_3F: np.ndarray
    bias_3: np.ndarray
    left_N3: np.ndarray

    @classmethod
    def of(cls, tokens: Tokens, places: list[int], strength: float, seed: int) -> _Fit:
        from scipy.optimize import minimize_scalar
        from scipy.special import log_softmax, softmax

        x_NF, label_N, weight_N = tokens.features(places), tokens.label_N, tokens.weight_N
        fold_N, left_N3 = tokens.folds(seed), np.zeros((len(label_N), len(ORIGINS)))
        for fold in range(FOLDS):
            out_N = fold_N == fold
            weights_3F, bias_3 = _probe(x_NF[~out_N], label_N[~out_N], weight_N[~out_N], strength)
            left_N3[out_N] = x_NF[out_N] @ weights_3F.T + bias_3

        def loss(log_factor: float) -> float:
            logp_N3 = log_softmax(np.exp(log_factor) * left_N3, axis=1)
            return float(-np.average(logp_N3[np.arange(len(label_N)), label_N], weights=weight_N))

        best = minimize_scalar(loss, bounds=(-3.0, 2.0), method="bounded")
        weights_3F, bias_3 = _probe(x_NF, label_N, weight_N, strength)
        factor = float(np.exp(best.x))
        return cls(places, float(best.fun), factor * weights_3F, factor * bias_3, softmax(factor * left_N3, axis=1))


def _probe(
    x_NF: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of a logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x_NF)
    scaler.scale_[-2:] /= SURENESS
    probe = LogisticRegression(C=strength, max_iter=300).fit(scaler.transform(x_NF), label_N, sample_weight=weight_N)
    if len(probe.classes_) < len(ORIGINS):
        raise InputError("texts: a part of the groups lacks an origin; give more texts")
    weights_3F = probe.coef_ / scaler.scale_
    return weights_3F, probe.intercept_ - weights_3F @ scaler.mean_
