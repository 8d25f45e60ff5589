"""Detectors: calibrated probes of every layer, with a distance from the prompts they were fitted on.

Shapes: N prompts, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from mnemoscope.errors import InputError
from mnemoscope.models import Site, blocks_of, site_width
from mnemoscope.steering import Artefact, Gate, Toward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SURE = 0.75  # probability from which on a layer counts as sure


@dataclass(frozen=True)
class Reading:
    """A detector's estimates for N prompts.

    Attributes:
        layer: the one whose probability is the verdict.
        p_memorized_by_layer: float64 (N, L).
        p_conflict: float64 (N,), probability that memory and the rule disagree; NaN where the fit had no prompts
            without a conflict.
        distance: float64 (N,), from the prompts of the fit; up to 1 a prompt counts as like them.
    """

    layer: int
    p_memorized_by_layer: np.ndarray
    p_conflict: np.ndarray
    distance: np.ndarray

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
        """Whether a gate that steers to ``toward`` acts, bool (N,).

        It does where the other behaviour has at least this probability, memory and the rule disagree, and the prompt is
        like those of the fit. Raises InputError where the threshold is no probability.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"gate: {threshold} is not a probability, in 0 .. 1")
        expected = self.p_memorized if toward == "generalized" else 1 - self.p_memorized
        conflict = np.isnan(self.p_conflict) | (self.p_conflict >= 0.5)
        return (expected >= threshold) & conflict & ~self.unlike


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

    def read(self, states_NLD: np.ndarray) -> Reading:
        """Read states at the decision position (N, L, D)."""
        # Layer by layer, to save memory: all states in double precision would be many.
        logits = [states_NLD[:, n].astype(np.float64) @ weights_D for n, weights_D in enumerate(self.weights_LD)]
        p_NL = _sigmoid(np.stack(logits, axis=1) + self.bias_L)
        return Reading(self.layer, p_NL, *self._at_verdict(states_NLD[:, self.layer].astype(np.float64)))

    def read_verdict(self, states_ND: np.ndarray) -> Reading:
        """Read states of the verdict's layer alone, (N, D); P(memorized) of the other layers is NaN."""
        here_ND = states_ND.astype(np.float64)
        p_NL = np.full((len(here_ND), len(self.weights_LD)), math.nan)
        p_NL[:, self.layer] = _sigmoid(here_ND @ self.weights_LD[self.layer] + self.bias_L[self.layer])
        return Reading(self.layer, p_NL, *self._at_verdict(here_ND))

    def gate(self, toward: Toward, threshold: float) -> Gate:
        """A gate for ``SteeringVector.apply`` that steers to ``toward`` where ``Reading.acts`` says so."""

        def acts(states_ND: Tensor) -> Tensor:
            acts_N = self.read_verdict(states_ND.float().cpu().numpy()).acts(toward, threshold)
            return torch.from_numpy(acts_N).to(states_ND.device)

        Reading(0, np.ones((1, 1)), np.ones(1), np.ones(1)).acts(toward, threshold)  # a wrong threshold raises here
        return Gate(self.site, self.layer, acts)

    def _at_verdict(self, here_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P(conflict) and distance of states of the verdict's layer, (N,) each."""
        distance_N = np.linalg.norm((here_ND - self.mean_D) @ self.whitening_DD, axis=1)
        return _sigmoid(here_ND @ self.conflict_D + self.conflict_bias), distance_N

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
