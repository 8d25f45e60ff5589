"""The two kinds of error that a user is told in one line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

STOPPED = "stopped; run the same command again to go on"  # what Ctrl-C is told


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the field, the value and what is allowed."""


class StudyError(RuntimeError):
    """A study that cannot go on; the message says why and what to do."""


def first_line(error: BaseException) -> str:
    """Why something failed: the first line of an error's text, else its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Raise one InputError, ``what`` and the reason, for all that libraries raise inside; they have many kinds."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({first_line(error)})") from error


def check_one_of(field: str, value: object, allowed: Collection[object]) -> None:
    """Raises InputError where a value is not one of those that are allowed."""
    if value not in allowed:
        raise InputError(f"{field}: {value!r} is not one of {', '.join(map(str, allowed)) or 'none'}")


def meant(given: str, known: Iterable[str]) -> str:
    """What a mistyped name most likely stands for, as the end of a message; "" where nothing is like it."""
    return "".join(f"; did you mean {name}?" for name in get_close_matches(given, list(known), 1))
