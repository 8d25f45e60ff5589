"""From pairs to steering vectors: one small function per method and per control, and the choice between settings.

Shapes: L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from mnemoscope.behaviour import Asking, Batch, Scores, log_probabilities, score
from mnemoscope.contrast import Contrast
from mnemoscope.models import Site, blocks_of
from mnemoscope.steering import SteeringVector, Toward, shifted

TOWARD: dict[str, Toward] = {"to_generalized": "generalized", "to_memorized": "memorized"}
SOURCE: dict[str, Toward] = {"to_generalized": "memorized", "to_memorized": "generalized"}


@dataclass(frozen=True)
class Sources:
    """What directions are made from; all of it from the fit split.

    Attributes:
        contrast: of the fit pairs.
        gradient_LD: float64, mean gradient of the decision margin by each layer's state (``margin_gradient``).
    """

    contrast: Contrast
    gradient_LD: np.ndarray


Method = Callable[[Sources, Toward, float, float], SteeringVector]
Control = Callable[[SteeringVector, tuple[int, int], np.random.Generator], SteeringVector]


def nmd(sources: Sources, toward: Toward, top: float, strength: float) -> SteeringVector:
    """The paper's shift: ``strength`` (its alpha) times NMD on the top neurons by |rho|."""
    return SteeringVector.from_contrast(sources.contrast, toward=toward, top=top, strength=strength)


def nmd_relative(sources: Sources, toward: Toward, top: float, strength: float) -> SteeringVector:
    """NMD on the same neurons, each layer's shift scaled to ``strength`` times the norm of that layer's states."""
    return SteeringVector.from_contrast(sources.contrast, toward=toward, top=top, strength=strength, relative=True)


def gradient(sources: Sources, toward: Toward, top: float, strength: float) -> SteeringVector:
    """The mean gradient of the decision margin, on the top neurons of all layers by its size.

    NMD says where the behaviours differ, the gradient where a change acts. Layers are measured in units of the norm
    of their states: with ``u_l = |h_l| g_l`` over all layers the shift is ``strength * |h_l| * u_l / ||u||``, the
    steepest ascent of the margin for that total relative norm. Most of it goes where the margin is most sensitive.
    """
    norm_L1 = sources.contrast.state_norm_L[:, None]
    steep_LD = norm_L1 * sources.gradient_LD
    kept = math.ceil(top * steep_LD.size)
    steep_LD = np.where(np.abs(steep_LD) >= np.sort(np.abs(steep_LD), axis=None)[-kept], steep_LD, 0.0)
    shift_LD = strength * norm_L1 * steep_LD / np.linalg.norm(steep_LD)
    site: Site = sources.contrast.site  # type: ignore[assignment]
    vector = SteeringVector(toward, {}, site, method="gradient", top=top, strength=strength)
    return vector.with_dense(shift_LD if toward == "generalized" else -shift_LD)


def margin_gradient(asking: Asking, batches: Sequence[Batch], site: Site, neurons: int) -> np.ndarray:
    """Mean over prepared conflicts of d(decision margin) / d(state from the decision position on), per layer.

    Args:
        batches: prepared conflicts; cached prefixes make it cheap.
        neurons: width D of the site.

    Returns:
        float64 (L, D), in nats per unit of the state.
    """
    layers = len(blocks_of(asking.model))
    total_LD = np.zeros((layers, neurons))
    for batch in batches:
        shifts = {i: torch.zeros(neurons, device=asking.model.device, requires_grad=True) for i in range(layers)}
        with shifted(asking.model, shifts, site, "decision"):
            logp_N2 = log_probabilities(asking, batch)
            margin = (logp_N2[:, 1] - logp_N2[:, 0]).sum()
        total_LD += np.stack([g.double().cpu().numpy() for g in torch.autograd.grad(margin, list(shifts.values()))])
    return total_LD / sum(len(batch.examples_N) for batch in batches)


def random_neurons(vector: SteeringVector, shape_LD: tuple[int, int], rng: np.random.Generator) -> SteeringVector:
    """As many neurons in each layer, drawn at random, with the same absolute shifts in random order and signs.

    Drawing within a layer keeps each layer's norm, which drawing over all layers would not.
    """
    shift_LD = vector.dense(*shape_LD)
    drawn_LD = np.zeros_like(shift_LD)
    for layer in vector.layers:
        values = np.abs(shift_LD[layer][shift_LD[layer] != 0])
        neurons = rng.permutation(shape_LD[1])[: len(values)]
        drawn_LD[layer, neurons] = rng.permutation(values) * rng.choice([-1.0, 1.0], size=len(values))
    return vector.with_dense(drawn_LD)


