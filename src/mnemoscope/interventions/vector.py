"""Steering vectors: an edit of the states of some layers, constant or by the state, towards one behaviour.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from mnemoscope.interventions.contract import Intervention, Toward
from mnemoscope.interventions.edits import Edit, LowRank, Shift, as_edits, kinds, summed
from mnemoscope.interventions.hooks import Alpha, Gate, Positions, edited, factors_of
from mnemoscope.models import EVERY_SITE, Site, blocks_of, site_width
from mnemoscope.runs.errors import InputError, check_one_of
from mnemoscope.runs.schemas import VectorFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, repr=False)
class SteeringVector(Intervention):
    """Edits of states for one direction of steering.

    Attributes:
        toward: the behaviour it steers to.
        edits: by 0-based layer, a shift (D,), another edit, or several, which are added to the state before; layers
            without one are absent.
        site: where in a layer states are edited.
        positions: ``decision``: from the decision position on, every decoded token included; ``all``: everywhere.
        top, strength: how it was fitted; for the reader. ``unit``: what strength is counted in, the ``norm`` of the
            layer's states or each neuron's ``spread``.
        begin_alike: share of the prompts it was fitted on whose two answers begin with the same tokens. Their decision
            position is the last of these, but ``apply`` starts at the last token of the prompt.
        opening: token ids that begin every prompt of the chat template; empty without one.
    """

    toward: Toward
    edits: Mapping[int, Any]
    site: Site = "block"
    positions: Positions = "decision"
    top: float = 1.0
    strength: float = 1.0
    unit: Literal["norm", "spread"] = "norm"
    begin_alike: float = 0.0
    opening: tuple[int, ...] = ()

    KIND: ClassVar[str] = "vector"
    WHAT: ClassVar[str] = "vector"
    STORED: ClassVar[tuple[str, ...]] = ("edits",)
    FACTS: ClassVar[Any] = VectorFacts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("site", self.site, EVERY_SITE)
        check_one_of("positions", self.positions, ("decision", "all"))
        found: dict[int, tuple[Edit, ...]] = {}
        for layer, given in sorted(self.edits.items()):
            for edit in (edits := summed((), as_edits(given))):
                edit.check(layer)
            if acting := tuple(edit for edit in edits if not edit.is_nothing):
                found[layer] = acting
        object.__setattr__(self, "edits", found)

    @property
    def lever(self) -> str:
        """A shift, or the kind of edit that acts by the state."""
        return next((one.KIND for edits in self.edits.values() for one in edits if not isinstance(one, Shift)), "shift")

    @property
    def layers(self) -> list[int]:
        """The layers that are edited, ascending."""
        return list(self.edits)

    @property
    def everywhere(self) -> bool:
        """Whether it acts before the decision position too."""
        return self.positions == "all"

    @property
    def shifts(self) -> dict[int, Tensor]:
        """The constant shifts, float32 (D,), by layer."""
        return {layer: one.shift_D for layer, some in self.edits.items() for one in some if isinstance(one, Shift)}

    @property
    def low_rank(self) -> dict[int, LowRank]:
        """The low-rank shifts, by layer."""
        return {layer: one for layer, some in self.edits.items() for one in some if isinstance(one, LowRank)}

    @property
    def is_constant(self) -> bool:
        """Whether it adds the same to all states."""
        return all(isinstance(one, Shift) for edits in self.edits.values() for one in edits)

    def dense(self, layers: int, neurons: int) -> np.ndarray:
        """All constant shifts as a float32 array (L, D), zero where there is none."""
        shift_LD = np.zeros((layers, neurons), np.float32)
        for layer, shift in self.shifts.items():
            shift_LD[layer] = shift.numpy()
        return shift_LD

    def with_dense(self, shift_LD: np.ndarray) -> Self:
        """The same vector with these constant shifts, and no other edits."""
        return replace(self, edits=dict(enumerate(torch.from_numpy(shift_LD.astype(np.float32)))))

    def __mul__(self, factor: float) -> Self:
        toward = self.toward.opposite if factor < 0 else self.toward
        return replace(self, toward=toward, edits=self._times(factor), strength=self.strength * abs(factor))

    __rmul__ = __mul__

    def scaled(self, alpha: float) -> Self:
        """The vector times a factor."""
        return self * alpha

    def __neg__(self) -> Self:
        """The opposite edits; it steers to the other behaviour."""
        return self * -1.0

    def _times(self, factor: float | Tensor) -> dict[int, tuple[Edit, ...]]:
        return {layer: tuple(one * factor for one in edits) for layer, edits in self.edits.items()}

    def __add__(self, other: SteeringVector) -> Self:
        """Both at once, each by the state before, in this vector's direction.

        Raises InputError for another site, position, model or opening.
        """
        for name in ("site", "positions", "binding", "opening"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(f"{name}: {getattr(self, name)!r} and {getattr(other, name)!r} cannot be added")
        layers = {**self.edits, **other.edits}
        both = {layer: summed(self.edits.get(layer, ()), other.edits.get(layer, ())) for layer in layers}
        return replace(self, edits=both, method=f"{self.method}+{other.method}")

    def __sub__(self, other: SteeringVector) -> Self:
        return self + replace(-other, method=other.method)

    @contextmanager
    def apply(
        self, model: PreTrainedModel, alpha: Alpha = 1.0, start: int | None = None, gate: Gate | None = None
    ) -> Iterator[None]:
        """Edit the model's states inside the context; use any forward pass or ``generate`` in it.

        Args:
            alpha: factor on what is added, or one for each prompt of the batch (N,); beams and samples of a prompt
                share its factor. 0 leaves the model untouched, bit by bit.
            start: column of the decision position in the left-padded batch. Default: the last column of each prompt. A
                pass without any cache that begins with the prompt of the pass before counts as its continuation, and
                so does a pass on a cache that holds the decision position (the next message of a chat needs a context
                of its own). Needed for a prompt that is read in several passes (``prefill_chunk_size``) or with
                guesses behind it (an assistant, prompt lookup).
            gate: decides for every prompt, in the pass that reads it, whether it is steered. Others stay untouched, bit
                by bit.

        Raises:
            InputError: a layer or the width does not exist in this model, alpha is not finite, start is below 0, the
                gate reads above the first shift, or, in a pass, a prompt is padded on the right or is not formatted by
                the chat template that the vector was fitted with.
        """
        factor = factors_of(alpha)
        if start is not None and start < 0:
            raise InputError(f"start: {start}; allowed is a column of the batch, from 0 on")
        self.check_shape(model)
        if not factor.any() or not self.layers:
            yield
            return
        if gate and not gate.is_below(self.site, self.layers[0]):
            raise InputError(
                f"gate: the detector reads {gate.site} {gate.layer}, which this vector shifts from {self.site} "
                f"{self.layers[0]} on; compute the factors beforehand: alpha = "
                f"fitted.gate(inputs, threshold, {self.toward!r})"
            )
        edits = self._times(factor if factor.ndim == 0 else factor[:, None, None])
        with self.edited(model, edits, start, gate):
            yield

    def edited(
        self, model: PreTrainedModel, edits: Mapping[int, tuple[Edit, ...]], start: int | None, gate: Gate | None
    ) -> AbstractContextManager[None]:
        """The context in which edits act; a kind of vector may have another."""
        return edited(model, edits, self.site, self.positions, start, gate, self.opening)

    def check_shape(self, model: PreTrainedModel) -> None:
        """Raises InputError where a layer or its width does not exist in this model."""
        count = len(blocks_of(model))
        for layer, edits in self.edits.items():
            if not 0 <= layer < count:
                raise InputError(f"layers: {layer} is not in 0 .. {count - 1} of this model")
            width = site_width(model, layer, self.site)
            for found in {one.width for one in edits} - {width}:
                raise InputError(f"shifts: {found} neurons in layer {layer}; this model has {width}")

    def tensors(self) -> dict[str, Tensor]:
        """One float32 tensor per layer with a constant shift, named ``layer.N``; of other edits one for each part."""
        return {
            f"{name}.{layer}": part
            for layer, edits in self.edits.items()
            for one in edits
            for name, part in zip(one.PARTS, one.tensors, strict=True)
        }

    def facts(self) -> dict[str, Any]:
        """How it was fitted and where it acts."""
        of_kind = {one.KIND for edits in self.edits.values() for one in edits}
        return super().facts() | {"layers": self.layers, "edits": sorted(of_kind)}

    @classmethod
    def with_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """Build a vector from stored fields; ValueError where tensors and facts disagree."""
        cls.check_kind(facts)
        known, asked = kinds(), facts.pop("edits", None) or [Shift.KIND, LowRank.KIND]
        if unknown := set(asked) - set(known):
            raise ValueError(f"edits of kind {min(unknown)!r} are unknown")
        left, edits, layers = dict(tensors), dict[int, tuple[Edit, ...]](), facts.pop("layers")
        for kind, layer in product(sorted(asked, key=lambda name: name != Shift.KIND), layers):
            names = [f"{part}.{layer}" for part in known[kind].PARTS]
            if names[0] in left:
                edits[layer] = (*edits.get(layer, ()), known[kind](*map(left.pop, names)))
        if layers != sorted(edits):
            raise ValueError("its layers are not those of the JSON beside it")
        if left:
            raise ValueError(f"tensor {min(left)!r} is unknown")
        if all(one.is_nothing for some in edits.values() for one in some):
            raise ValueError("all its shifts are 0")
        return cls(edits=edits, **facts | {"opening": tuple(facts["opening"])})
