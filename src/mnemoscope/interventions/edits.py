"""What is done to the states of a layer: tensors, and a function of the states.

Shapes: N prompts, T tokens, D neurons, K rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from mnemoscope.models import prompts_of_rows
from mnemoscope.runs.errors import InputError


@dataclass(frozen=True, eq=False)
class Edit:
    """Base class: all fields are float32 tensors, and a factor scales the last one; where it is 0 nothing is added.

    A tensor (N, ., .) has a row for each prompt. ``KIND`` names the class in files, ``PARTS`` its fields. A class of a
    user's own is found by its name once it was imported; a file can ask for none that was not.
    """

    KIND: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]

    def added(self, states_NTD: Tensor) -> Tensor:
        """What is added to states, float32 (N, T, D)."""
        raise NotImplementedError

    def changed(self, states_NTD: Tensor) -> Tensor:
        """The states behind it, of their own dtype."""
        return states_NTD + self.added(states_NTD).to(states_NTD.dtype)

    def __mul__(self, factor: float | Tensor) -> Self:
        *others, last = self.tensors
        return self._of(*others, last * factor)

    def _of(self, *tensors: Tensor) -> Self:
        return replace(self, **dict(zip((one.name for one in fields(self)), tensors, strict=True)))

    def __add__(self, other: Self) -> Self:
        """The sum of two of a kind; InputError where they differ in more than the last tensor."""
        *mine, last = self.tensors
        *theirs, more = other.tensors
        if not all(map(torch.equal, mine, theirs)):
            raise InputError(f"edits: two of kind {self.KIND} in a layer cannot be added")
        return self._of(*mine, last + more)

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is added, whatever the states are."""
        return not bool(self.tensors[-1].any())

    @property
    def width(self) -> int:
        """Neurons of the states."""
        return self.tensors[0].shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in order."""
        return tuple(getattr(self, one.name) for one in fields(self))

    @property
    def prompts(self) -> int | None:
        """For how many prompts it has rows; None: it is the same for all."""
        return next((len(tensor) for tensor in self.tensors if tensor.ndim > 2), None)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self._of(*(tensor.to(device) for tensor in self.tensors))

    def of_rows(self, rows: int) -> Self:
        """The same for the rows of a pass, some of which may be of one prompt."""
        if self.prompts is None:
            return self
        index_R = prompts_of_rows(rows, self.prompts).to(self.tensors[-1].device)
        return self._of(*(tensor[index_R] if tensor.ndim > 2 else tensor for tensor in self.tensors))

    def check(self, layer: int) -> None:
        """Raises InputError where a tensor is not finite, or its shape is not that of one for all prompts."""
        try:
            self.added(torch.zeros(1, 1, self.width)).expand(1, 1, self.width)
            fits = all(bool(tensor.isfinite().all()) for tensor in self.tensors)
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors)
            raise InputError(f"{self.KIND}: layer {layer} has shape {shapes} or a value that is not finite")


@dataclass(frozen=True, eq=False)
class Shift(Edit):
    """The same for all states, (D,)."""

    shift_D: Tensor
    KIND: ClassVar[str] = "shift"
    PARTS: ClassVar[tuple[str, ...]] = ("layer",)

    def added(self, states_NTD: Tensor) -> Tensor:
        """The shift."""
        return self.shift_D


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """The states times a factor for each neuron, (D,): -1 erases a neuron, 1 doubles it."""

    factor_D: Tensor
    KIND: ClassVar[str] = "scale"
    PARTS: ClassVar[tuple[str, ...]] = ("factor",)

    def added(self, states_NTD: Tensor) -> Tensor:
        """The states times the factors."""
        return self.factor_D.to(states_NTD) * states_NTD


@dataclass(frozen=True, eq=False)
class Held(Edit):
    """Neurons held at values, (D,), as ablations and patches do: ``share``, (D,), is how far they go there, 1: all."""

    value_D: Tensor
    share_D: Tensor
    KIND: ClassVar[str] = "held"
    PARTS: ClassVar[tuple[str, ...]] = ("value", "share")

    def added(self, states_NTD: Tensor) -> Tensor:
        """The difference to the values, times the share."""
        return self.share_D * (self.value_D - states_NTD)

    def changed(self, states_NTD: Tensor) -> Tensor:
        """The values themselves, without rounding, where they are reached."""
        return torch.where(self.share_D == 1, self.value_D.to(states_NTD.dtype), super().changed(states_NTD))


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

    def __add__(self, other: LowRank) -> LowRank:
        """One shift of both, also where they read something else."""
        if all(map(torch.equal, self.tensors[:-1], other.tensors[:-1])):
            return super().__add__(other)
        return LowRank(*map(torch.cat, zip(self.tensors, other.tensors, strict=True)))


def kinds() -> dict[str, type[Edit]]:
    """All kinds that were imported, by name."""
    return {one.KIND: one for one in Edit.__subclasses__()}


def as_edits(given: Tensor | Edit | tuple[Edit, ...]) -> tuple[Edit, ...]:
    """The edits of a layer: a tensor (D,), or (N, D) with one for each prompt, is a shift."""
    if isinstance(given, Tensor):
        return (Shift(given.float() if given.ndim < 2 else given.float()[:, None]),)
    return (given,) if isinstance(given, Edit) else tuple(given)


def summed(first: tuple[Edit, ...], second: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """Both at once, those of a kind as one."""
    found: dict[type[Edit], Edit] = {type(one): one for one in first}
    for one in second:
        found[type(one)] = found[type(one)] + one if type(one) in found else one
    return tuple(found.values())
