"""Fit a reader on texts with documents; no labels are needed, as swaps make them.

Shapes: N tokens, L layers, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mnemoscope.auditing.origins.labels import ORIGINS, UNSURE, Labelled, labelled
from mnemoscope.auditing.origins.reader import Reader, features
from mnemoscope.auditing.origins.spans import Pool, mentions, spans_of, swapped
from mnemoscope.auditing.origins.texts import Form, Text, answered, asked
from mnemoscope.behaviour import Asking, read_behind
from mnemoscope.interventions import Binding
from mnemoscope.interventions.detect import likeness
from mnemoscope.models import blocks_of
from mnemoscope.runs.errors import InputError

PLACES = (0.3, 0.4, 0.5, 0.6)  # of all blocks, one of which is read
STRENGTHS = (1e-4, 1e-3, 1e-2)  # inverse, of the penalty on standardized weights
BESIDE = 0.25  # weight of a token outside names and numbers
SURENESS = 10.0  # weight of log probability and entropy beside states, of which there are many
TUNE, LEAST = 0.3, 20  # share of groups that are chosen on; spans of each origin that a fit needs


@dataclass(frozen=True)
class Tokens:
    """Tokens of labelled answers: features by layer (L of (N, F)), labels, weights, and the text of each."""

    x_LNF: list[np.ndarray]
    label_N: np.ndarray
    weight_N: np.ndarray
    text_N: np.ndarray

    @classmethod
    def of(cls, asking: Asking, form: Form, several: Sequence[Labelled], layers: Sequence[int]) -> Tokens:
        """Read labelled answers once; tokens that are ``UNSURE`` are left out."""
        read = read_behind(asking, [(asked(asking, form, one.text), one.ids) for one in several], layers)
        rows: list[list[np.ndarray]] = [[] for _ in layers]
        for one in read:
            for place, part in enumerate(rows):
                part.append(features(one.states_ULD[:, place], one.logp_T, one.entropy_T))
        inside = [np.isin(np.arange(len(one.ids)), [p for s in one.spans for p in one.tokens_of(s)]) for one in several]
        label_N = np.concatenate([one.token_T for one in several])
        text_N = np.repeat(np.arange(len(several)), [len(one.ids) for one in several])
        kept_N = label_N != UNSURE
        x_LNF = [np.concatenate(part)[kept_N] for part in rows]
        weight_N = np.where(np.concatenate(inside), 1.0, BESIDE)
        return cls(x_LNF, label_N[kept_N], weight_N[kept_N], text_N[kept_N])


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


def fit_reader(asking: Asking, form: Form, texts: Sequence[Text], seed: int = 0, tokens: int = 24) -> Reader:
    """Fit a reader on a model's own answers to questions about documents, and on given ones.

    Raises:
        InputError: too few spans of an origin are found.
    """
    pool = Pool([text.document for text in texts])
    given = [text for text in texts if text.answer]
    own = answered(asking, form, [replace(text, answer="") for text in texts], tokens)
    fresh = [text for text in varied(own, pool, seed) if not text.answer]
    several = labelled(asking, form, [*given, *own, *answered(asking, form, fresh, tokens)], pool, seed)
    return fitted_reader(asking, form, several, seed)


def fitted_reader(asking: Asking, form: Form, several: Sequence[Labelled], seed: int = 0) -> Reader:
    """Fit on labelled answers: layer and penalty are chosen, and probabilities calibrated, on a part of the groups."""
    counts = np.bincount(np.concatenate([one.label_S for one in several]) + 1, minlength=4)[1:]
    if short := [f"{n} from {name}" for n, name in zip(counts, ORIGINS, strict=True) if n < LEAST]:
        raise InputError(f"texts: {', '.join(short)} of {counts.sum()} names and numbers; {LEAST} of each are needed")
    blocks = len(blocks_of(asking.model))
    layers = sorted({int(blocks * place) for place in PLACES})
    tokens = Tokens.of(asking, form, several, layers)
    groups = sorted({one.text.group or one.text.document for one in several})
    drawn = np.random.default_rng([seed, 73]).permutation(len(groups))
    chosen = {groups[n] for n in drawn[: max(1, round(TUNE * len(groups)))]}
    tune_N = np.array([(one.text.group or one.text.document) in chosen for one in several])[tokens.text_N]
    fits = [(place, strength) for place in range(len(layers)) for strength in STRENGTHS]
    probes = [_probe(tokens, place, strength, tune_N) for place, strength in fits]
    loss, weights_3F, bias_3, place = min(probes, key=lambda one: one[0])
    before_ND = tokens.x_LNF[place][:, : (tokens.x_LNF[place].shape[1] - 2) // 2]
    like = likeness(before_ND[~tune_N], before_ND[tune_N])
    binding = Binding.of(asking.model, asking.tokenizer)
    figures = {"loss": loss, **{name: float(n) for name, n in zip(ORIGINS, counts, strict=True)}}
    made: dict[str, Any] = {"whole_form": form.form, "bare_form": form.bare, "figures": figures, "binding": binding}
    return Reader(layers[place], weights_3F, bias_3, *like, prompting=asking.prompting, **made)


def _probe(
    tokens: Tokens, place: int, strength: float, tune_N: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, int]:
    """Log loss on tune, weights and biases of a calibrated probe, and its place among the layers."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x_NF, fit_N = tokens.x_LNF[place], ~tune_N
    scaler = StandardScaler().fit(x_NF[fit_N])
    scaler.scale_[-2:] /= SURENESS
    probe = LogisticRegression(C=strength, max_iter=500)
    probe.fit(scaler.transform(x_NF[fit_N]), tokens.label_N[fit_N], sample_weight=tokens.weight_N[fit_N])
    if len(probe.classes_) < len(ORIGINS):
        raise InputError("texts: the groups that are fitted on lack an origin; give more texts")
    weights_3F = probe.coef_ / scaler.scale_
    bias_3 = probe.intercept_ - weights_3F @ scaler.mean_
    logits_N3, label_N, weight_N = x_NF[tune_N] @ weights_3F.T + bias_3, tokens.label_N[tune_N], tokens.weight_N[tune_N]

    def loss(log_factor: float) -> float:
        logp_N3 = log_softmax(np.exp(log_factor) * logits_N3, axis=1)
        return float(-np.average(logp_N3[np.arange(len(label_N)), label_N], weights=weight_N))

    best = minimize_scalar(loss, bounds=(-3.0, 2.0), method="bounded")
    factor = float(np.exp(best.x))
    return float(best.fun), factor * weights_3F, factor * bias_3, place
