"""P(memorized) of a prompt before it is answered, and gates that steer by it.

A detector is a calibrated probe of every layer, with a distance from the prompts it was fitted on. scikit-learn is
imported by what fits detectors: reading saved ones does not need it.

Shapes: N prompts, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from mnemoscope.interventions import Artefact, Gate, Toward
from mnemoscope.models import Site, blocks_of, site_width
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import DetectorFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SURE = 0.75  # probability from which on a layer counts as sure
LIKE = 0.99  # share of the tune prompts that count as like those of the fit split
LEAST = 8  # prompts of each behaviour that a detector is fitted on, and calibrated on


@dataclass(frozen=True)
class Reading:
    """A detector's estimates for N prompts; ``layer`` is the one whose probability is the verdict.

    Attributes:
        p_memorized_by_layer: float64 (N, L).
        p_conflict: float64 (N,), probability that memory and the rule disagree; NaN where the fit had no prompts
            without a conflict.
        distance: float64 (N,), from the prompts of the fit; up to 1 a prompt counts as like them.
        prompts: what was read, where that is known.
    """

    layer: int
    p_memorized_by_layer: np.ndarray
    p_conflict: np.ndarray
    distance: np.ndarray
    prompts: Sequence[str] = field(default=(), kw_only=True)

    @property
    def p_memorized(self) -> np.ndarray:
        """The verdict, float64 (N,)."""
        return self.p_memorized_by_layer[:, self.layer]

    @property
    def unlike(self) -> np.ndarray:
        """Whether a prompt is unlike those of the fit, bool (N,)."""
        return self.distance > 1

    @property
    def readable_from(self) -> list[int | None]:
        """The first layer such that every layer from it to the verdict's is sure of the verdict; None without one."""
        p_NL = self.p_memorized_by_layer[:, : self.layer + 1]
        sure_NL = np.where(p_NL[:, -1:] >= 0.5, p_NL, 1 - p_NL) >= SURE
        layers_N = np.logical_and.accumulate(sure_NL[:, ::-1], axis=1).sum(1)  # so many layers in a row are sure
        return [self.layer + 1 - int(layers) if layers else None for layers in layers_N]

    def acts(self, toward: Toward, threshold: float) -> np.ndarray:
        """Whether a gate that steers to ``toward`` acts, bool (N,); see ``held``."""
        return self.held(toward, threshold) == ""

    def held(self, toward: Toward, threshold: float) -> np.ndarray:
        """Why a gate that steers to ``toward`` does not act on a prompt, text (N,); "" where it does.

        It does where the other behaviour has at least this probability, memory and the rule disagree, and the prompt is
        like those of the fit. InputError for a threshold that is no probability.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"gate: {threshold} is not a probability, in 0 .. 1")
        expected = self.p_memorized if Toward.of(toward) == "generalized" else 1 - self.p_memorized
        held = np.where(expected >= threshold, "", f"the other behaviour is less probable than {threshold:g}")
        held = np.where(self.p_conflict < 0.5, "memory and prompt seem to agree", held)
        return np.where(self.unlike, "it is unlike the prompts of the fit", held)

    def __str__(self) -> str:
        """A table of prompts."""
        lines = [f"P(memorized)  sure from layer (of {self.layer})  P(conflict)  distance  prompt"]
        rows = zip(self.p_memorized, self.readable_from, self.p_conflict, self.distance, strict=True)
        for n, (p, sure, conflict, distance) in enumerate(rows):
            asked = repr(self.prompts[n]) if self.prompts else f"number {n}"
            unlike = " (unlike those of the fit: ignore this)" if distance > 1 else ""
            layer = "-" if sure is None else sure
            lines.append(f"{p:12.2f}  {layer:>24}  {conflict:11.2f}  {distance:8.2f}  {asked}{unlike}")
        if np.isnan(self.p_conflict).any():
            lines.append("P(conflict) is nan: the fit had too few prompts without a conflict")
        return "\n".join(lines)


@dataclass(frozen=True)
class Detector(Artefact):
    """Calibrated probes.

    Attributes:
        site, layer: where states are read; the layer whose probability is the verdict.
        weights_LD, bias_L: ``P(memorized) = sigmoid(states @ weights + bias)``, float64.
        conflict_D, conflict_bias: the same for P(conflict) at ``layer``; NaN where the fit had no prompts for it.
        mean_D, whitening_DD: the distance is ``|(state - mean) @ whitening|``, 1 at the edge of the fit's prompts.
    """

    site: Site
    layer: int
    weights_LD: np.ndarray = field(repr=False)
    bias_L: np.ndarray = field(repr=False)
    conflict_D: np.ndarray = field(repr=False)
    conflict_bias: float
    mean_D: np.ndarray = field(repr=False)
    whitening_DD: np.ndarray = field(repr=False)

    WHAT: ClassVar[str] = "detector"
    STORED: ClassVar[tuple[str, ...]] = ("weights_LD", "bias_L", "conflict_D", "mean_D", "whitening_DD")
    DTYPE: ClassVar[torch.dtype] = torch.float64
    FACTS: ClassVar[Any] = DetectorFacts

    def __post_init__(self) -> None:
        layers, neurons = (*self.weights_LD.shape, 0, 0)[:2]
        shapes = {"weights_LD": (layers, neurons), "bias_L": (layers,), "conflict_D": (neurons,)}
        shapes |= {"mean_D": (neurons,), "whitening_DD": (neurons, neurons)}
        for name, shape in shapes.items():
            stored = getattr(self, name)
            # Without prompts of both kinds there is no P(conflict): all of it is NaN.
            undefined = name == "conflict_D" and math.isnan(self.conflict_bias)
            known = np.isnan(stored).all() if undefined else np.isfinite(stored).all()
            if stored.shape != shape or not stored.size or not known:
                found = f"{name} has shape {stored.shape} or a value that is not finite"
                raise InputError(f"detector: {found}; shape {shape} is wanted")
        if not 0 <= self.layer < layers:
            raise InputError(f"detector: layer {self.layer} is not in 0 .. {layers - 1}")

    @property
    def as_good_as_the_input(self) -> tuple[float, float] | None:
        """Areas under the ROC curve, of the detector and of the prompts' tokens alone, where it does not surely rank
        test prompts better; None where it does, or where its card does not say.
        """
        auroc = (self.card.auroc if self.card else None) or {}
        beside, least = auroc.get("input_only"), auroc.get("low", math.nan)
        return None if beside is None or math.isnan(beside) or least > beside else (auroc["estimate"], beside)

    def read(self, states_NLD: np.ndarray) -> Reading:
        """Read states at the decision position (N, L, D)."""
        # Layer by layer, to save memory: all states in double precision would be many.
        logits = [states_NLD[:, n].astype(np.float64) @ weights_D for n, weights_D in enumerate(self.weights_LD)]
        p_NL = _sigmoid(np.stack(logits, axis=1) + self.bias_L)
        return replace(self.read_verdict(states_NLD[:, self.layer]), p_memorized_by_layer=p_NL)

    def read_verdict(self, states_ND: np.ndarray) -> Reading:
        """Read states of the verdict's layer alone, (N, D); P(memorized) of the other layers is NaN."""
        here_ND = states_ND.astype(np.float64)
        p_NL = np.full((len(here_ND), len(self.weights_LD)), math.nan)
        p_NL[:, self.layer] = _sigmoid(here_ND @ self.weights_LD[self.layer] + self.bias_L[self.layer])
        distance_N = np.linalg.norm((here_ND - self.mean_D) @ self.whitening_DD, axis=1)
        return Reading(self.layer, p_NL, _sigmoid(here_ND @ self.conflict_D + self.conflict_bias), distance_N)

    def gate(self, toward: Toward, threshold: float) -> Gate:
        """A gate for ``SteeringVector.apply`` that steers to ``toward`` where ``Reading.acts`` says so."""

        def acts(states_ND: Tensor) -> Tensor:
            acts_N = self.read_verdict(states_ND.float().cpu().numpy()).acts(toward, threshold)
            return torch.from_numpy(acts_N).to(states_ND.device)

        Reading(0, np.ones((1, 1)), np.ones(1), np.ones(1)).acts(toward, threshold)  # a wrong threshold raises here
        return Gate(self.site, self.layer, acts)

    def check_shape(self, model: PreTrainedModel) -> None:
        """Raises InputError where the model has other layers or another width."""
        found = len(blocks_of(model)), site_width(model, 0, self.site)
        if self.weights_LD.shape != found:
            raise InputError(f"detector: it reads {self.weights_LD.shape} layers and neurons, this model has {found}")

    @classmethod
    def with_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """Build a detector from stored fields."""
        bias = facts["conflict_bias"]
        return super().with_tensors(tensors, facts | {"conflict_bias": math.nan if bias is None else bias})


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    """Without overflow, and without scipy, which reading a saved detector must not import."""
    return 0.5 * (1.0 + np.tanh(0.5 * logit))


