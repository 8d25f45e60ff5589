"""The two kinds of error that a user is told in one line."""

from __future__ import annotations

STOPPED = "stopped; run the same command again to go on"  # what Ctrl-C is told


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the field, the value and what is allowed."""


class StudyError(RuntimeError):
    """A study that cannot go on; the message says why and what to do."""
