"""More is asked than can be answered."""

from __future__ import annotations

from mnemoscope.errors import InputError


class BusyError(InputError):
    """There is too much to do already."""
