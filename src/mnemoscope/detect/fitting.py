"""Fit detectors: calibrated probes, a probe of conflicts, and a distance from the prompts of the fit.

Shapes: N prompts, L layers, D neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from mnemoscope.detect.detector import Detector
from mnemoscope.errors import InputError
from mnemoscope.models import Site
from mnemoscope.probes import Standardized, fit_layer_probes

LIKE = 0.99  # share of the tune prompts that count as like those of the fit split
LEAST = 8  # prompts of each behaviour that a detector is fitted on, and calibrated on


@dataclass(frozen=True)
class Observed:
    """Prompts and their labels; prompts that were answered neither way are dropped before.

    Attributes:
        states_NLD: at the decision position.
        followed_N: ``memorized`` or ``generalized`` for conflicts; ``neither`` for prompts without a conflict.
    """

    states_NLD: np.ndarray
    followed_N: np.ndarray

    def conflicts(self) -> tuple[np.ndarray, np.ndarray]:
        """States (N, L, D) of the conflicts, and whether each was answered generalized, int64 (N,)."""
        kept_N = self.followed_N != "neither"
        return self.states_NLD[kept_N], (self.followed_N[kept_N] == "generalized").astype(np.int64)


def fit_detectors(
    fit: Observed, tune: Observed, site: Site = "block", below: int | None = None
) -> tuple[Detector, Detector | None]:
    """Fit the detector of the best layer, and the one of the best layer up to ``below``, for gates in the same pass.

    Probes are fitted on the fit split; regularization, calibration and layer are chosen on the tune split. Calibration:
    logistic regression of the behaviour on the score (Platt 1999, "Probabilistic outputs"). The layer has the smallest
    log loss of calibrated probabilities.

    Args:
        below: the last layer that the second one may read; None or negative: there is no second one.

    Raises:
        InputError: a split has too few prompts of a behaviour.
    """
    (fit_NLD, fit_N), (tune_NLD, tune_N) = fit.conflicts(), tune.conflicts()
    for split, labels_N in (("fit", fit_N), ("tune", tune_N)):
        for name, count in (("generalized", int(labels_N.sum())), ("memorized", int((1 - labels_N).sum()))):
            if count < LEAST:
                raise InputError(f"{split}: {count} prompts were answered {name}; at least {LEAST} are needed")
    weights, biases, losses = [], [], []
    for layer, probe in enumerate(fit_layer_probes(fit_NLD, fit_N, tune_NLD, tune_N)):
        scores_N = probe.decision_function(tune_NLD[:, layer])
        slope, offset = calibrated(scores_N, 1 - tune_N)
        weights.append(slope * probe.weights_D_)
        biases.append(slope * probe.bias_ + offset)
        losses.append(log_loss(1 - tune_N, expit(slope * scores_N + offset), labels=[0, 1]))

    def of(layer: int) -> Detector:
        conflict_D, conflict_bias = _conflict_probe(fit, tune, layer)
        likeness = _likeness(fit.states_NLD[:, layer], tune.states_NLD[:, layer])
        return Detector(site, layer, np.stack(weights), np.array(biases), conflict_D, conflict_bias, *likeness)

    best = of(int(np.argmin(losses)))
    if below is None or below < 0:
        return best, None
    lower = int(np.argmin(losses[: below + 1]))
    return best, best if lower == best.layer else of(lower)


def calibrated(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Slope and offset with which ``sigmoid(slope * score + offset)`` is the probability of label 1."""
    model = LogisticRegression(C=1e4).fit(scores_N[:, None], labels_N)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def _conflict_probe(fit: Observed, tune: Observed, layer: int) -> tuple[np.ndarray, float]:
    """Weights and bias of P(conflict) at a layer; NaN without prompts of both kinds."""
    labels = {split: (seen.followed_N != "neither").astype(np.int64) for split, seen in (("f", fit), ("t", tune))}
    width = fit.states_NLD.shape[2]
    if any(min(found.sum(), (1 - found).sum()) < LEAST for found in labels.values()):
        return np.full(width, math.nan), math.nan
    probe = fit_layer_probes(fit.states_NLD[:, [layer]], labels["f"], tune.states_NLD[:, [layer]], labels["t"])[0]
    slope, offset = calibrated(probe.decision_function(tune.states_NLD[:, layer]), labels["t"])
    return slope * probe.weights_D_, slope * probe.bias_ + offset


def _likeness(fit_ND: np.ndarray, tune_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and whitening of a Mahalanobis distance that is at most 1 for all but one in a hundred tune states.

    The covariance is shrunk (Ledoit and Wolf 2004) in units of each neuron's spread, or a few huge neurons would
    dominate the shrinkage.
    """
    standardized = Standardized.of(fit_ND)
    covariance_DD, _ = ledoit_wolf(standardized.scaled_ND)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    whitening_DD = vectors_DD / np.sqrt(np.maximum(values_D, 1e-10)) / standardized.scale_D[:, None]
    # Neurons that are constant on fit prompts are left out.
    whitening_DD[standardized.scaled_ND.std(axis=0) == 0] = 0.0
    distance_N = np.linalg.norm((tune_ND.astype(np.float64) - standardized.mean_D) @ whitening_DD, axis=1)
    return standardized.mean_D, whitening_DD / max(float(np.quantile(distance_N, LIKE)), 1e-12)
