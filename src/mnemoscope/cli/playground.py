"""The command that opens the playground."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from mnemoscope.cli.app import app
from mnemoscope.cli.output import one_line_errors


@app.command()
def serve(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder; default: those in runs/.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine need --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    token: Annotated[str | None, typer.Option(help="A secret that whoever asks must know.")] = None,
) -> None:
    """Open the playground: watch a model decide, and turn it."""
    with one_line_errors():
        from mnemoscope.errors import InputError

        # The pages say that nothing leaves this machine: what is not in the library's cache is not asked for.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            from mnemoscope.web import check_reachable, serve
        except ImportError as error:
            raise InputError("serve: needs FastAPI and uvicorn: pip install 'mnemoscope[web]'") from error
        check_reachable(run, host, port, token)
        query = f"?token={quote(token)}" if token else ""
        name = "localhost" if host == "127.0.0.1" else f"[{host}]" if ":" in host else host
        typer.echo(f"http://{name}:{port}/{query}", err=True)
        serve(run, host, port, token)
