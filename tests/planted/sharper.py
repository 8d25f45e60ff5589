"""A decoding rule: what the other side makes less likely is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mnemoscope.bench.lists import Bench
from mnemoscope.interventions import Intervention, Toward
from mnemoscope.interventions.decoding import Decoding, with_contrasts

ABOUT = "tokens that the other side makes likelier are left out"


@dataclass(frozen=True, kw_only=True, repr=False)
class Sharper(Decoding):
    """Logits minus a penalty where the other distribution gives a token more."""

    penalty: float

    KIND: ClassVar[str] = "sharper"

    def joined(self, first_NMV: Tensor, other_NMV: Tensor) -> Tensor:
        first, other = first_NMV.log_softmax(-1), other_NMV.log_softmax(-1)
        return first - self.penalty * torch.relu(other - first)


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    return with_contrasts(bench, Sharper, toward, [{"penalty": 0.5}, {"penalty": 2.0}])