@dataclass(frozen=True)
class Observed:
    """Prompts and their labels; prompts that were answered neither way are dropped before."""

    states_NLD: np.ndarray  # at the decision position
    followed_N: np.ndarray  # ``memorized`` or ``generalized`` for conflicts; ``neither`` without a conflict

    def conflicts(self) -> tuple[np.ndarray, np.ndarray]:
        """States (N, L, D) of the conflicts, and whether each was answered generalized, int64 (N,)."""
        kept_N = self.followed_N != "neither"
        return self.states_NLD[kept_N], (self.followed_N[kept_N] == "generalized").astype(np.int64)


def fit_detectors(
    fit: Observed, tune: Observed, site: Site = "block", below: int | None = None
) -> tuple[Detector, Detector | None]:
    """Fit the detector of the best layer, and the one of the best layer up to ``below``, for gates in the same pass.

    Probes are fitted on the fit split; regularization, calibration and layer are chosen on the tune split, the layer by
    the log loss of calibrated probabilities. Without ``below``, or with a negative one, there is no second detector.
    Raises InputError where a split has too few prompts of a behaviour.
    """
    (fit_NLD, fit_N), (tune_NLD, tune_N) = fit.conflicts(), tune.conflicts()
    for split, labels_N in (("fit", fit_N), ("tune", tune_N)):
        for name, count in (("generalized", int(labels_N.sum())), ("memorized", int((1 - labels_N).sum()))):
            if count < LEAST:
                raise InputError(f"{split}: {count} prompts were answered {name}; at least {LEAST} are needed")
    weights_LD, bias_L, losses = _probes((fit_NLD, fit_N), (tune_NLD, tune_N), 1 - tune_N)

    def of(layer: int) -> Detector:
        like = likeness(fit.states_NLD[:, layer], tune.states_NLD[:, layer])
        return Detector(site, layer, weights_LD, bias_L, *_conflict_probe(fit, tune, layer), *like)

    best = of(int(np.argmin(losses)))
    if below is None or below < 0:
        return best, None
    lower = int(np.argmin(losses[: below + 1]))
    return best, best if lower == best.layer else of(lower)


