"""A cell looked into neuron by neuron.

Shapes: P pairs, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mnemoscope.behaviour import Asking, Batch, cache_prefixes, kept_bytes, prepare, score
from mnemoscope.bench.turns import Turns
from mnemoscope.contrast import Contrast
from mnemoscope.directions import TOWARD, steered
from mnemoscope.errors import InputError
from mnemoscope.steering import OPPOSITE, SteeringVector, Toward
from mnemoscope.tasks import Example

SIDES = 2**28  # bytes of pairs that need not be read again: somebody looks at one neuron after the other
TIMES = (1.0, 4.0, 16.0)  # multiples of its mean difference by which a neuron alone is shifted


@dataclass(frozen=True)
class Watched:
    """A neuron on tune pairs.

    Attributes:
        generalized_P, memorized_P: its activation where the pair's phrasing was answered so.
        rank_nmd, rank_rho: from 1, among all neurons of its site, by magnitude.
        alone: by multiple of its mean difference, the share of the pairs' phrasings that the shift of this neuron alone
            turns to ``generalized`` and to ``memorized``.
    """

    generalized_P: np.ndarray
    memorized_P: np.ndarray
    rank_nmd: int
    rank_rho: int
    alone: dict[float, dict[Toward, float]]


class Neurons:
    """The neurons of the contrast's site, on pairs of phrasings as (answered by the rule, answered from memory)."""

    def __init__(self, asking: Asking, contrast: Contrast, pairs: list[tuple[Example, Example]], turns: Turns) -> None:
        self._asking, self._contrast, self._turns = asking, contrast, turns
        self._examples = {behaviour: [pair[side] for pair in pairs] for side, behaviour in enumerate(TOWARD.values())}
        self._read: dict[tuple[Toward, int], tuple[list[Batch], np.ndarray]] = {}

    def check(self, layer: int, neuron: int) -> None:
        """Raises InputError where the contrast has no such neuron."""
        layers, neurons = self._contrast.nmd_LD.shape
        for field, value, most in (("layer", layer, layers), ("neuron", neuron, neurons)):
            if not 0 <= value < most:
                raise InputError(f"{field}: {value} is not in 0 .. {most - 1}")

    def watch(
        self,
        layer: int,
        neuron: int,
        tell: Callable[[float], None] = lambda share: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Watched:
        """Look at a neuron; the first look reads all pairs.

        Args:
            tell: hears which share of the work is done.
            wanted: asked now and then whether to go on.

        Raises:
            InputError: there is no such neuron, or no pair.
            CancelledError: it is not wanted any more.
        """
        self.check(layer, neuron)
        states: dict[Toward, np.ndarray] = {}
        for number, behaviour in enumerate(TOWARD.values()):
            sides = self._sides(behaviour, wanted, lambda share, number=number: tell(0.4 * (number + share)))  # type: ignore[misc]
            states[behaviour] = np.concatenate([part_NLD for _, part_NLD in sides])
        alone: dict[float, dict[Toward, float]] = {}
        for done, times in enumerate(TIMES):
            tell(0.8 + 0.2 * done / len(TIMES))
            alone[times] = {toward: self._turned(layer, neuron, times, toward, wanted) for toward in TOWARD.values()}
        tell(1.0)
        nmd_LD, rho_LD = (np.abs(np.nan_to_num(a)) for a in (self._contrast.nmd_LD, self._contrast.rho_LD))
        return Watched(
            states["generalized"][:, layer, neuron],
            states["memorized"][:, layer, neuron],
            1 + int((nmd_LD > nmd_LD[layer, neuron]).sum()),
            1 + int((rho_LD > rho_LD[layer, neuron]).sum()),
            alone,
        )

    def _sides(
        self, behaviour: Toward, wanted: Callable[[], bool], tell: Callable[[float], None] = lambda share: None
    ) -> list[tuple[list[Batch], np.ndarray]]:
        """Phrasings that are answered so, prepared with prefixes, and their states (P, L, D); read once."""
        examples = self._examples[behaviour]
        if not examples:
            raise InputError("cell: it has no tune pair")
        found = []
        for start in range(0, len(examples), self._asking.batch_size):
            tell(start / len(examples))
            with self._turns.step(wanted):
                if (behaviour, start) not in self._read:
                    self._read[behaviour, start] = self._reading(examples[start : start + self._asking.batch_size])
                found.append(self._read[behaviour, start])
        return found

    def _reading(self, examples: list[Example]) -> tuple[list[Batch], np.ndarray]:
        batches = prepare(self._asking, examples)
        kept = sum(kept_bytes(batch) for several, _ in self._read.values() for batch in several)
        if kept < SIDES:
            cache_prefixes(self._asking, batches, SIDES - kept)
        scores = score(self._asking, batches, margins=False, capture=self._contrast.site)  # type: ignore[arg-type]
        assert scores.states_NLD is not None
        return batches, scores.states_NLD

    def _turned(self, layer: int, neuron: int, times: float, toward: Toward, wanted: Callable[[], bool]) -> float:
        """Of the phrasings that are answered the other way, the share that the neuron's shift alone turns."""
        shift_LD = np.zeros(self._contrast.nmd_LD.shape)
        sign = 1.0 if toward == "generalized" else -1.0
        shift_LD[layer, neuron] = sign * times * np.nan_to_num(self._contrast.nmd_LD[layer, neuron])
        vector = SteeringVector(toward, {}, self._contrast.site).with_dense(shift_LD)  # type: ignore[arg-type]
        turned = []
        for batches, _ in self._sides(OPPOSITE[toward], wanted):
            with self._turns.step(wanted):
                turned += list(steered(self._asking, batches, vector, margins=False).behaviour_N == toward)
        return float(np.mean(turned))
