"""The command line itself, on which the commands are hung."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="mnemoscope",
    help="Is a language model remembering or thinking? Measure it, see which neurons separate the two, and steer it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
