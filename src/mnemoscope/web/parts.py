"""The vectors of a cell, whole or in parts, and its neurons one by one. Shapes: P pairs, L layers, D neurons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from mnemoscope.behaviour import Asking, Batch, cache_prefixes, kept_bytes, prepare, score
from mnemoscope.bench.answers import steered
from mnemoscope.interventions import Binding, Intervention, SteeringVector, Toward, chosen_paths, load_intervention
from mnemoscope.interventions.shifts import top_neurons
from mnemoscope.report import draw_neuron
from mnemoscope.runs.digests import intact
from mnemoscope.runs.errors import InputError, check_one_of
from mnemoscope.runs.schemas import read_chosen
from mnemoscope.statistics.contrast import Contrast
from mnemoscope.study.cells import Cell
from mnemoscope.tasks import Example
from mnemoscope.web.shapes import LeverFacts, Look, NeuronMap, Steering, Watched

PREFIXES = 2**28  # bytes of prompt caches kept: people look at one neuron after the other
TIMES = (1.0, 4.0, 16.0)  # multiples of its mean difference by which a neuron alone is shifted


class Vectors:
    """The vectors and other levers that a run chose for a cell, and parts of vectors."""

    def __init__(self, cell: Cell, contrast: Contrast, asking: Asking, binding: Binding) -> None:
        """Read them; InputError where one is damaged, or was fitted on another model than the cell's."""
        chosen: Any = read_chosen(intact(cell.records / "chosen.json"))
        of_aim = chosen[chosen.get("aim", "pairs")]
        self._contrast, self._methods = contrast, list(of_aim["methods"])
        self._best = of_aim["best"] | chosen.get("levers", {})
        self._vectors: dict[tuple[Toward, str], Intervention] = {}
        for (direction, method), path in chosen_paths(cell.folder).items():
            self._vectors[Toward.of(direction), method] = one = load_intervention(intact(path))
            one.check(asking.model, asking.tokenizer, found=binding)

    def facts(self) -> dict[str, dict[Toward, LeverFacts]]:
        """What the run has of each method, in both directions."""
        found: dict[str, dict[Toward, LeverFacts]] = {method: {} for method in self._methods}
        for (toward, method), one in self._vectors.items():
            own: dict[str, Any] = {"lever": one.lever, "best": self._best[toward.direction] == method}
            if isinstance(one, SteeringVector):
                own |= {name: getattr(one, name) for name in ("site", "layers", "strength")}
                own |= {"free": self._is_free(one), "neurons": _shifted(one)}
            found[method][toward] = LeverFacts(**own)
        return found

    def part(self, steering: Steering) -> Intervention:
        """The lever, or the part of a vector, that ``steering`` names, before its factor.

        Of ``nmd`` any layers and any number of neurons can be taken, as the run has the whole mean difference; of other
        methods those that the run's vector shifts. InputError where the run has no such method, layers or number.
        """
        check_one_of("method", steering.method, self._methods)
        vector = self._vectors[steering.toward, steering.method]
        if steering.layers is None and steering.neurons is None:
            return vector
        if not isinstance(vector, SteeringVector) or not vector.is_constant:
            raise InputError(f"layers, neurons: {steering.method} acts as a whole only")
        whole_LD, rank_LD = self._whole(vector)
        allowed = np.flatnonzero(rank_LD.any(axis=1)).tolist()
        layers = sorted(set(vector.layers if steering.layers is None else steering.layers))
        if not layers or not set(layers) <= set(allowed):
            raise InputError(f"layers: {layers} are not among {allowed}, which {steering.method} shifts")
        most = int(np.count_nonzero(rank_LD[layers]))
        if steering.neurons is not None and steering.neurons > most:
            raise InputError(f"neurons: {steering.neurons} is not in 1 .. {most}, which it shifts in these layers")
        number = min(steering.neurons or _shifted(vector), most)
        kept_LD = top_neurons(rank_LD, layers, number / rank_LD[layers].size)
        return vector.with_dense(np.where(kept_LD, whole_LD, 0.0))

    def _is_free(self, vector: SteeringVector) -> bool:
        return vector.method == "nmd" and vector.site == self._contrast.site

    def _whole(self, vector: SteeringVector) -> tuple[np.ndarray, np.ndarray]:
        """A vector before its neurons were chosen, as far as it is known, and what they are ranked by; (L, D) each.

        The vector's own neurons rank first: it was made of fewer pairs than the contrast, which fills in the others.
        """
        nmd_LD = np.nan_to_num(self._contrast.nmd_LD)
        dense_LD = vector.dense(len(nmd_LD), len(next(iter(vector.shifts.values()))))
        if not self._is_free(vector):
            return dense_LD, np.abs(dense_LD)
        own_LD = dense_LD != 0
        factor = float(np.linalg.norm(dense_LD) / np.linalg.norm(nmd_LD[own_LD]))
        rank_LD = np.abs(np.nan_to_num(self._contrast.rho_LD)) + own_LD  # |rho| is at most 1
        return np.where(own_LD, dense_LD, vector.toward.sign * factor * nmd_LD), rank_LD


