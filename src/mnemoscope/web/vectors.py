"""The steering vectors of a cell, whole or in parts. Shapes: L layers, D neurons."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mnemoscope.cells import Cell
from mnemoscope.contrast import Contrast
from mnemoscope.directions import TOWARD
from mnemoscope.errors import InputError
from mnemoscope.statistics import top_by_magnitude
from mnemoscope.steering import SteeringVector
from mnemoscope.web.shapes import Method, Steering, VectorFacts


class Vectors:
    """The vectors that a run chose for a cell, and parts of them."""

    def __init__(self, cell: Cell, contrast: Contrast) -> None:
        """Read them.

        Raises:
            InputError: a vector is damaged.
        """
        self._contrast = contrast
        self._chosen: dict[str, Any] = json.loads((cell.records / "chosen.json").read_text())["pairs"]
        self._vectors = {
            (toward, method): SteeringVector.load(cell.folder / "vectors" / f"{direction}-{method}.safetensors")
            for direction, toward in TOWARD.items()
            for method in self._chosen["methods"]
        }

    def methods(self) -> list[Method]:
        """Each method of the run with its two vectors."""
        return [
            Method(method=method, **{toward: self._facts(direction, method) for direction, toward in TOWARD.items()})
            for method in self._chosen["methods"]
        ]

    def _facts(self, direction: str, method: str) -> VectorFacts:
        vector = self._vectors[TOWARD[direction], method]
        return VectorFacts(
            site=vector.site,
            layers=vector.layers,
            neurons=_shifted(vector),
            strength=vector.strength,
            free=self._is_free(vector),
            best=self._chosen["best"][direction] == method,
        )

    def part(self, steering: Steering) -> SteeringVector:
        """The vector, or the part of it, that ``steering`` names, before its factor.

        Of ``nmd`` any layers and any number of neurons can be taken, as the run has the whole mean difference; of other
        methods those that the run's vector shifts.

        Raises:
            InputError: the run has no such method, layers or number of neurons.
        """
        vector = self._vectors.get((steering.toward, steering.method))
        if vector is None:
            raise InputError(f"method: {steering.method!r} is not one of {', '.join(self._chosen['methods'])}")
        if steering.layers is None and steering.neurons is None:
            return vector
        whole_LD, rank_LD = self._whole(vector)
        allowed = [layer for layer, rank_D in enumerate(rank_LD) if rank_D.any()]
        layers = sorted(set(vector.layers if steering.layers is None else steering.layers))
        if not layers or not set(layers) <= set(allowed):
            raise InputError(f"layers: {layers} are not among {allowed}, which {steering.method} shifts")
        most = int(np.count_nonzero(rank_LD[layers]))
        if steering.neurons is not None and steering.neurons > most:
            raise InputError(
                f"neurons: {steering.neurons} is not in 1 .. {most}, which {steering.method} shifts in these layers"
            )
        number = min(steering.neurons or _shifted(vector), most)
        kept_LD = np.zeros(rank_LD.shape, bool)
        kept_LD[layers] = top_by_magnitude(rank_LD[layers], number / rank_LD[layers].size)
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
        sign = 1.0 if vector.toward == "generalized" else -1.0
        rank_LD = np.abs(np.nan_to_num(self._contrast.rho_LD)) + own_LD  # |rho| is at most 1
        return np.where(own_LD, dense_LD, sign * factor * nmd_LD), rank_LD


def _shifted(vector: SteeringVector) -> int:
    """Number of neurons it shifts."""
    return sum(int((shift != 0).sum()) for shift in vector.shifts.values())
