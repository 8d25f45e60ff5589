"""The two kinds of error that a user is told in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

STOPPED = "stopped; run the same command again to go on"  # what Ctrl-C is told


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the field, the value and what is allowed."""


class StudyError(RuntimeError):
    """A study that cannot go on; the message says why and what to do."""


def meant(given: str, known: Iterable[str]) -> str:
    """What a mistyped name most likely stands for, as the end of a message; "" where nothing is like it."""
    return "".join(f"; did you mean {name}?" for name in get_close_matches(given, list(known), 1))
