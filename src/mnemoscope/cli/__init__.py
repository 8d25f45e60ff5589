"""The command line: arguments in, calls, output. Heavy imports happen inside the commands."""

from __future__ import annotations

from typing import Any


def main() -> None:
    """Entry point of the ``mnemoscope`` command."""
    from mnemoscope.cli.ending import one_line

    with one_line():
        __getattr__("app")()


def __getattr__(name: str) -> Any:
    if name != "app":  # imported when first asked for, so that a command can be stopped while it is
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mnemoscope.cli import commands, emerging, using
    from mnemoscope.cli.shared import app

    assert commands, "they register themselves"
    assert emerging, "they register themselves"
    assert using, "they register themselves"
    return app
