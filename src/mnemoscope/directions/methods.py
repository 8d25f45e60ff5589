"""The methods: from sources to a direction, each a small function with one signature.

A method returns a shift per layer, float64 (L, D), towards the behaviour asked for. Only its shape counts: the setting
chooses neurons and scales it, so that all methods are compared at equal norm. A layer's unit is the norm of its states.

Shapes: P pairs, N examples, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf

from mnemoscope.behaviour import Asking, Batch, log_probabilities
from mnemoscope.directions.learned import Budget, learn, learn_together
from mnemoscope.directions.sources import Sources
from mnemoscope.models import Site
from mnemoscope.probes import LayerProbe
from mnemoscope.steering import Positions, Toward, shifted


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a direction is for: most methods heed only ``toward``, a learned one is fitted to all of it."""

    toward: Toward
    layers: tuple[int, ...]
    strength: float
    positions: Positions = "decision"


Method = Callable[[Sources, Wanted], np.ndarray]


def nmd(sources: Sources) -> np.ndarray:
    """The paper's: the neuron-wise mean difference, layers weighed by its size (arXiv 2412.18497)."""
    return sources.nmd_LD


def standardized_nmd(sources: Sources) -> np.ndarray:
    """NMD in units of each neuron's standard deviation, so that neurons of huge activation do not decide alone."""
    return sources.nmd_LD / sources.sd_LD


def gradient(sources: Sources) -> np.ndarray:
    """The mean gradient of the decision margin: the steepest ascent for a given relative norm.

    NMD says where the behaviours differ, the gradient where a change acts. With layers in units of their states' norm,
    ``u = |h| g`` is the steepest direction, and ``|h| u`` the shift.
    """
    total_LD, count = np.zeros(sources.shape_LD), 0
    for (stream, number), gradients_NLD in _margin_gradients(sources).items():
        total_LD += np.tensordot(sources.signs(len(gradients_NLD), stream, number), gradients_NLD, 1)
        count += len(gradients_NLD)
    return sources.norm_L[:, None] ** 2 * total_LD / count


def logistic(sources: Sources) -> np.ndarray:
    """Weights of a logistic regression on each layer's states, every layer with the same relative norm."""
    states_P2LD = sources.states_P2LD.astype(np.float64)
    signs_P = sources.signs(len(states_P2LD))
    labels_N = (np.stack([signs_P, -signs_P], axis=1).ravel() > 0).astype(np.int64)
    states_NLD = states_P2LD.reshape(-1, *sources.shape_LD)
    probes = [LayerProbe(0.01).fit(states_NLD[:, layer], labels_N) for layer in range(sources.shape_LD[0])]
    return _equal_layers(np.stack([probe.weights_D_ for probe in probes]), sources)


def whitened(sources: Sources) -> np.ndarray:
    """Linear discriminant of the pair differences: the inverse of their shrunk covariance times NMD, layer by layer.

    Pairs are selected for a flip, so their mean difference is largest where rephrasing moves states most; dividing by
    the covariance undoes that. Shrinkage: Ledoit and Wolf (2004), "A well-conditioned estimator".
    """
    rows = []
    for layer, nmd_D in enumerate(sources.nmd_LD):
        covariance_DD, _ = ledoit_wolf(sources.differences_PLD[:, layer])
        rows.append(np.linalg.lstsq(covariance_DD, nmd_D, rcond=1e-10)[0])
    return _equal_layers(np.stack(rows), sources)


def principal_component(sources: Sources) -> np.ndarray:
    """First principal component of the pair differences, about zero, turned so that most of them point along it.

    The component itself has no sign and does not know the labels; only its orientation does (Zou et al. 2023,
    "Representation engineering").
    """
    rows = []
    for layer in range(sources.shape_LD[0]):
        differences_PD = sources.differences_PLD[:, layer]
        component_D = np.linalg.svd(differences_PD, full_matrices=False)[2][0]
        along = (differences_PD @ component_D > 0).mean() - 0.5
        rows.append(component_D if along >= 0 else -component_D)
    return _equal_layers(np.stack(rows), sources)


def learned(sources: Sources, wanted: Wanted) -> np.ndarray:
    """Optimized on the fit split for the log probability of the wanted answer, under the setting's norm budget."""
    return learn(sources, _budget(sources, wanted))


def refit(several: Sequence[Sources], method: str, wanted: Wanted) -> None:
    """Compute a method for sources that differ in their shuffle only, where that is cheaper together than one by one.

    Each keeps what was found.
    """
    if method == "learned" and not all(_budget(sources, wanted) in sources.found for sources in several):
        learn_together(several, _budget(several[0], wanted))


def _budget(sources: Sources, wanted: Wanted) -> Budget:
    lists = sources.lists
    return Budget(
        wanted.toward, wanted.layers, wanted.strength, lists.steps, lists.kept_weight, positions=wanted.positions
    )


def two_way(direction: Callable[[Sources], np.ndarray]) -> Method:
    """A method from a direction towards ``generalized`` whose negative turns to ``memorized``; computed once."""

    def method(sources: Sources, wanted: Wanted) -> np.ndarray:
        if direction.__name__ not in sources.found:
            sources.found[direction.__name__] = direction(sources)
        found_LD = sources.found[direction.__name__]
        return found_LD if wanted.toward == "generalized" else -found_LD

    return method


def _margin_gradients(sources: Sources) -> dict[tuple[int, int], np.ndarray]:
    """``margin_gradients`` of every batch of pairs, by list and number; a shuffle only changes their signs."""
    key = "margin_gradients"
    if key not in sources.unlabelled:
        lists = (sources.lists.pairs["generalized"], sources.lists.pairs["memorized"])
        sources.unlabelled[key] = {
            (stream, number): margin_gradients(sources.lists.asking, batch, sources.site, sources.shape_LD)
            for stream, batches in enumerate(lists)
            for number, batch in enumerate(batches)
        }
    return sources.unlabelled[key]


def margin_gradients(asking: Asking, batch: Batch, site: Site, shape_LD: tuple[int, int]) -> np.ndarray:
    """d(decision margin) / d(state from the decision position on) of each conflict, float32 (N, L, D).

    In nats per unit of the state; the model's own parameters get no gradient.
    """
    layers, neurons = shape_LD
    shifts = {layer: torch.zeros(len(batch.examples_N), neurons, requires_grad=True) for layer in range(layers)}
    with shifted(asking.model, shifts, site, "decision"):
        logp_N2 = log_probabilities(asking, batch)
    gradients = torch.autograd.grad((logp_N2[:, 1] - logp_N2[:, 0]).sum(), list(shifts.values()))
    return torch.stack([gradient_ND.float().cpu() for gradient_ND in gradients], dim=1).numpy()


def _equal_layers(direction_LD: np.ndarray, sources: Sources) -> np.ndarray:
    """Each layer's direction with the norm of its states, so that all have the same relative norm."""
    found_L1 = np.linalg.norm(direction_LD, axis=1, keepdims=True)
    unit_LD = np.divide(direction_LD, found_L1, out=np.zeros_like(direction_LD), where=found_L1 > 0)
    return unit_LD * sources.norm_L[:, None]


METHODS: dict[str, Method] = {
    "nmd": two_way(nmd),
    "standardized-nmd": two_way(standardized_nmd),
    "gradient": two_way(gradient),
    "logistic": two_way(logistic),
    "whitened": two_way(whitened),
    "pca": two_way(principal_component),
    "learned": learned,
}
RANKED_BY_RHO = ("nmd", "standardized-nmd")  # the paper's choice of neurons; the others keep their largest shifts
