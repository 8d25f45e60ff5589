"""An edit: states are kept within a band about their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mnemoscope.bench.lists import Bench
from mnemoscope.interventions import Edit, Intervention, SteeringVector, Toward
from mnemoscope.interventions.shifts import spread_layers

BANDS = (0.5, 1.0)  # in units of each neuron's spread


@dataclass(frozen=True, eq=False)
class Clamped(Edit):
    """Moves each state to the nearest one within ``middle +- width``, times ``factor``."""

    middle_D: Tensor
    width_D: Tensor
    factor_D: Tensor
    KIND: ClassVar[str] = "clamped"
    PARTS: ClassVar[tuple[str, ...]] = ("middle", "width", "factor")

    def added(self, states_NTD: Tensor) -> Tensor:
        nearest = states_NTD.clamp(self.middle_D - self.width_D, self.middle_D + self.width_D)
        return self.factor_D * (nearest - states_NTD)


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    sources, found = bench.sources("block"), list[Intervention]()
    side = 0 if toward == "generalized" else 1
    for layer in spread_layers(bench, 2):
        middle_D = torch.from_numpy(sources.states_P2LD[:, side, layer].mean(0)).float()
        spread_D = torch.from_numpy(sources.spread_LD[layer]).float()
        for band in BANDS:
            edit = Clamped(middle_D, band * spread_D, torch.ones_like(middle_D))
            found.append(SteeringVector(toward, {layer: edit}, method="clamp", setting={"layer": layer, "band": band}))
    return found
