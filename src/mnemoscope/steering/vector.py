"""Steering vectors: a shift per layer, constant or by the state, that steers a model towards one behaviour.

Shapes: N examples, L layers, D neurons, K rank of a shift that depends on the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from mnemoscope.errors import InputError
from mnemoscope.models import EVERY_SITE, Site, blocks_of, site_width
from mnemoscope.schemas import VectorFacts
from mnemoscope.steering.artefact import Artefact
from mnemoscope.steering.hooks import Gate, LowRank, Positions, shifted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Toward = Literal["generalized", "memorized"]
PARTS = ("read", "bias", "write")  # tensors of a low-rank shift, in its order
OPPOSITE: dict[Toward, Toward] = {"generalized": "memorized", "memorized": "generalized"}


@dataclass(frozen=True, repr=False)
class SteeringVector(Artefact):
    """A shift for one direction of steering.

    Attributes:
        toward: the behaviour it steers to.
        shifts: float32 (D,) per 0-based layer; layers without a shift are absent.
        low_rank: per layer a shift that depends on the state; both are added.
        site: where in a layer the shift is added.
        positions: ``decision``: from the decision position on, every decoded token included; ``all``: everywhere.
        method, top, strength: how it was fitted; for the reader. ``unit``: what strength is counted in, the ``norm`` of
            the layer's states or each neuron's ``spread``.
        begin_alike: share of the prompts it was fitted on whose two answers begin with the same tokens. Their decision
            position is the last of these, where ``apply`` starts at the last token of the prompt.
        opening: token ids that begin every prompt of the chat template; empty without one.
    """

    toward: Toward
    shifts: Mapping[int, Tensor]
    site: Site = "block"
    positions: Positions = "decision"
    method: str = "custom"
    top: float = 1.0
    strength: float = 1.0
    unit: Literal["norm", "spread"] = "norm"
    begin_alike: float = 0.0
    opening: tuple[int, ...] = ()
    low_rank: Mapping[int, LowRank] = field(default_factory=dict)

    WHAT: ClassVar[str] = "vector"
    STORED: ClassVar[tuple[str, ...]] = ("shifts", "low_rank")
    FACTS: ClassVar[Any] = VectorFacts

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("toward", self.toward, tuple(OPPOSITE)),
            ("site", self.site, EVERY_SITE),
            ("positions", self.positions, ("decision", "all")),
        ):
            if value not in allowed:
                raise InputError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        for layer, shift in self.shifts.items():
            if shift.ndim != 1 or not bool(shift.isfinite().all()):
                raise InputError(f"shifts: layer {layer} has shape {tuple(shift.shape)} or a value that is not finite")
        kept = {layer: shift.float() for layer, shift in sorted(self.shifts.items()) if bool(shift.any())}
        object.__setattr__(self, "shifts", kept)
        for layer, edit in self.low_rank.items():
            fits = edit.read_KD.ndim == 2 and edit.read_KD.shape == edit.write_KD.shape
            fits = fits and edit.bias_K.shape == edit.read_KD.shape[:1]
            if not fits or not all(bool(part.isfinite().all()) for part in edit):
                raise InputError(f"low_rank: layer {layer} has other shapes than (K, D), or a value that is not finite")
        acting = {layer: edit for layer, edit in sorted(self.low_rank.items()) if bool(edit.write_KD.any())}
        object.__setattr__(self, "low_rank", acting)

    def __repr__(self) -> str:
        where = f"{self.site} of layers {', '.join(map(str, self.layers)) or 'none'}"
        return (
            f"SteeringVector(to {self.toward}: {self.method} at {where}, strength {self.strength:g} "
            f"{self.unit}, {self.positions})"
        )

    @property
    def layers(self) -> list[int]:
        """The layers that are shifted, ascending."""
        return sorted({*self.shifts, *self.low_rank})

    def dense(self, layers: int, neurons: int) -> np.ndarray:
        """All constant shifts as a float32 array (L, D), zero where there is none."""
        shift_LD = np.zeros((layers, neurons), np.float32)
        for layer, shift in self.shifts.items():
            shift_LD[layer] = shift.numpy()
        return shift_LD

    def with_dense(self, shift_LD: np.ndarray) -> SteeringVector:
        """The same vector with these constant shifts, and no others."""
        return replace(self, low_rank={}, shifts=dict(enumerate(torch.from_numpy(shift_LD.astype(np.float32)))))

    def __mul__(self, factor: float) -> SteeringVector:
        if factor < 0:
            return -(self * -factor)
        shifts = {layer: shift * factor for layer, shift in self.shifts.items()}
        low_rank = {layer: edit * factor for layer, edit in self.low_rank.items()}
        return replace(self, shifts=shifts, low_rank=low_rank, strength=self.strength * factor)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        """The opposite shift; it steers to the other behaviour."""
        shifts = {layer: -shift for layer, shift in self.shifts.items()}
        low_rank = {layer: edit * -1.0 for layer, edit in self.low_rank.items()}
        return replace(self, toward=OPPOSITE[self.toward], shifts=shifts, low_rank=low_rank)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """Both shifts at once, each by the state before, in this vector's direction.

        Raises InputError for another site, position, model or opening.
        """
        for name in ("site", "positions", "binding", "opening"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(f"{name}: {getattr(self, name)!r} and {getattr(other, name)!r} cannot be added")
        both = {layer: self.shifts[layer] + other.shifts[layer] for layer in self.shifts.keys() & other.shifts.keys()}
        low_rank = {**self.low_rank, **other.low_rank}
        for layer in self.low_rank.keys() & other.low_rank.keys():
            low_rank[layer] = self.low_rank[layer].beside(other.low_rank[layer])
        shifts, method = {**self.shifts, **other.shifts, **both}, f"{self.method}+{other.method}"
        return replace(self, shifts=shifts, low_rank=low_rank, method=method)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + replace(-other, method=other.method)

    @contextmanager
    def apply(
        self,
        model: PreTrainedModel,
        alpha: float | Sequence[float] | Tensor = 1.0,
        start: int | None = None,
        gate: Gate | None = None,
    ) -> Iterator[None]:
        """Shift the model's states inside the context; use any forward pass or ``generate`` in it.

        Args:
            alpha: factor on the shift, or one for each prompt of the batch (N,); beams and samples of a prompt share
                its factor. 0 leaves the model untouched, bit by bit.
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
        factor = torch.as_tensor(alpha, dtype=torch.float32).cpu()
        if factor.ndim > 1 or not bool(factor.isfinite().all()):
            raise InputError(f"alpha: {alpha} is neither a finite number nor one for each prompt")
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
        scaled = {layer: factor[..., None] * shift_D for layer, shift_D in self.shifts.items()}
        edits = {layer: (edit, factor) for layer, edit in self.low_rank.items()}
        with shifted(model, scaled, self.site, self.positions, start, gate, self.opening, edits):
            yield

    def check_shape(self, model: PreTrainedModel) -> None:
        """Raises InputError where a layer or its width does not exist in this model."""
        count = len(blocks_of(model))
        widths = [(layer, len(shift)) for layer, shift in self.shifts.items()]
        for layer, found in widths + [(layer, edit.read_KD.shape[1]) for layer, edit in self.low_rank.items()]:
            if not 0 <= layer < count:
                raise InputError(f"layers: {layer} is not in 0 .. {count - 1} of this model")
            width = site_width(model, layer, self.site)
            if found != width:
                raise InputError(f"shifts: {found} neurons in layer {layer}; this model has {width}")

    def tensors(self) -> dict[str, Tensor]:
        """One float32 tensor per layer with a constant shift, three per layer with one that depends on the state."""
        parts = {
            f"{name}.{layer}": part
            for layer, edit in self.low_rank.items()
            for name, part in zip(PARTS, edit, strict=True)
        }
        return {f"layer.{layer}": shift for layer, shift in self.shifts.items()} | parts

    def facts(self) -> dict[str, Any]:
        """How it was fitted and where it acts."""
        return super().facts() | {"layers": self.layers}

    @classmethod
    def with_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """Build a vector from stored fields; ValueError where tensors and facts disagree."""
        named: dict[tuple[str, int], Tensor] = {}
        for full, tensor in tensors.items():
            name, layer = full.split(".")
            named[name, int(layer)] = tensor
        shifts = {layer: shift for (name, layer), shift in named.items() if name == "layer"}
        edited = [layer for name, layer in named if name == PARTS[0]]
        low_rank = {layer: LowRank(*(named[name, layer] for name in PARTS)) for layer in edited}
        unknown = {name for name, _ in named} - {"layer", *PARTS}
        if unknown:
            raise ValueError(f"tensor {min(unknown)!r} is unknown")
        if facts.pop("layers") != sorted({*shifts, *low_rank}):
            raise ValueError("its layers are not those of the JSON beside it")
        made = cls(shifts=shifts, low_rank=low_rank, **facts | {"opening": tuple(facts["opening"])})
        if not made.layers:
            raise ValueError("all its shifts are 0")
        return made


def scaled_to(shift_LD: np.ndarray, norm_L: np.ndarray) -> np.ndarray:
    """Scale each layer's shift to a norm; a layer without a shift keeps none."""
    found_L = np.linalg.norm(shift_LD, axis=1)
    return shift_LD * np.divide(norm_L, found_L, out=np.zeros_like(found_L), where=found_L > 0)[:, None]
