"""The application: pages, the JSON API, and one way to say what is wrong."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mnemoscope.cells import version
from mnemoscope.errors import InputError
from mnemoscope.web import api, pages
from mnemoscope.web.busy import BusyError
from mnemoscope.web.guards import Guard
from mnemoscope.web.jobs import Jobs
from mnemoscope.web.opened import OpenedCells
from mnemoscope.web.rooms import Rooms
from mnemoscope.web.shapes import NAMELESS

PATIENCE = 2  # seconds in which what is being answered may end, once the server is told to stop
HERE = ("localhost", "127.0.0.1", "::1")


def build_app(root: Path, first: str | None = None, token: str | None = None, host: str = "127.0.0.1") -> FastAPI:
    """The playground over the runs in a folder.

    Args:
        root: the folder of the run folders.
        first: name of the run that is shown first.
        token: without it nothing is answered; None where only this machine can ask.
        host: where it listens; on loopback it answers to no other name, whoever has it point here.

    Raises:
        InputError: others can reach it, and there is no token.
    """
    check_token(host, token)
    app = FastAPI(title="Mnemoscope", version=version(), docs_url=None, redoc_url=None, lifespan=_until_stopped)
    app.state.rooms, app.state.jobs, app.state.first = Rooms(root), Jobs(), first
    app.state.opened = OpenedCells(app.state.rooms)
    # The guard asks for the token; this says so in the description.
    bearer = [Depends(HTTPBearer(auto_error=False, description="the token that the server was started with"))]
    app.include_router(api.router, dependencies=bearer if token else [])
    app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    hosts = {*HERE, host} if is_loopback(host) else None
    app.add_middleware(Guard, hosts=hosts, token=token, refused=_refused)

    @app.exception_handler(InputError)
    async def refuse_input(request: Request, error: InputError) -> Response:
        field, _, message = str(error).partition(": ")
        status = 429 if isinstance(error, BusyError) else 422
        message = message.removesuffix(f" (item {NAMELESS!r})")  # nobody gave it that name
        return _refused(request.url.path, status, field if message else "request", message or field)

    @app.exception_handler(RequestValidationError)
    async def refuse_shape(request: Request, error: RequestValidationError) -> Response:
        wrong = error.errors()[0]
        broken = wrong["type"] == "json_invalid"  # its place is a character
        outer = ("body", "path", "query", "question", "turning")  # as the library names its fields
        where = "" if broken else ".".join(str(part) for part in wrong["loc"] if part not in outer)
        return _refused(request.url.path, 422, where or "body", str(wrong["msg"]))

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        field, _, message = str(error.detail).partition(": ")
        return _refused(request.url.path, error.status_code, field if message else "request", message or field)

    @app.exception_handler(Exception)
    async def own_up(request: Request, error: Exception) -> Response:
        return _refused(request.url.path, 500, "server", f"{type(error).__name__}; the log of the server has the rest")

    return app


@asynccontextmanager
async def _until_stopped(app: FastAPI) -> AsyncIterator[None]:
    yield
    _stop(app)


def _stop(app: FastAPI) -> None:
    """Whoever stops the server does not wait for long work."""
    app.state.jobs.stop()
    app.state.opened.close()


def _refused(path: str, status: int, field: str, message: str) -> Response:
    """JSON for programs, a page for people."""
    if path.startswith(("/api", "/openapi")):
        return JSONResponse({"error": {"field": field, "message": message}}, status)
    return pages.error_page(status, field, message)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_token(host: str, token: str | None) -> None:
    """Raises InputError where a network could ask without a token."""
    if not is_loopback(host) and not token:
        raise InputError(f"token: others can reach {host}; give a token that they must know (--token)")


def check_reachable(run: Path | None, host: str, port: int, token: str | None) -> None:
    """Raises InputError where a network could ask without a token, the port is taken, or ``run`` is no run folder."""
    check_token(host, token)
    if run is not None:
        if not (run / "study.yaml").is_file():
            raise InputError(f"RUN: {run} is not a run folder (it has no study.yaml)")
        if not Rooms(run.resolve().parent).cells(run.resolve().name):
            raise InputError(f"RUN: {run} has no cell with steering vectors yet; let its study run to its end first")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise InputError(f"port: {host}:{port} cannot be listened on ({error.strerror}); give another one") from error


def serve(run: Path | None, host: str, port: int, token: str | None) -> None:
    """Listen until stopped; see ``check_reachable``.

    Args:
        run: a run folder, shown first; the folders beside it are offered too. None: those in ``runs``.
    """
    import uvicorn

    root = run.resolve().parent if run is not None else Path("runs").resolve()
    app = build_app(root, run.resolve().name if run is not None else None, token, host)
    options: dict[str, Any] = {"log_level": "warning", "server_header": False, "timeout_graceful_shutdown": PATIENCE}
    try:
        uvicorn.run(app, host=host, port=port, **options)
    finally:
        _stop(app)  # whoever asks twice to stop is not waited for at all
