"""The methods that find a direction, the steering vectors made of them, and scores of examples under a vector.

Neurons are chosen and the shift is scaled afterwards (``Directions.vectors``), so that all methods are compared at
equal norm.

Shapes: P pairs, N examples, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from sklearn.covariance import ledoit_wolf

from mnemoscope.behaviour import Asking, Batch, Scores, by_length, score, without_prefix
from mnemoscope.interventions.ascent import learned_together
from mnemoscope.interventions.low_rank import low_rank_learned, unpacked
from mnemoscope.interventions.sources import ANSWERED, LOW_RANK, Fit, Labels, Setting, Sources, learned_beside
from mnemoscope.interventions.vector import SteeringVector
from mnemoscope.models import Precision, in_precision, quick_precision
from mnemoscope.probes import LayerProbe
from mnemoscope.statistics import top_by_magnitude


def nmd(sources: Sources, labels: Labels) -> np.ndarray:
    """The neuron-wise mean difference (arXiv 2412.18497)."""
    return sources.moments(labels).nmd_LD


def standardized_nmd(sources: Sources, labels: Labels) -> np.ndarray:
    """NMD in units of each neuron's standard deviation (2 rho, up to scale), so that huge neurons do not dominate."""
    return np.nan_to_num(sources.moments(labels).rho_LD)


def gradient(sources: Sources, labels: Labels) -> np.ndarray:
    """The direction in which the decision margin rises for a given strength, a mean over examples.

    With shifts in units ``s`` of strength, ``u = s g`` is an example's steepest direction, and ``s u`` the shift. Each
    example counts as much as another in a layer, at the layer's mean norm: the steepest few would decide otherwise, and
    a shuffle of labels would point along them.
    """
    scale_LD = sources.scale_LD * sources.unit_L[:, None]
    total_LD, norms_L, count = np.zeros(sources.shape_LD), np.zeros(len(scale_LD)), 0
    for stream, batches in enumerate(sources.margin_gradients):
        for number, gradients_NLD in enumerate(batches):
            steepest_NLD = gradients_NLD * scale_LD
            norm_NL1 = np.linalg.norm(steepest_NLD, axis=2, keepdims=True)
            steepest_NLD /= np.where(norm_NL1 > 0, norm_NL1, 1.0)
            total_LD += np.tensordot(labels.signs(len(steepest_NLD), stream, number), steepest_NLD, 1)
            norms_L += norm_NL1.sum(axis=(0, 2))
            count += len(steepest_NLD)
    return scale_LD * total_LD * norms_L[:, None] / count**2


def logistic(sources: Sources, labels: Labels) -> np.ndarray:
    """Weights of a logistic regression on each layer's states, every layer with the same strength."""
    states_P2LD = sources.states_P2LD.astype(np.float64)
    signs_P = labels.signs(len(states_P2LD))
    labels_N = (np.stack([signs_P, -signs_P], axis=1).ravel() > 0).astype(np.int64)
    states_NLD = states_P2LD.reshape(-1, *sources.shape_LD)
    probes = [LayerProbe(0.01).fit(states_NLD[:, layer], labels_N) for layer in range(sources.shape_LD[0])]
    return sources.evenly(np.stack([probe.weights_D_ for probe in probes]))


def whitened(sources: Sources, labels: Labels) -> np.ndarray:
    """Linear discriminant of the pair differences: the inverse of their shrunk covariance times NMD, layer by layer.

    Shrinkage: Ledoit and Wolf (2004), "A well-conditioned estimator".
    """
    rows, differences_PLD = [], sources.differences_PLD(labels)
    for layer, nmd_D in enumerate(nmd(sources, labels)):
        covariance_DD, _ = ledoit_wolf(differences_PLD[:, layer])
        rows.append(np.linalg.lstsq(covariance_DD, nmd_D, rcond=1e-10)[0])
    return sources.evenly(np.stack(rows))


def principal_component(sources: Sources, labels: Labels) -> np.ndarray:
    """First principal component of the pair differences, about zero, oriented so that most of them point along it.

    After Zou et al. (2023), "Representation engineering"; the labels decide its orientation alone.
    """
    rows = []
    for differences_PD in sources.differences_PLD(labels).swapaxes(0, 1):
        component_D = np.linalg.svd(differences_PD, full_matrices=False)[2][0]
        along = (differences_PD @ component_D > 0).mean() - 0.5
        rows.append(component_D if along >= 0 else -component_D)
    return sources.evenly(np.stack(rows))


# Pure functions (sources, labels) -> direction towards ``generalized``, float64 (L, D), whose negative steers back.
METHODS: dict[str, Callable[[Sources, Labels], np.ndarray]] = {
    "nmd": nmd,
    "standardized-nmd": standardized_nmd,
    "gradient": gradient,
    "logistic": logistic,
    "whitened": whitened,
    "pca": principal_component,
}
RANKED_BY_RHO = ("nmd", "standardized-nmd")  # the paper's choice of neurons; the others keep their largest shifts