def _shifted(vector: SteeringVector) -> int:
    """Number of neurons it shifts."""
    written = [edit.write_KD.any(dim=0) for edit in vector.low_rank.values()]
    return sum(int((shift != 0).sum()) for shift in (*vector.shifts.values(), *written))


class Neurons:
    """The neurons at the contrast's site, on pairs of phrasings as (answered generalized, answered memorized)."""

    def __init__(self, asking: Asking, contrast: Contrast, pairs: list[tuple[Example, Example]]) -> None:
        self._asking, self._contrast, self._pairs = asking, contrast, pairs
        self._read: dict[tuple[Toward, int], tuple[list[Batch], np.ndarray]] = {}

    def map(self) -> NeuronMap:
        """Difference, correlation and significance of every neuron, to five digits."""
        found = self._contrast
        rounded = {
            name: [[float(f"{v:.5g}") for v in row_D] for row_D in getattr(found, f"{name}_LD").tolist()]
            for name in ("nmd", "rho", "p_family_wise")
        }
        return NeuronMap(site=found.site, pairs=found.pairs, **rounded)

    def watch(self, layer: int, neuron: int) -> Iterator[Look]:
        """Look at a neuron in short steps, the last with the result; InputError without such a neuron, or any pair."""
        layers, neurons = self._contrast.nmd_LD.shape
        for field, value, most in (("layer", layer, layers), ("neuron", neuron, neurons)):
            if not 0 <= value < most:
                raise InputError(f"{field}: {value} is not in 0 .. {most - 1}")
        if not self._pairs:
            raise InputError("cell: it has no tune pair")
        return self._watch(layer, neuron)

    def _watch(self, layer: int, neuron: int) -> Iterator[Look]:
        parts = list(product(Toward, range(0, len(self._pairs), self._asking.batch_size)))
        total = len(parts) * (1 + len(TIMES))
        states_P: defaultdict[Toward, list[float]] = defaultdict(list)
        for done, (behaviour, start) in enumerate(parts, 1):
            states_P[behaviour] += self._part(behaviour, start)[1][:, layer, neuron].tolist()
            yield Look(share=done / total)
        moved: defaultdict[tuple[float, Toward], list[bool]] = defaultdict(list)
        for done, (times, (toward, start)) in enumerate(product(TIMES, parts), 1 + len(parts)):
            batches, _ = self._part(toward.opposite, start)
            vector = self._alone(layer, neuron, times, toward)
            moved[times, toward] += list(steered(self._asking, batches, vector, margins=False).behaviour_N == toward)
            yield Look(share=done / total)
        nmd_LD, rho_LD = (np.abs(np.nan_to_num(a)) for a in (self._contrast.nmd_LD, self._contrast.rho_LD))
        generalized_P, memorized_P = (np.array(states_P[toward]) for toward in Toward)
        label = f"Neuron {neuron} of layer {layer} where answers are memorized and where they are generalized"
        found = Watched(
            layer=layer,
            neuron=neuron,
            pairs=len(self._pairs),
            mean_generalized=generalized_P.mean(),
            mean_memorized=memorized_P.mean(),
            rank_nmd=1 + int((nmd_LD > nmd_LD[layer, neuron]).sum()),
            rank_rho=1 + int((rho_LD > rho_LD[layer, neuron]).sum()),
            alone=[{"times": n, **{toward: np.mean(moved[n, toward]) for toward in Toward}} for n in TIMES],
            drawing=draw_neuron(generalized_P, memorized_P, label),
        )
        yield Look(share=1.0, result=found)

    def _part(self, behaviour: Toward, start: int) -> tuple[list[Batch], np.ndarray]:
        """A batch of the phrasings that are answered so, prepared, and its states; read at the first look only."""
        if (behaviour, start) not in self._read:
            pairs = self._pairs[start : start + self._asking.batch_size]
            batches = prepare(self._asking, [pair[behaviour == "memorized"] for pair in pairs])
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
        shift_LD[layer, neuron] = toward.sign * times * np.nan_to_num(self._contrast.nmd_LD[layer, neuron])
        return SteeringVector(toward, {}, self._contrast.site).with_dense(shift_LD)  # type: ignore[arg-type]
