"""Settings: one cell of a sweep, the vector it means, and what that vector does to a list of examples.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mnemoscope.behaviour import Asking, Batch, Scores, score, without_prefix
from mnemoscope.directions.methods import METHODS, RANKED_BY_RHO, Wanted
from mnemoscope.directions.sources import Sources
from mnemoscope.models import Site
from mnemoscope.statistics import top_by_magnitude
from mnemoscope.steering import Positions, SteeringVector, Toward

TOWARD: dict[str, Toward] = {"to_generalized": "generalized", "to_memorized": "memorized"}
SOURCE: dict[str, Toward] = {"to_generalized": "memorized", "to_memorized": "generalized"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell of a sweep.

    Attributes:
        direction: ``to_generalized`` or ``to_memorized``.
        method: a key of ``METHODS``.
        site: where in a layer.
        layers: the layers that are shifted, 0-based.
        top: share of these layers' neurons that are shifted, in (0, 1].
        strength: total relative norm: the root of the summed squares of each layer's shift over its states' norm.
        positions: ``decision``, or ``all`` tokens; norms and differences are those at the decision position either way.
    """

    direction: str
    method: str
    site: Site
    layers: tuple[int, ...]
    top: float
    strength: float
    positions: Positions = "decision"


def vector_of(sources: Sources, setting: Setting) -> SteeringVector:
    """The steering vector of a setting.

    Neurons are chosen over all of the setting's layers at once: by |rho| for NMD, as in the paper, by the size of their
    shift in units of their layer's norm for the other methods. What is left is scaled to the setting's strength.
    """
    shift_LD = _direction(sources, setting)
    kept_LD = ranked_neurons(sources, setting, setting.top)
    norm = np.linalg.norm(_relative(shift_LD, sources)[kept_LD])
    scale = setting.strength / norm if norm > 0 else 0.0
    facts = {name: getattr(setting, name) for name in ("site", "positions", "method", "top", "strength")}
    vector = SteeringVector(TOWARD[setting.direction], {}, **facts)
    return vector.with_dense(np.where(kept_LD, shift_LD, 0.0) * scale)


def ranked_neurons(sources: Sources, setting: Setting, top: float) -> np.ndarray:
    """Where the share ``top`` of the neurons in a setting's layers is that its method ranks highest; bool (L, D)."""
    relative_LD = _relative(_direction(sources, setting), sources)
    rank_LD = sources.rho_LD if setting.method in RANKED_BY_RHO else relative_LD
    kept_LD = np.zeros(rank_LD.shape, bool)
    kept_LD[list(setting.layers)] = top_by_magnitude(rank_LD[list(setting.layers)], top)
    return kept_LD


def _relative(shift_LD: np.ndarray, sources: Sources) -> np.ndarray:
    """A shift in units of each layer's norm; 0 where a layer's states are all 0."""
    norm_L1 = sources.norm_L[:, None]
    return np.divide(shift_LD, norm_L1, out=np.zeros_like(shift_LD), where=norm_L1 > 0)


def wanted_of(setting: Setting) -> Wanted:
    """What a setting asks of its method."""
    return Wanted(TOWARD[setting.direction], setting.layers, setting.strength, setting.positions)


def _direction(sources: Sources, setting: Setting) -> np.ndarray:
    return METHODS[setting.method](sources, wanted_of(setting))


def alpha_of(sources: Sources, setting: Setting) -> float:
    """The paper's alpha: how many times NMD a vector of method ``nmd`` is; NaN for the other methods."""
    if setting.method != "nmd":
        return math.nan
    shift_LD = vector_of(sources, setting).dense(*sources.shape_LD)
    return float(np.linalg.norm(shift_LD) / np.linalg.norm(sources.nmd_LD[shift_LD != 0]))


def steered(asking: Asking, batches: Sequence[Batch], vector: SteeringVector, margins: bool = True) -> Scores:
    """Score prepared examples under a vector.

    With cached prefixes only the decision token and the answers are read, unless the vector shifts what comes before.
    """
    if vector.positions == "all":
        batches = [without_prefix(batch) for batch in batches]
    return score(asking, batches, margins=margins, applied=partial(vector.apply, asking.model))


def share_of(scores: Scores, behaviour: str) -> float:
    """Share of the examples that answer so; NaN where there is no example."""
    n = len(scores.behaviour_N)
    return float(np.mean(scores.behaviour_N == behaviour)) if n else math.nan
