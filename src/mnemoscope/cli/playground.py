"""The command that opens the playground."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mnemoscope.cli.app import app
from mnemoscope.cli.output import one_line_errors


@app.command()
def serve(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder; default: those in runs/.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Open the playground: ask a model in the browser, and steer its answers.

    It listens on this machine only and prints an address with a token, new at every start. From another machine,
    forward the port (ssh -L 8000:127.0.0.1:8000 USER@MACHINE) and open the same address there.
    """
    with one_line_errors():
        from mnemoscope.errors import InputError

        # The pages say that nothing leaves this machine: what is not in the library's cache is not downloaded.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            from mnemoscope.web.app import serve
        except ImportError as error:
            raise InputError("serve: needs FastAPI and uvicorn: pip install 'mnemoscope[web]'") from error
        serve(run, port, lambda address: typer.echo(address, err=True))
