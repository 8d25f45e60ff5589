"""Probes that predict which behaviour follows, from a layer's state or from the input alone.

Shapes: N states, L layers, D neurons, V vocabulary. Labels are 1 (generalized) and 0 (memorized); a positive score
means generalized. Regularization is chosen on the tune split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

# Tried for each probe: C, the inverse strength of the penalty, from the strongest on.
OF_STATES, OF_INPUTS = (0.001, 0.01, 0.1, 1.0), (0.01, 0.1, 1.0, 10.0)


class LayerProbe:
    """Logistic regression on the standardized states of one layer, with scikit-learn's fit contract.

    Args:
        regularization: C, the inverse strength of the L2 penalty on the standardized weights.

    Attributes:
        weights_D_, bias_: float64, in the space of the raw states, so that the probe is usable without scikit-learn.
    """

    weights_D_: Floats
    bias_: float

    def __init__(self, regularization: float = 1.0) -> None:
        self.regularization = regularization

    def fit(self, states_ND: ArrayLike, labels_N: ArrayLike) -> Self:
        """Fit states (N, D); ValueError for one class, a label not 0 or 1, or a state that is not finite."""
        raw_ND, scaler = np.asarray(states_ND, dtype=np.float64), StandardScaler()
        if not np.isfinite(raw_ND).all():
            raise ValueError("states_ND: a value is infinite or NaN; allowed are finite states")
        model = LogisticRegression(C=self.regularization, max_iter=1000)
        model.fit(scaler.fit_transform(raw_ND), _checked_labels(labels_N))
        self.weights_D_ = model.coef_[0] / scaler.scale_
        self.bias_ = float(model.intercept_[0] - self.weights_D_ @ scaler.mean_)
        return self

    def decision_function(self, states_ND: ArrayLike) -> Floats:
        """Scores (N) of states (N, D): log odds of generalized."""
        return np.asarray(states_ND, dtype=np.float64) @ self.weights_D_ + self.bias_


def fit_layer_probes(
    fit_states_NLD: ArrayLike, fit_labels_N: ArrayLike, tune_states_NLD: ArrayLike, tune_labels_N: ArrayLike
) -> list[LayerProbe]:
    """One probe per layer, each with the regularization of the best tune accuracy (of equal ones, the strongest).

    ValueError as `LayerProbe.fit`, and without tune states.
    """
    by_layer = (np.moveaxis(np.asarray(states), 1, 0) for states in (fit_states_NLD, tune_states_NLD))
    return [
        _best((LayerProbe(c).fit(fit_ND, fit_labels_N) for c in OF_STATES), tune_ND, tune_labels_N)
        for fit_ND, tune_ND in zip(*by_layer, strict=True)
    ]


def input_features(token_ids: Sequence[Sequence[int]], vocabulary_size: int, positions: int = 64) -> sparse.csr_matrix:
    """Token counts of each prompt, then one-hot (position from the end, token) of its last ``positions`` tokens.

    Positions count from the end, where the decision is, so that they mean the same in prompts of different lengths.
    float64 (N, V + positions * V) of N prompts of any lengths; ValueError for a token id outside [0, V).
    """
    tokens, rows, from_end = _flat(token_ids)
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocabulary_size):
        raise ValueError(f"token_ids: {tokens.min()} to {tokens.max()}; allowed is 0 to {vocabulary_size - 1}")
    near = from_end < positions
    columns = np.concatenate([tokens, vocabulary_size * (1 + from_end[near]) + tokens[near]])
    entries = np.ones(len(columns)), (np.concatenate([rows, rows[near]]), columns)
    return sparse.csr_matrix(entries, shape=(len(token_ids), vocabulary_size * (1 + positions)))


def repeat_features(token_ids: Sequence[Sequence[int]], positions: int = 64) -> sparse.csr_matrix:
    """One-hot (position from the end, distance to the last same token), float64 (N, positions * positions).

    Whether the asked name is in the context takes the comparison of two tokens, which no bag of tokens holds. Of the
    last ``positions`` tokens; a distance counts as at most this.
    """
    tokens, rows, from_end = _flat(token_ids)
    order = np.lexsort((np.arange(len(tokens)), tokens, rows))
    earlier, later = order[:-1], order[1:]
    again = (tokens[earlier] == tokens[later]) & (rows[earlier] == rows[later])
    earlier, later = earlier[again], later[again]
    near = from_end[later] < positions
    distance = np.minimum(later - earlier, positions)[near]
    entries = np.ones(len(distance)), (rows[later][near], positions * from_end[later][near] + distance - 1)
    return sparse.csr_matrix(entries, shape=(len(token_ids), positions * positions))


def _flat(token_ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.intp], NDArray[np.int64]]:
    """All tokens of all prompts, the prompt that each belongs to, and its position from the prompt's end."""
    lengths_N = np.array([len(prompt) for prompt in token_ids], dtype=np.int64)
    tokens = np.array([token for prompt in token_ids for token in prompt], dtype=np.int64)
    from_end = np.repeat(np.cumsum(lengths_N), lengths_N) - 1 - np.arange(len(tokens))
    return tokens, np.repeat(np.arange(len(lengths_N)), lengths_N), from_end


def fit_input_probe(
    fit_features: sparse.csr_matrix, fit_labels_N: ArrayLike, tune_features: sparse.csr_matrix, tune_labels_N: ArrayLike
) -> LogisticRegression:
    """The input-only baseline: logistic regression on `input_features`, regularization chosen by tune accuracy.

    ValueError for one class, another label than 0 and 1, or no tune examples.
    """
    labels = _checked_labels(fit_labels_N)
    models = (LogisticRegression(C=c, solver="liblinear", random_state=0) for c in OF_INPUTS)
    return _best((model.fit(fit_features, labels) for model in models), tune_features, tune_labels_N)


def share_right(scores_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Share of the scores whose sign names the label; a score of 0 means memorized. NaN for no score."""
    right_N = (np.asarray(scores_N) > 0) == (np.asarray(labels_N) == 1)
    return float(right_N.mean()) if len(right_N) else math.nan


def shuffled(pairs: int, rng: np.random.Generator) -> Labels:
    """Labels of pairs, 1 before 0 in each, for the shuffled baseline: both of a pair swap, or stay, at random."""
    labels_N, swap_N = np.tile([1, 0], pairs), np.repeat(rng.integers(0, 2, size=pairs), 2)
    return np.where(swap_N == 1, 1 - labels_N, labels_N)


def _best(fitted: Iterable[Any], tune_inputs: Any, tune_labels_N: ArrayLike) -> Any:
    """The probe with the best tune accuracy; of equal ones, the first."""
    tune_labels = _checked_labels(tune_labels_N)
    if not len(tune_labels):
        raise ValueError("tune_labels_N: empty; allowed is one label or more")
    return max(fitted, key=lambda probe: share_right(probe.decision_function(tune_inputs), tune_labels))


def _checked_labels(labels_N: ArrayLike) -> Labels:
    labels = np.asarray(labels_N)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels: {sorted(set(labels.tolist()) - {0, 1})}; allowed are 0 and 1")
    return labels.astype(np.int64)
