"""The methods: pure functions ``(sources, setting, labels) -> direction``, float64 (L, D), towards the setting's side.

Neurons are chosen and the shift is scaled afterwards (``Directions.vectors``), so that all methods are compared at
equal norm.

Shapes: P pairs, N examples, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.covariance import ledoit_wolf

from mnemoscope.directions.learned import learned
from mnemoscope.directions.settings import Setting
from mnemoscope.directions.sources import Labels, Sources
from mnemoscope.probes import LayerProbe
from mnemoscope.steering import scaled_to

Method = Callable[[Sources, Setting, Labels], np.ndarray]


def nmd(sources: Sources, labels: Labels) -> np.ndarray:
    """The neuron-wise mean difference (arXiv 2412.18497)."""
    return sources.moments(labels).nmd_LD


def standardized_nmd(sources: Sources, labels: Labels) -> np.ndarray:
    """NMD in units of each neuron's standard deviation (2 rho, up to scale), so that huge neurons do not dominate."""
    return np.nan_to_num(sources.moments(labels).rho_LD)


def gradient(sources: Sources, labels: Labels) -> np.ndarray:
    """The steepest ascent of the decision margin for a given relative norm.

    With layers in units of their states' norm, ``u = |h| g`` is the steepest direction, and ``|h| u`` the shift.
    """
    total_LD, count = np.zeros(sources.shape_LD), 0
    for stream, batches in enumerate(sources.margin_gradients):
        for number, gradients_NLD in enumerate(batches):
            total_LD += np.tensordot(labels.signs(len(gradients_NLD), stream, number), gradients_NLD, 1)
            count += len(gradients_NLD)
    return sources.norm_L[:, None] ** 2 * total_LD / count


def logistic(sources: Sources, labels: Labels) -> np.ndarray:
    """Weights of a logistic regression on each layer's states, every layer with the same relative norm."""
    states_P2LD = sources.states_P2LD.astype(np.float64)
    signs_P = labels.signs(len(states_P2LD))
    labels_N = (np.stack([signs_P, -signs_P], axis=1).ravel() > 0).astype(np.int64)
    states_NLD = states_P2LD.reshape(-1, *sources.shape_LD)
    probes = [LayerProbe(0.01).fit(states_NLD[:, layer], labels_N) for layer in range(sources.shape_LD[0])]
    return scaled_to(np.stack([probe.weights_D_ for probe in probes]), sources.norm_L)


def whitened(sources: Sources, labels: Labels) -> np.ndarray:
    """Linear discriminant of the pair differences: the inverse of their shrunk covariance times NMD, layer by layer.

    Shrinkage: Ledoit and Wolf (2004), "A well-conditioned estimator".
    """
    rows, differences_PLD = [], sources.differences_PLD(labels)
    for layer, nmd_D in enumerate(nmd(sources, labels)):
        covariance_DD, _ = ledoit_wolf(differences_PLD[:, layer])
        rows.append(np.linalg.lstsq(covariance_DD, nmd_D, rcond=1e-10)[0])
    return scaled_to(np.stack(rows), sources.norm_L)


def principal_component(sources: Sources, labels: Labels) -> np.ndarray:
    """First principal component of the pair differences, about zero, oriented so that most of them point along it.

    After Zou et al. (2023), "Representation engineering"; the labels decide its orientation alone.
    """
    rows = []
    for differences_PD in sources.differences_PLD(labels).swapaxes(0, 1):
        component_D = np.linalg.svd(differences_PD, full_matrices=False)[2][0]
        along = (differences_PD @ component_D > 0).mean() - 0.5
        rows.append(component_D if along >= 0 else -component_D)
    return scaled_to(np.stack(rows), sources.norm_L)


def two_way(direction: Callable[[Sources, Labels], np.ndarray]) -> Method:
    """A method from a direction towards ``generalized`` whose negative steers to ``memorized``."""

    def method(sources: Sources, setting: Setting, labels: Labels) -> np.ndarray:
        found_LD = direction(sources, labels)
        return found_LD if setting.toward == "generalized" else -found_LD

    return method


TWO_WAY = {
    "nmd": nmd,
    "standardized-nmd": standardized_nmd,
    "gradient": gradient,
    "logistic": logistic,
    "whitened": whitened,
    "pca": principal_component,
}
METHODS: dict[str, Method] = {name: two_way(direction) for name, direction in TWO_WAY.items()} | {"learned": learned}
RANKED_BY_RHO = ("nmd", "standardized-nmd")  # the paper's choice of neurons; the others keep their largest shifts
