"""Controls: edits of the same norm that should not steer.

Shapes: L layers, D neurons, K rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeGuard

import numpy as np
import torch

from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.edits import LowRank, Shift
from mnemoscope.interventions.methods import nulls, refitted
from mnemoscope.interventions.shifts import rho
from mnemoscope.interventions.sources import INDIFFERENCE, PERMUTED, TOGETHER, Labels, Sources, scaled_to
from mnemoscope.interventions.vector import SteeringVector


def random_neurons(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray) -> np.ndarray:
    """As many other neurons of each layer, with the same absolute shifts in random order and signs.

    Where a layer has not as many others, the rest are chosen ones; see ``shared_neurons``.
    """

    def others_first(layer: int) -> np.ndarray:
        order_D = rng.permutation(shift_LD.shape[1])
        return order_D[np.argsort(shift_LD[layer, order_D] != 0, kind="stable")]

    return _placed(shift_LD, rng, others_first)


def shared_neurons(shift_LD: np.ndarray) -> float:
    """Share of the neurons of ``random_neurons`` that are neurons of the vector; NaN for no shift."""
    chosen_L = (shift_LD != 0).sum(axis=1)
    shared = np.maximum(0, 2 * chosen_L - shift_LD.shape[1]).sum()
    return float(shared / chosen_L.sum()) if chosen_L.any() else math.nan


def low_correlation(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray) -> np.ndarray:
    """The neurons of each layer with the lowest |rho|, with the same absolute shifts in random order and signs."""
    rank_LD = np.nan_to_num(np.abs(rho_LD))
    return _placed(shift_LD, rng, lambda layer: np.argsort(rank_LD[layer], kind="stable"))


def random_sign(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray) -> np.ndarray:
    """The chosen neurons with their absolute shifts and random signs."""
    return np.abs(shift_LD) * rng.choice([-1.0, 1.0], size=shift_LD.shape)


def gaussian(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray | None = None) -> np.ndarray:
    """A normally distributed direction over all neurons of the shifted layers."""
    return scaled_to(rng.standard_normal(shift_LD.shape), np.linalg.norm(shift_LD, axis=1))


def _placed(shift_LD: np.ndarray, rng: np.random.Generator, neurons_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """Each layer's absolute shifts, in random order and with random signs, on the first neurons given for it."""
    placed_LD = np.zeros_like(shift_LD)
    for layer, row_D in enumerate(shift_LD):
        values = np.abs(row_D[row_D != 0])
        if len(values):
            neurons = neurons_of(layer)[: len(values)]
            placed_LD[layer, neurons] = rng.permutation(values) * rng.choice([-1.0, 1.0], size=len(values))
    return placed_LD


SHUFFLED = "shuffled_labels"  # the same method on the same pairs with shuffled labels
DRAWN = {control.__name__: control for control in (random_neurons, low_correlation, random_sign, gaussian)}
CONTROLS = ("random_neurons", "low_correlation", "random_sign", SHUFFLED, INDIFFERENCE, PERMUTED, "gaussian")


def has_equal_norm(one: object) -> TypeGuard[SteeringVector]:
    """Whether an intervention has a norm: a vector of constant and low-rank shifts alone."""
    return isinstance(one, SteeringVector) and all(
        isinstance(edit, Shift | LowRank) for edits in one.edits.values() for edit in edits
    )


def control_draws(
    name: str, bench: Bench, one: SteeringVector, draws: int, seed: Sequence[int]
) -> Iterator[tuple[int, SteeringVector]]:
    """``draws`` numbered draws of a control of a vector, each seeded by its number; none where it does not exist.

    Shuffles depend on the first number of ``seed`` alone, so that one shuffle serves all settings. Values are moved
    between neurons, and norms are equal, in the unit of strength. Of a vector that acts by the state random signs and
    Gaussian directions are given to what it writes.
    """
    sources = bench.sources(one.site, one.unit)
    if name in nulls(one.method):
        if name != PERMUTED or sources.lists.can_permute():
            yield from _refits(bench, one, sources, shuffles(draws, seed[0], name == PERMUTED), draws)
        return
    shift_LD = _relative(one, sources)
    # With more than half of the neurons or a whole layer shifted there are not as many others, and those with the
    # lowest |rho| are mostly the same ones with other signs.
    chosen_L, width = (shift_LD != 0).sum(axis=1), shift_LD.shape[1]
    others = 2 * chosen_L.sum() <= (chosen_L > 0).sum() * width + 1 and not (chosen_L == width).any()
    if name not in DRAWN or (name in ("random_neurons", "low_correlation") and not (others and one.is_constant)):
        return
    for number in range(draws):
        rng = np.random.default_rng([*seed, number])
        if not one.is_constant:
            yield number, _written(one, name, rng, sources.spread_LD)
            continue
        drawn_LD = DRAWN[name](shift_LD, rng, rho(bench, one.site))
        carries_LD = sources.unit_LD > 0
        if not carries_LD.all():  # what fell on neurons that are never shifted is made up by the others
            drawn_LD = scaled_to(drawn_LD * carries_LD, np.linalg.norm(shift_LD, axis=1))
        yield number, one.with_dense(drawn_LD * sources.unit_LD)