class Directions:
    """The directions of one site, each computed once, and the steering vectors that settings make of them.

    ``shifts``: cache of computed directions, float64 (L, D) each, which several sites may share.
    """

    def __init__(self, sources: Sources, shifts: dict[Fit, np.ndarray] | None = None) -> None:
        self.sources = sources
        self._shifts: dict[Fit, np.ndarray] = {} if shifts is None else shifts
        self._rho: dict[Labels, np.ndarray] = {}

    def rho(self, labels: Labels = ANSWERED) -> np.ndarray:
        """Correlation of each neuron with the label, float64 (L, D); NaN for a constant one."""
        if labels not in self._rho:
            self._rho[labels] = self.sources.moments(labels).rho_LD
        return self._rho[labels]

    def shifts(self, setting: Setting, several: Sequence[Labels] = (ANSWERED,)) -> list[np.ndarray]:
        """Direction of the setting's method under each labels, float64 (L, D); learned ones are fitted together.

        Of low-rank shifts they are packed (see ``low_rank.packed``).
        """
        fixed, sign = setting.same_direction()
        found = self.fitted([(fixed, labels) for labels in several])
        return [sign * found[fixed, labels] for labels in several]

    def fitted(self, fits: Sequence[Fit]) -> dict[Fit, np.ndarray]:
        """The directions of fits of one method and place, float64 (L, D); learned ones are fitted together.

        Those of one learned shift may come with others of its place (see ``learned_beside``).
        """
        if not all(fit in self._shifts for fit in fits):
            method = fits[0][0].method
            fits = learned_beside(fits[0], self.sources.strengths) if len(fits) == 1 else fits
            if method == "learned":
                found = learned_together(self.sources, fits)
            elif method == LOW_RANK:
                found = [low_rank_learned(self.sources, *fit) for fit in fits]
            else:
                found = [METHODS[method](self.sources, labels) for _, labels in fits]
            self._shifts.update(zip(fits, found, strict=True))
        return {fit: self._shifts[fit] for fit in fits}

    def vectors(self, setting: Setting, several: Sequence[Labels]) -> list[SteeringVector]:
        """A setting's steering vector under each labels.

        Neurons are chosen over all of the setting's layers at once: by |rho| for NMD, as in the paper, by their shift
        in units of strength for the other methods. The rest is scaled to the strength.
        """
        facts = {name: getattr(setting, name) for name in ("site", "positions", "method", "top", "strength")}
        facts["unit"] = self.sources.unit
        blank, found = SteeringVector(setting.toward, {}, **facts), []
        if setting.method == LOW_RANK:
            edits = map(unpacked, self.shifts(setting, several))
            return [replace(blank, edits=edit) * setting.strength for edit in edits]
        for labels, shift_LD in zip(several, self.shifts(setting, several), strict=True):
            kept_LD = self._top(setting, setting.top, labels, shift_LD) & (self.sources.scale_LD > 0)
            norm = np.linalg.norm(self.sources.relative(shift_LD)[kept_LD])
            scale = setting.strength / norm if norm > 0 else 0.0
            found.append(blank.with_dense(np.where(kept_LD, shift_LD, 0.0) * scale))
        return found

    def vector(self, setting: Setting, labels: Labels = ANSWERED) -> SteeringVector:
        """A setting's steering vector."""
        return self.vectors(setting, [labels])[0]

    def dense(self, setting: Setting) -> np.ndarray:
        """The shifts of a setting's vector, float32 (L, D)."""
        return self.vector(setting).dense(*self.sources.shape_LD)

    def top_neurons(self, setting: Setting, top: float) -> np.ndarray:
        """The share ``top`` of the neurons in a setting's layers that its method ranks highest; bool (L, D).

        A low-rank shift ranks them by the norm of what it writes.
        """
        (shift_LD,) = self.shifts(setting)
        if setting.method == LOW_RANK:
            shift_LD = np.linalg.norm(shift_LD[:, shift_LD.shape[1] // 2 : -1], axis=1)
        return self._top(setting, top, ANSWERED, shift_LD)

    def alpha(self, setting: Setting) -> float:
        """The paper's alpha: norm of a vector of method ``nmd`` over that of NMD; NaN for the other methods."""
        if setting.method != "nmd":
            return math.nan
        shift_LD, (nmd_LD,) = self.dense(setting), self.shifts(setting)
        return float(np.linalg.norm(shift_LD) / np.linalg.norm(nmd_LD[shift_LD != 0]))

    def _top(self, setting: Setting, top: float, labels: Labels, shift_LD: np.ndarray) -> np.ndarray:
        rank_LD = self.rho(labels) if setting.method in RANKED_BY_RHO else self.sources.relative(shift_LD)
        kept_LD, layers = np.zeros(rank_LD.shape, bool), list(setting.layers)
        kept_LD[layers] = top_by_magnitude(rank_LD[layers], top)
        return kept_LD


def steered(
    asking: Asking, batches: Sequence[Batch], vector: SteeringVector, margins: bool = True, roughly: bool = False
) -> Scores:
    """Score prepared examples under a vector, from cached prefixes unless the vector shifts all tokens.

    ``roughly``: low-rank shifts in bfloat16 where that is quicker, as they are learned, for choices between settings.
    """
    precision: Precision = "float32"
    if vector.low_rank and roughly:
        precision = quick_precision(asking.model)
    if vector.positions == "all":
        batches = [without_prefix(batch) for batch in batches]
        if precision == "float32":  # else each part would cast all weights again
            batches = [part for batch in batches for part in by_length(batch)]
    with in_precision(asking.model, precision):
        return score(asking, batches, margins=margins, applied=partial(vector.apply, asking.model))


def share_of(scores: Scores, behaviour: str) -> float:
    """Share of the examples that show a behaviour; NaN where there is no example."""
    return float(np.mean(scores.behaviour_N == behaviour)) if len(scores.behaviour_N) else math.nan
