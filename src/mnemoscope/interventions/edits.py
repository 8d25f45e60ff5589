"""What is added to the states of a layer: tensors, and a function of the states.

Shapes: N examples, T tokens, D neurons, K rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from mnemoscope.runs.errors import InputError


@dataclass(frozen=True, eq=False)
class Edit:
    """Base class: all fields are float32 tensors, and a factor scales what is added.

    ``KIND`` names the class in files, ``PARTS`` its fields. A class of a user's own is found by its name once it was
    imported; a file can ask for none that was not.
    """

    KIND: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]

    def added(self, states_NTD: Tensor) -> Tensor:
        """What is added to states, float32 (N, T, D)."""
        raise NotImplementedError

    def __mul__(self, factor: float) -> Self:
        raise NotImplementedError

    def beside(self, other: Self) -> tuple[Self, ...]:
        """The sum of two of a kind, as one where that is possible."""
        return self, other

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is added, whatever the states are."""
        return False

    @property
    def width(self) -> int:
        """Neurons of the states."""
        return self.tensors[0].shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in order."""
        return tuple(getattr(self, one.name) for one in fields(self))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, **{one.name: getattr(self, one.name).to(device) for one in fields(self)})

    def check(self, layer: int) -> None:
        """Raises InputError where a tensor is not finite, or has another shape than it should."""
        if not all(bool(tensor.isfinite().all()) for tensor in self.tensors):
            raise InputError(f"{self.KIND}: layer {layer} has a value that is not finite")


@dataclass(frozen=True, eq=False)
class Shift(Edit):
    """The same for all states: (D,), or (N, D) while it is learned."""

    shift_D: Tensor
    KIND: ClassVar[str] = "shift"
    PARTS: ClassVar[tuple[str, ...]] = ("layer",)

    def added(self, states_NTD: Tensor) -> Tensor:
        """The shift."""
        return self.shift_D

    def __mul__(self, factor: float) -> Shift:
        return Shift(self.shift_D * factor)

    def beside(self, other: Shift) -> tuple[Shift, ...]:
        """One shift."""
        return (Shift(self.shift_D + other.shift_D),)

    @property
    def is_nothing(self) -> bool:
        """Whether it is 0."""
        return not bool(self.shift_D.any())

    def check(self, layer: int) -> None:
        """Raises InputError for another shape than (D,), or a value that is not finite."""
        if self.shift_D.ndim != 1 or not bool(self.shift_D.isfinite().all()):
            shape = tuple(self.shift_D.shape)
            raise InputError(f"shifts: layer {layer} has shape {shape} or a value that is not finite")


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """The states times a factor for each neuron, (D,): -1 erases a neuron, 1 doubles it."""

    factor_D: Tensor
    KIND: ClassVar[str] = "scale"
    PARTS: ClassVar[tuple[str, ...]] = ("factor",)

    def added(self, states_NTD: Tensor) -> Tensor:
        """The states times the factors."""
        return self.factor_D.to(states_NTD) * states_NTD

    def __mul__(self, factor: float) -> Scale:
        return Scale(self.factor_D * factor)

    def beside(self, other: Scale) -> tuple[Scale, ...]:
        """One scale."""
        return (Scale(self.factor_D + other.factor_D),)

    @property
    def is_nothing(self) -> bool:
        """Whether all factors are 0."""
        return not bool(self.factor_D.any())


@dataclass(frozen=True, eq=False)
class LowRank(Edit):
    """A shift that depends on the state: ``(read @ state + bias) @ write``; (K, D), (K,) and (K, D).

    The form of Wu et al. (2024), "ReFT: representation finetuning for language models", arXiv 2404.03592.
    """

    read_KD: Tensor
    bias_K: Tensor
    write_KD: Tensor
    KIND: ClassVar[str] = "low-rank"
    PARTS: ClassVar[tuple[str, ...]] = ("read", "bias", "write")

    def added(self, states_NTD: Tensor) -> Tensor:
        """The shift of each state."""
        with torch.autocast(states_NTD.device.type, enabled=False):  # the bias cancels large parts of what is read
            return (states_NTD.float() @ self.read_KD.T + self.bias_K) @ self.write_KD

    def __mul__(self, factor: float) -> LowRank:
        return replace(self, write_KD=self.write_KD * factor)

    def beside(self, other: LowRank) -> tuple[LowRank, ...]:
        """One shift of both; of the same readings only the writings are added, so that opposites are nothing."""
        if torch.equal(self.read_KD, other.read_KD) and torch.equal(self.bias_K, other.bias_K):
            return (replace(self, write_KD=self.write_KD + other.write_KD),)
        return (LowRank(*(torch.cat(both) for both in zip(self.tensors, other.tensors, strict=True))),)

    @property
    def is_nothing(self) -> bool:
        """Whether it writes nothing."""
        return not bool(self.write_KD.any())

    def check(self, layer: int) -> None:
        """Raises InputError for other shapes than (K, D), (K,) and (K, D), or a value that is not finite."""
        fits = self.read_KD.ndim == 2 and self.read_KD.shape == self.write_KD.shape
        fits = fits and self.bias_K.shape == self.read_KD.shape[:1]
        if not fits or not all(bool(part.isfinite().all()) for part in self.tensors):
            raise InputError(f"low_rank: layer {layer} has other shapes than (K, D), or a value that is not finite")


def kinds() -> dict[str, type[Edit]]:
    """All kinds that were imported, by name."""
    return {one.KIND: one for one in Edit.__subclasses__()}


def as_edits(given: Tensor | Edit | tuple[Edit, ...]) -> tuple[Edit, ...]:
    """The edits of a layer: a tensor (D,) is a shift."""
    if isinstance(given, Tensor):
        return (Shift(given.float()),)
    return (given,) if isinstance(given, Edit) else tuple(given)


def summed(first: tuple[Edit, ...], second: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """Both at once, those of a kind as one where that is possible."""
    found: dict[type[Edit], tuple[Edit, ...]] = {type(one): (one,) for one in first}
    for one in second:
        there = found.get(type(one))
        found[type(one)] = there[-1].beside(one) if there else (one,)
    return tuple(one for some in found.values() for one in some)
