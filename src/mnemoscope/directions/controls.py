"""Controls: shifts of the same norm in each layer that should not steer.

Shapes: L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mnemoscope.directions.sources import Labels, Setting
from mnemoscope.directions.vectors import Directions
from mnemoscope.steering import scaled_to

# (shift (L, D), a generator, correlations with the label (L, D)) -> another shift of the same norm in each layer.
Control = Callable[[np.ndarray, np.random.Generator, np.ndarray], np.ndarray]


def random_neurons(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray) -> np.ndarray:
    """As many neurons of each layer, drawn at random, with the same absolute shifts in random order and signs."""
    return _placed(shift_LD, rng, lambda layer: rng.permutation(shift_LD.shape[1]))


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


SHUFFLED = "shuffled_labels"  # the same method on the same pairs with shuffled labels
DRAWN: dict[str, Control] = {
    "random_neurons": random_neurons,
    "low_correlation": low_correlation,
    "random_sign": random_sign,
    "gaussian": gaussian,
}
CONTROLS = ("random_neurons", "low_correlation", "random_sign", SHUFFLED, "gaussian")
TOGETHER = 4  # shuffles that are fitted in one go


def control_draws(
    name: str, directions: Directions, setting: Setting, draws: int, seed: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """``draws`` numbered shifts (L, D) of a control, each seeded by its number; none where it does not exist.

    Shuffles depend on the first number of ``seed`` alone, so that one shuffle serves all settings.
    """
    shift_LD = directions.dense(setting).astype(np.float64)
    if name == SHUFFLED:
        norm_L = np.linalg.norm(shift_LD, axis=1)
        for first, four in enumerate(shuffles(draws, seed[0])):
            vectors = directions.vectors(setting, four)
            for number, vector in enumerate(vectors[: draws - first * TOGETHER], first * TOGETHER):
                yield number, scaled_to(vector.dense(*shift_LD.shape), norm_L)
        return
    # With more than half of the neurons or a whole layer shifted there are not as many others, and those with the
    # lowest |rho| are mostly the same ones with other signs.
    chosen_L, width = (shift_LD != 0).sum(axis=1), shift_LD.shape[1]
    others = 2 * chosen_L.sum() <= (chosen_L > 0).sum() * width + 1 and not (chosen_L == width).any()
    if others or name not in ("random_neurons", "low_correlation"):
        for number in range(draws):
            yield number, DRAWN[name](shift_LD, np.random.default_rng([*seed, number]), directions.rho())


def shuffles(draws: int, seed: int) -> list[tuple[Labels, ...]]:
    """Labels for ``draws`` shuffles or a few more, always in fours: rounding must not depend on how many there are."""
    numbers = range(-(-draws // TOGETHER) * TOGETHER)
    drawn = [Labels(int(np.random.default_rng([seed, number]).integers(2**31))) for number in numbers]
    return [tuple(drawn[first : first + TOGETHER]) for first in numbers[::TOGETHER]]


def _placed(shift_LD: np.ndarray, rng: np.random.Generator, neurons_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """Each layer's absolute shifts, in random order and with random signs, on the first neurons given for it."""
    placed_LD = np.zeros_like(shift_LD)
    for layer, row_D in enumerate(shift_LD):
        values = np.abs(row_D[row_D != 0])
        if len(values):
            neurons = neurons_of(layer)[: len(values)]
            placed_LD[layer, neurons] = rng.permutation(values) * rng.choice([-1.0, 1.0], size=len(values))
    return placed_LD
