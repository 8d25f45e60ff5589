"""The command line: arguments in, calls, output. Heavy imports happen inside the commands."""

from mnemoscope.cli import studies, models  # isort: skip - the order of the commands in the help
from mnemoscope.cli.shared import app


def main() -> None:
    """Entry point of the ``mnemoscope`` command."""
    app()