def gaussian(vector: SteeringVector, shape_LD: tuple[int, int], rng: np.random.Generator) -> SteeringVector:
    """A direction drawn from a normal distribution over all neurons, with the same norm in each layer."""
    shift_LD = vector.dense(*shape_LD)
    drawn_LD = rng.standard_normal(shape_LD)
    drawn_LD *= np.linalg.norm(shift_LD, axis=1, keepdims=True) / np.linalg.norm(drawn_LD, axis=1, keepdims=True)
    return vector.with_dense(drawn_LD)


METHODS: dict[str, Method] = {"nmd": nmd, "nmd-relative": nmd_relative, "gradient": gradient}
CONTROLS: dict[str, Control] = {"random_neurons": random_neurons, "gaussian": gaussian}


def control_exists(name: str, vector: SteeringVector, shape_LD: tuple[int, int]) -> bool:
    """Whether the control differs from what it controls: with every neuron chosen there are no others to draw."""
    return name != "random_neurons" or int((vector.dense(*shape_LD) != 0).sum()) < math.prod(shape_LD)


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell of a sweep.

    Attributes:
        direction: ``to_generalized`` or ``to_memorized``.
        method: a key of ``METHODS``.
        top: share of all neurons that are shifted, in (0, 1].
        strength: alpha for ``nmd``, share of the state's norm for the others.
    """

    direction: str
    method: str
    top: float
    strength: float

    def vector(self, sources: Sources) -> SteeringVector:
        """The steering vector of this setting."""
        return METHODS[self.method](sources, TOWARD[self.direction], self.top, self.strength)


def steered(asking: Asking, batches: Sequence[Batch], vector: SteeringVector, margins: bool = True) -> Scores:
    """Score prepared examples under a vector; with cached prefixes only the decision token and the answers are read."""
    return score(asking, batches, margins=margins, applied=partial(vector.apply, asking.model))


def shift_rate(scores: Scores, direction: str) -> float:
    """Share of the examples that now answer with the target behaviour; NaN where there is no example."""
    n = len(scores.behaviour_N)
    return float(np.mean(scores.behaviour_N == TOWARD[direction])) if n else math.nan


def control_draws(
    name: str, vector: SteeringVector, shape_LD: tuple[int, int], draws: int, seed: Sequence[int]
) -> Iterator[tuple[int, SteeringVector]]:
    """``draws`` numbered draws of a control, none where it does not exist."""
    if control_exists(name, vector, shape_LD):
        for number in range(draws):
            yield number, CONTROLS[name](vector, shape_LD, np.random.default_rng([*seed, number]))


def choose(
    asking: Asking,
    batches: Sequence[Batch],
    sources: Sources,
    rated: Sequence[tuple[Setting, float]],
    *,
    draws: int = 5,
    control_limit: float = 0.1,
    seed: Sequence[int] = (0,),
) -> tuple[Setting, float]:
    """The setting whose shift exceeds that of its worst control most, on the tune split.

    Pairs sit near the decision boundary, so any push flips some of them: what counts is the vector minus its control,
    and small norms are the honest ones. Settings are held against their controls from the highest shift rate down; only
    those whose worst control turns at most ``control_limit`` are taken, if there is one.

    Args:
        batches: prepared tune pairs of one direction.
        rated: settings of one direction with their shift rates on these pairs; at least one.
        draws: draws of each control.

    Returns:
        The setting and its margin over the worst control.
    """
    best: tuple[bool, float, Setting] | None = None
    for setting, rate in sorted(rated, key=lambda pair: (-pair[1], pair[0].strength, pair[0].top)):
        if best and (best[:2] >= (True, rate)):
            break  # not even without any effect of its control could a lower rate be better
        worst = _worst_control(asking, batches, sources, setting, draws, seed)
        candidate = (worst <= control_limit, rate - worst, setting)
        if best is None or candidate[:2] > best[:2]:
            best = candidate
    assert best is not None, "a sweep has at least one setting"
    return best[2], best[1]


def _worst_control(
    asking: Asking, batches: Sequence[Batch], sources: Sources, setting: Setting, draws: int, seed: Sequence[int]
) -> float:
    """The highest mean shift rate of a control."""
    vector = setting.vector(sources)
    means = []
    for name in CONTROLS:
        drawn = control_draws(name, vector, sources.gradient_LD.shape, draws, seed)
        rates = [shift_rate(steered(asking, batches, v, margins=False), setting.direction) for _, v in drawn]
        means += [float(np.mean(rates))] if rates else []
    return max(means)
