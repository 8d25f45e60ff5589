"""The command line: arguments in, calls, output. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from typing import Any

from mnemoscope.runs.errors import STOPPED


def main() -> None:
    """Entry point of the ``mnemoscope`` command."""
    try:
        __getattr__("app")()
    except (SystemExit, KeyboardInterrupt) as ended:
        if isinstance(ended, SystemExit) and ended.code != 130:
            raise
        if isinstance(ended, KeyboardInterrupt):  # before typer began
            print(f"error: {STOPPED}", file=sys.stderr, flush=True)
        os._exit(130)  # threads and exit handlers of libraries would wait, or print


def __getattr__(name: str) -> Any:
    if name != "app":  # imported when first asked for, so that a command can be stopped while it is
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mnemoscope.cli import auditing, commands, reading, using
    from mnemoscope.cli.shared import app

    assert all((auditing, commands, reading, using)), "they register themselves"
    return app
