"""The command line: arguments in, calls, output. Heavy imports happen inside the commands."""

from mnemoscope.cli import commands
from mnemoscope.cli.shared import app


def main() -> None:
    """Entry point of the ``mnemoscope`` command."""
    app()
