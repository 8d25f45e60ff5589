"""One neuron of a cell at a time, on tune pairs. Shapes: P pairs, L layers, D neurons."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mnemoscope.behaviour import Asking, Batch, cache_prefixes, kept_bytes, prepare, score
from mnemoscope.contrast import Contrast
from mnemoscope.directions import TOWARD, steered
from mnemoscope.errors import InputError
from mnemoscope.report import draw_neuron
from mnemoscope.steering import OPPOSITE, SteeringVector, Toward
from mnemoscope.tasks import Example
from mnemoscope.web.shapes import Alone, NeuronMap, Watched

PREFIXES = 2**28  # bytes of prompt caches kept: people look at one neuron after the other
TIMES = (1.0, 4.0, 16.0)  # multiples of its mean difference by which a neuron alone is shifted

Part = tuple[list[Batch], np.ndarray]  # prepared phrasings and their states (P, L, D)


class Neurons:
    """The neurons at the contrast's site, on pairs of phrasings as (answered generalized, answered memorized)."""

    def __init__(self, asking: Asking, contrast: Contrast, pairs: list[tuple[Example, Example]]) -> None:
        self._asking, self._contrast = asking, contrast
        self._examples = {behaviour: [pair[side] for pair in pairs] for side, behaviour in enumerate(TOWARD.values())}
        self._read: dict[tuple[Toward, int], Part] = {}

    def map(self) -> NeuronMap:
        """Difference, correlation and significance of every neuron, to five digits."""
        found = self._contrast
        values = {"nmd": found.nmd_LD, "rho": found.rho_LD, "p_family_wise": found.p_family_wise_LD}
        rounded = {
            name: [[float(f"{v:.5g}") for v in row_D] for row_D in values_LD.tolist()]
            for name, values_LD in values.items()
        }
        return NeuronMap(site=found.site, pairs=found.pairs, **rounded)

    def watch(self, layer: int, neuron: int) -> Iterator[float | Watched]:
        """Look at a neuron in short steps: yields the share that is done after each, and the result last.

        Raises:
            InputError: there is no such neuron, or no pair.
        """
        layers, neurons = self._contrast.nmd_LD.shape
        for field, value, most in (("layer", layer, layers), ("neuron", neuron, neurons)):
            if not 0 <= value < most:
                raise InputError(f"{field}: {value} is not in 0 .. {most - 1}")
        if not self._examples["memorized"]:
            raise InputError("cell: it has no tune pair")
        return self._watch(layer, neuron)

    def _watch(self, layer: int, neuron: int) -> Iterator[float | Watched]:
        starts = range(0, len(self._examples["memorized"]), self._asking.batch_size)
        total, done = len(TOWARD) * len(starts) * (1 + len(TIMES)), 0
        states_P: dict[Toward, list[float]] = {}
        for behaviour in TOWARD.values():
            states_P[behaviour] = []
            for start in starts:
                states_P[behaviour] += self._part(behaviour, start)[1][:, layer, neuron].tolist()
                done += 1
                yield done / total
        alone = []
        for times in TIMES:
            shares: dict[Toward, float] = {}
            for toward in TOWARD.values():
                vector, moved = self._alone(layer, neuron, times, toward), []
                for start in starts:
                    batches, _ = self._part(OPPOSITE[toward], start)
                    moved += list(steered(self._asking, batches, vector, margins=False).behaviour_N == toward)
                    done += 1
                    yield done / total
                shares[toward] = float(np.mean(moved))
            alone.append(Alone(times=times, **shares))
        yield self._watched(layer, neuron, states_P, alone)

    def _watched(self, layer: int, neuron: int, states_P: dict[Toward, list[float]], alone: list[Alone]) -> Watched:
        nmd_LD, rho_LD = (np.abs(np.nan_to_num(a)) for a in (self._contrast.nmd_LD, self._contrast.rho_LD))
        generalized_P, memorized_P = (np.array(states_P[behaviour]) for behaviour in ("generalized", "memorized"))
        label = f"Neuron {neuron} of layer {layer} where the model remembered and where it worked it out"
        return Watched(
            layer=layer,
            neuron=neuron,
            pairs=len(memorized_P),
            mean_generalized=generalized_P.mean(),
            mean_memorized=memorized_P.mean(),
            rank_nmd=1 + int((nmd_LD > nmd_LD[layer, neuron]).sum()),
            rank_rho=1 + int((rho_LD > rho_LD[layer, neuron]).sum()),
            alone=alone,
            drawing=draw_neuron(generalized_P, memorized_P, label),
        )

    def _part(self, behaviour: Toward, start: int) -> Part:
        """A batch of the phrasings that are answered so, read at the first look only."""
        if (behaviour, start) not in self._read:
            batches = prepare(self._asking, self._examples[behaviour][start : start + self._asking.batch_size])
            kept = sum(kept_bytes(batch) for several, _ in self._read.values() for batch in several)
            if kept < PREFIXES:
                cache_prefixes(self._asking, batches, PREFIXES - kept)
            scores = score(self._asking, batches, margins=False, capture=self._contrast.site)  # type: ignore[arg-type]
            assert scores.states_NLD is not None
            self._read[behaviour, start] = batches, scores.states_NLD
        return self._read[behaviour, start]

    def _alone(self, layer: int, neuron: int, times: float, toward: Toward) -> SteeringVector:
        """The shift of one neuron by so many times its mean difference."""
        shift_LD = np.zeros(self._contrast.nmd_LD.shape)
        sign = 1.0 if toward == "generalized" else -1.0
        shift_LD[layer, neuron] = sign * times * np.nan_to_num(self._contrast.nmd_LD[layer, neuron])
        return SteeringVector(toward, {}, self._contrast.site).with_dense(shift_LD)  # type: ignore[arg-type]
