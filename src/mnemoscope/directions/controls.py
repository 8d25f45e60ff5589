"""Controls: shifts of the same norm in each layer that should not work.

Shapes: L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mnemoscope.directions.methods import refit
from mnemoscope.directions.settings import Setting, vector_of, wanted_of
from mnemoscope.directions.sources import Sources
from mnemoscope.steering import scaled_to

# (shift (L, D), the setting it is of, its sources, a generator) -> another shift of the same norm in each layer.
Control = Callable[[np.ndarray, Setting, Sources, np.random.Generator], np.ndarray]


def random_neurons(shift_LD: np.ndarray, setting: Setting, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """As many neurons in each layer, drawn at random, with the same absolute shifts in random order and signs.

    Drawing within a layer keeps each layer's norm, which drawing over all layers would not.
    """
    drawn_LD = np.zeros_like(shift_LD)
    for layer, values in _shifts_of(shift_LD):
        neurons = rng.permutation(shift_LD.shape[1])[: len(values)]
        drawn_LD[layer, neurons] = rng.permutation(values) * rng.choice([-1.0, 1.0], size=len(values))
    return drawn_LD


def low_correlation(shift_LD: np.ndarray, setting: Setting, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """The neurons of each layer with the lowest |rho|, with the same absolute shifts in random order and signs."""
    drawn_LD = np.zeros_like(shift_LD)
    for layer, values in _shifts_of(shift_LD):
        neurons = np.argsort(np.abs(sources.rho_LD[layer]), kind="stable")[: len(values)]
        drawn_LD[layer, neurons] = rng.permutation(values) * rng.choice([-1.0, 1.0], size=len(values))
    return drawn_LD


def random_sign(shift_LD: np.ndarray, setting: Setting, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """The chosen neurons with their absolute shifts and random signs."""
    return np.abs(shift_LD) * rng.choice([-1.0, 1.0], size=shift_LD.shape)


def gaussian(shift_LD: np.ndarray, setting: Setting, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """A direction drawn from a normal distribution over all neurons of the layers that are shifted."""
    return gaussian_like(shift_LD, rng)


def gaussian_like(shift_LD: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normally distributed shifts with the norm of each layer's; needs nothing but the shift."""
    return scaled_to(rng.standard_normal(shift_LD.shape), np.linalg.norm(shift_LD, axis=1))


def shuffled_labels(shift_LD: np.ndarray, setting: Setting, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """What the same method makes of the same pairs when their labels are shuffled."""
    drawn = vector_of(sources.shuffled(_shuffle(rng)), setting).dense(*shift_LD.shape)
    return scaled_to(drawn, np.linalg.norm(shift_LD, axis=1))


CONTROLS: dict[str, Control] = {
    "random_neurons": random_neurons,
    "low_correlation": low_correlation,
    "random_sign": random_sign,
    "shuffled_labels": shuffled_labels,
    "gaussian": gaussian,
}
DEAR = ("shuffled_labels",)  # those that fit a method anew
TOGETHER = 4  # draws of these that are fitted in one go
CHEAP = tuple(name for name in CONTROLS if name not in DEAR)


def control_exists(name: str, shift_LD: np.ndarray) -> bool:
    """Whether the control differs from what it controls.

    Where more than half of the neurons of its layers are chosen, or all of one layer, as many others are not there,
    and those with the lowest |rho| are mostly the same ones with other signs.
    """
    if name not in ("random_neurons", "low_correlation"):
        return True
    chosen_L = (shift_LD != 0).sum(axis=1)
    available = int((chosen_L > 0).sum()) * shift_LD.shape[1]
    return 2 * int(chosen_L.sum()) <= available + 1 and not (chosen_L == shift_LD.shape[1]).any()


def control_draws(
    name: str, sources: Sources, setting: Setting, draws: int, seed: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """``draws`` numbered shifts (L, D) of a control, none where it does not exist; seeded each by its number.

    Args:
        seed: of the draws. Shuffles depend on its first number alone, so that one shuffle serves all settings.
    """
    shift_LD = vector_of(sources, setting).dense(*sources.shape_LD).astype(np.float64)
    if not control_exists(name, shift_LD):
        return
    stream = seed if name in CHEAP else seed[:1]
    for number in range(draws):
        if name in DEAR and number % TOGETHER == 0:
            # Always as many, also where fewer are asked for: rounding must not depend on how many there are.
            rngs = (np.random.default_rng([*stream, number + more]) for more in range(TOGETHER))
            refit([sources.shuffled(_shuffle(rng)) for rng in rngs], setting.method, wanted_of(setting))
        yield number, CONTROLS[name](shift_LD, setting, sources, np.random.default_rng([*stream, number]))


def _shuffle(rng: np.random.Generator) -> int:
    """The seed of the shuffle that a draw stands for."""
    return int(rng.integers(2**31))


def _shifts_of(shift_LD: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Layers that are shifted, with the absolute shifts of their neurons that are."""
    for layer, row_D in enumerate(shift_LD):
        values = np.abs(row_D[row_D != 0])
        if len(values):
            yield layer, values