def _probes(
    fit: tuple[np.ndarray, np.ndarray], tune: tuple[np.ndarray, np.ndarray], labels_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Weights and biases of each layer whose sigmoid is P(label 1) of tune states, and its log loss there.

    ``fit``, ``tune``: states (N, L, D) with the labels that probes are fitted and chosen by.
    """
    from scipy.special import expit
    from sklearn.metrics import log_loss

    from mnemoscope.statistics.probes import fit_layer_probes

    weights, biases, losses = [], [], []
    for layer, probe in enumerate(fit_layer_probes(*fit, *tune)):
        scores_N = probe.decision_function(tune[0][:, layer])
        slope, offset = _calibrated(scores_N, labels_N)
        weights.append(slope * probe.weights_D_)
        biases.append(slope * probe.bias_ + offset)
        losses.append(log_loss(labels_N, expit(slope * scores_N + offset), labels=[0, 1]))
    return np.stack(weights), np.array(biases), losses


def _calibrated(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Slope and offset with which ``sigmoid(slope * score + offset)`` is the probability of label 1.

    With Platt's targets, (P + 1) / (P + 2) for P examples of label 1 and 1 / (Q + 2) for Q of label 0: of few examples,
    plain labels make the slope far too steep (Platt 1999, "Probabilistic outputs for support vector machines").
    """
    from sklearn.linear_model import LogisticRegression

    ones = int(labels_N.sum())
    target_N = np.where(labels_N == 1, (ones + 1) / (ones + 2), 1 / (len(labels_N) - ones + 2))
    both_N1, labels = np.r_[scores_N, scores_N][:, None], np.repeat([1, 0], len(scores_N))
    model = LogisticRegression(C=1e4).fit(both_N1, labels, sample_weight=np.r_[target_N, 1 - target_N])
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def _conflict_probe(fit: Observed, tune: Observed, layer: int) -> tuple[np.ndarray, float]:
    """Weights and bias of P(conflict) at a layer; NaN without prompts of both kinds.

    Prompts of either kind count alike, those of the rarer one again and again: who meets a prompt does not know how
    many were fitted on, and of nine conflicts beside one other prompt a probe that always says conflict would be best.
    """
    parts = []
    for seen in (fit, tune):
        label_N = (seen.followed_N != "neither").astype(np.int64)
        sides = [np.flatnonzero(label_N == label) for label in (0, 1)]
        if min(map(len, sides)) < LEAST:
            return np.full(fit.states_NLD.shape[2], math.nan), math.nan
        rows_N = np.concatenate([np.resize(side_N, max(map(len, sides))) for side_N in sides])
        parts.append((seen.states_NLD[rows_N][:, [layer]], label_N[rows_N]))
    weights_LD, bias_L, _ = _probes(parts[0], parts[1], parts[1][1])
    return weights_LD[0], float(bias_L[0])


def likeness(fit_ND: np.ndarray, tune_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and whitening of a Mahalanobis distance that is at most 1 for all but one in a hundred tune states.

    The covariance is shrunk (Ledoit and Wolf 2004) in units of each neuron's spread, or a few huge neurons would
    dominate the shrinkage.
    """
    from sklearn.covariance import ledoit_wolf
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    scaled_ND = scaler.fit_transform(fit_ND.astype(np.float64))
    covariance_DD, _ = ledoit_wolf(scaled_ND)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    whitening_DD = vectors_DD / np.sqrt(np.maximum(values_D, 1e-10)) / scaler.scale_[:, None]
    whitening_DD[scaled_ND.std(axis=0) == 0] = 0.0  # neurons that are constant on fit prompts are left out
    distance_N = np.linalg.norm((tune_ND.astype(np.float64) - scaler.mean_) @ whitening_DD, axis=1)
    return scaler.mean_, whitening_DD / max(float(np.quantile(distance_N, LIKE)), 1e-12)