def of_equal_norm(vector: SteeringVector, sources: Sources, seed: int, number: int) -> SteeringVector:
    """A Gaussian control with this number, of the same norm in every layer; each method and direction has its own."""
    rng = np.random.default_rng([seed, *f"{vector.method}|{vector.toward}".encode(), 35, number])
    if not vector.is_constant:
        return _written(vector, "gaussian", rng, sources.spread_LD)
    return vector.with_dense(gaussian(vector.dense(*sources.shape_LD).astype(np.float64), rng))


def _relative(one: SteeringVector, sources: Sources) -> np.ndarray:
    """The constant shifts of a vector in units of strength, float64 (L, D)."""
    return sources.relative(one.dense(*sources.shape_LD).astype(np.float64))


def _written(vector: SteeringVector, name: str, rng: np.random.Generator, spread_LD: np.ndarray) -> SteeringVector:
    """A low-rank shift that writes with random signs, or in Gaussian directions.

    They keep norms and angles of what is written to each other, in units of spread, so that every state is moved as far
    in these units as by the vector.
    """
    found = {}
    for layer, edit in vector.low_rank.items():
        write_KD, spread_D = edit.write_KD.double().numpy(), spread_LD[layer]
        if name == "random_sign":
            drawn_KD = write_KD * rng.choice([-1.0, 1.0], size=write_KD.shape[1])
        else:
            drawn_KD = _turned(write_KD / spread_D, rng) * spread_D
        found[layer] = replace(edit, write_KD=torch.from_numpy(drawn_KD).float())
    return replace(vector, edits=found)


def _turned(rows_KD: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows in a random subspace, with the norms and angles that they had; K at most D."""
    frame_DK, corner_KK = np.linalg.qr(rows_KD.T)
    drawn_DK, signs_KK = np.linalg.qr(rng.standard_normal(frame_DK.shape))
    return (drawn_DK * np.sign(np.diag(signs_KK)) @ corner_KK).T


def shuffles(draws: int, seed: int, permuted: bool = False) -> list[tuple[Labels, ...]]:
    """Labels for ``draws`` shuffles or a few more, always in fours: rounding must not depend on how many there are."""
    numbers = range(-(-draws // TOGETHER) * TOGETHER)
    drawn = [Labels(int(np.random.default_rng([seed, number]).integers(2**31)), permuted) for number in numbers]
    return [tuple(drawn[first : first + TOGETHER]) for first in numbers[::TOGETHER]]


def _refits(
    bench: Bench, one: SteeringVector, sources: Sources, fours: Sequence[tuple[Labels, ...]], draws: int
) -> Iterator[tuple[int, SteeringVector]]:
    """A vector fitted again on other labels, at its norm."""
    for first, four in enumerate(fours):
        left = draws - first * TOGETHER
        found = refitted(bench, one, four if one.is_constant else four[:left])  # those are learned one by one
        for number, other in enumerate(found[:left], first * TOGETHER):
            if one.is_constant:
                placed_LD = _at_norm(_relative(other, sources), _relative(one, sources))
                yield number, one.with_dense(placed_LD * sources.unit_LD)
            else:
                wanted, norm = (_norm_written(two, sources.spread_LD) for two in (one, other))
                yield number, other * (wanted / norm) if norm else other


def _at_norm(shuffled_LD: np.ndarray, shift_LD: np.ndarray) -> np.ndarray:
    """A shuffle at the norm of the vector in each layer; where it lacks one, the others make up the strength."""
    placed_LD = scaled_to(shuffled_LD, np.linalg.norm(shift_LD, axis=1))
    if not placed_LD.any():  # no layer in common: its own layers
        placed_LD = shuffled_LD
    norm = np.linalg.norm(placed_LD)
    return placed_LD * (np.linalg.norm(shift_LD) / norm) if norm else placed_LD


def _norm_written(one: SteeringVector, spread_LD: np.ndarray) -> float:
    """How much low-rank shifts write, in units of spread over all layers."""
    written = (edit.write_KD.double().numpy() / spread_LD[layer] for layer, edit in one.low_rank.items())
    return math.sqrt(sum(float((rows_KD**2).sum()) for rows_KD in written))
