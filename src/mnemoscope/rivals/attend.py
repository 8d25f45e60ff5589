"""Attention of chosen heads to the text is multiplied by a factor, and then normalised.

Zhang et al. (2023), "Tell your model where to attend: post-hoc attention steering for LLMs", arXiv 2311.02262 (PASTA).
They divide attention to the rest of the prompt; here the answer's own tokens are rest too. As there, all queries are
steered, also inside the text, so no cached prefix serves. Heads are ranked by how each alone, scaled from the decision
position on, moves the wanted answer.

Shapes: N prompts, T tokens of prompts, L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import only_log_probability, with_options
from mnemoscope.interventions import Gate, Intervention, Toward
from mnemoscope.interventions.contract import Bench
from mnemoscope.interventions.hooks import Alpha, attending, factors_of
from mnemoscope.interventions.shifts import once
from mnemoscope.models import blocks_of, core_of, heads_of
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES, FACTORS = (1 / 16, 1 / 4, 1.0), (2.0, 10.0, 100.0)  # of all heads; to memory its inverse
TRIED, EXAMPLES = 10.0, 16  # the factor that heads are ranked with, and conflicts


@dataclass(frozen=True, kw_only=True, repr=False)
class Attend(Intervention):
    """Some heads, by layer and number, and the factor on their attention to the text."""

    heads: Sequence[list[int]]
    factor: float
    text_NT: Tensor | None = field(default=None, compare=False)  # of the batch that is read; never stored

    KIND: ClassVar[str] = "attend"
    in_one_go: ClassVar[bool] = True
    everywhere = True

    def marked(self, text_NT: Tensor) -> Attend:
        """The same for a batch whose texts are known."""
        return replace(self, text_NT=text_NT)

    def scaled(self, alpha: float) -> Intervention:
        """The same with a power of the factor."""
        return replace(self, factor=self.factor**alpha) if alpha else super().scaled(0.0)

    def facts(self) -> dict[str, Any]:
        """How it was fitted."""
        return {name: fact for name, fact in super().facts().items() if name != "text_NT"}

    def check_shape(self, model: PreTrainedModel) -> None:
        """Raises InputError where a head does not exist, or attention takes no mask of numbers."""
        layers, count = len(blocks_of(model)), heads_of(model, 0)[0]
        for layer, head in self.heads:
            if not (0 <= layer < layers and 0 <= head < count):
                raise InputError(f"heads: [{layer}, {head}]; this model has {layers} layers of {count} heads")
        if not (how := str(core_of(model).config._attn_implementation)).startswith(("sdpa", "eager")):
            raise InputError(f"attn_implementation: {how!r} cannot be steered; allowed are sdpa and eager")

    def apply(
        self, model: PreTrainedModel, alpha: Alpha = 1.0, start: int | None = None, gate: Gate | None = None
    ) -> AbstractContextManager[None]:
        """The context in which a power of the factor scales attention in the batch that was ``marked``."""
        self.check_shape(model)
        if gate is not None:
            raise InputError("gate: attention is scaled before it is read; give one alpha for each prompt, 0 or 1")
        added_N1, text_NT = math.log(self.factor) * factors_of(alpha).view(-1, 1), self.text_NT
        if not added_N1.any():
            return nullcontext()
        chosen_H = {layer: torch.zeros(heads_of(model, layer)[0]) for layer, _ in self.heads}
        for layer, head in self.heads:
            chosen_H[layer][head] = 1.0
        return attending(model, None if text_NT is None else text_NT * added_N1.to(text_NT.device), chosen_H)


def candidates(bench: Bench, toward: Toward) -> list[Attend]:
    """Every share of the heads and factor; InputError where no text is found, or a model cannot take it."""
    effects_LH, found = effects(bench, toward), list[Attend]()
    order = [[*divmod(int(place), effects_LH.shape[1])] for place in np.argsort(-effects_LH.ravel(), kind="stable")]
    for share, factor in product(SHARES, FACTORS):
        heads = order[: max(1, round(share * len(order)))]
        setting, power = {"heads": len(heads), "factor": factor}, factor**toward.sign
        found.append(Attend(toward=toward, method="attend", setting=setting, heads=heads, factor=power))
    return found


@once
@torch.no_grad()
def effects(bench: Bench, toward: Toward) -> np.ndarray:
    """Mean change of log p(wanted answer) when a head alone is scaled from the decision position on; float64 (L, H)."""
    asking, model, drawn = bench.asking, bench.asking.model, bench.fit_conflicts
    prompts = drawn.of([n for n, quoted in enumerate(drawn.quoted) if quoted.text][:EXAMPLES])
    if not len(prompts):
        raise InputError("attend: no fit conflict quotes a text that can be told from its question")
    effects_LH = np.zeros((len(blocks_of(model)), heads_of(model, 0)[0]))
    for batch in prompts.batches:
        rows = with_options(batch, torch.full_like(batch.shared_N, int(toward == "generalized"))[None])
        text_NT, before_N = prompts.text_columns(rows.examples_N, rows.mask_NT), only_log_probability(asking, rows)
        for place in np.ndindex(*effects_LH.shape):
            with Attend(toward=toward, heads=[[*place]], factor=TRIED**toward.sign, text_NT=text_NT).apply(model):
                change_N = only_log_probability(asking, rows) - before_N
            effects_LH[place] += float(change_N.double().sum()) / len(prompts)
    return effects_LH
