"""The two behaviours that a model is steered to: their one type, and the words that users may say for them."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from mnemoscope.runs.errors import InputError, meant

Direction = Literal["to_generalized", "to_memorized"]
ALSO = {"context": "generalized", "memory": "memorized"}  # what users of documents call them


class Toward(StrEnum):
    """A behaviour to steer to: equal to its name, and written as it. Members are in the order of a pair's sides."""

    GENERALIZED = "generalized"
    MEMORIZED = "memorized"

    __repr__ = str.__repr__  # messages show it as the text that it is

    @classmethod
    def of(cls, name: object, field: str = "toward") -> Toward:
        """The behaviour that a name means: itself, ``context`` or ``memory``, or a direction, in upper or lower case.

        Raises:
            InputError: it means none; the ``field``, its value and the nearest name are named.
        """
        said = str(name).strip().lower().removeprefix("to_")
        if (known := ALSO.get(said, said)) in ("generalized", "memorized"):
            return cls(known)
        known = f"{', '.join(cls)}; of documents: {', '.join(ALSO)}"
        raise InputError(f"{field}: {name!r} is not one of {known}{meant(said, (*cls, *ALSO))}")

    @classmethod
    def _missing_(cls, value: object) -> Toward:
        return cls.of(value)

    @property
    def opposite(self) -> Toward:
        """The other behaviour, which steering starts from."""
        return Toward.MEMORIZED if self is Toward.GENERALIZED else Toward.GENERALIZED

    @property
    def direction(self) -> Direction:
        """The way to it, as records and files name it."""
        return "to_generalized" if self is Toward.GENERALIZED else "to_memorized"

    @property
    def sign(self) -> int:
        """Of a difference of states, generalized minus memorized, that leads to it."""
        return 1 if self is Toward.GENERALIZED else -1
