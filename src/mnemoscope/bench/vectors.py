"""The vectors of a cell, whole or in parts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnemoscope.cells import Cell
from mnemoscope.contrast import Contrast
from mnemoscope.directions import TOWARD
from mnemoscope.errors import InputError
from mnemoscope.statistics import top_by_magnitude
from mnemoscope.steering import SteeringVector, Toward


@dataclass(frozen=True)
class Turning:
    """How a model is turned while it answers.

    Attributes:
        toward: the behaviour wanted.
        method: one that the run has a vector of.
        alpha: factor on that vector, at least 0.
        layers: those of its layers that are shifted; None: all of them.
        neurons: how many are shifted, the highest ranked first; None: as many as the vector shifts.
    """

    toward: Toward
    method: str
    alpha: float = 1.0
    layers: tuple[int, ...] | None = None
    neurons: int | None = None


class Vectors:
    """The vectors that a run has chosen for a cell, and parts of them. Shapes: L layers, D neurons."""

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

    def methods(self) -> list[dict[str, Any]]:
        """Each method of the run with its vectors: site, layers, neurons, strength, and whether it is the best."""
        rows = []
        for method in self._chosen["methods"]:
            row: dict[str, Any] = {"method": method}
            for direction, toward in TOWARD.items():
                vector = self._vectors[toward, method]
                row[toward] = {
                    "site": vector.site,
                    "layers": vector.layers,
                    "neurons": _shifted(vector),
                    "strength": vector.strength,
                    "free": self._free(vector),
                    "best": self._chosen["best"][direction] == method,
                }
            rows.append(row)
        return rows

    def meant(self, turning: Turning) -> SteeringVector:
        """The vector that a turning means, before its factor.

        Of ``nmd`` any layers and any number of neurons can be taken, as the run has the whole mean difference; of other
        methods those that the run's vector shifts.

        Raises:
            InputError: method, layers or number are none that there are.
        """
        vector = self._vectors.get((turning.toward, turning.method))
        if vector is None:
            raise InputError(f"method: {turning.method!r} is not one of {', '.join(self._chosen['methods'])}")
        if turning.layers is None and turning.neurons is None:
            return vector
        whole_LD, rank_LD = self._whole(vector)
        allowed = [layer for layer, rank_D in enumerate(rank_LD) if rank_D.any()]
        chosen = list(turning.layers if turning.layers is not None else vector.layers)
        if not chosen or not set(chosen) <= set(allowed):
            raise InputError(f"layers: {chosen} are not among {allowed}, which {turning.method} shifts")
        width = rank_LD.shape[1]
        most = int(np.count_nonzero(rank_LD[chosen]))
        number = turning.neurons if turning.neurons is not None else _shifted(vector)
        if turning.neurons is not None and not 1 <= number <= most:
            raise InputError(f"neurons: {number} is not in 1 .. {most}, which {turning.method} shifts in these layers")
        kept_LD = np.zeros(rank_LD.shape, bool)
        kept_LD[chosen] = top_by_magnitude(rank_LD[chosen], min(number, most) / (len(chosen) * width))
        return vector.with_dense(np.where(kept_LD, whole_LD, 0.0))

    def _free(self, vector: SteeringVector) -> bool:
        return vector.method == "nmd" and vector.site == self._contrast.site

    def _whole(self, vector: SteeringVector) -> tuple[np.ndarray, np.ndarray]:
        """A vector before its neurons were chosen, as far as it is known, and what they are ranked by; (L, D) each.

        The vector's own neurons come first: it was made of fewer pairs than the contrast, which fills up the others.
        """
        layers = len(self._contrast.nmd_LD)
        dense_LD = vector.dense(layers, len(next(iter(vector.shifts.values()))))
        if not self._free(vector):
            return dense_LD, np.abs(dense_LD)
        nmd_LD = np.nan_to_num(self._contrast.nmd_LD)
        own_LD = dense_LD != 0
        times = float(np.linalg.norm(dense_LD) / np.linalg.norm(nmd_LD[own_LD]))
        sign = 1.0 if vector.toward == "generalized" else -1.0
        rank_LD = np.abs(np.nan_to_num(self._contrast.rho_LD)) + own_LD  # |rho| is at most 1
        return np.where(own_LD, dense_LD, sign * times * nmd_LD), rank_LD


def _shifted(vector: SteeringVector) -> int:
    """How many neurons it shifts."""
    return sum(int((shift != 0).sum()) for shift in vector.shifts.values())
