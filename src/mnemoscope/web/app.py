"""The application: pages, the JSON API, and one way to explain errors. It listens on this machine only."""

from __future__ import annotations

import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnemoscope.cells import version
from mnemoscope.errors import InputError
from mnemoscope.web import api, pages
from mnemoscope.web.admission import Admission
from mnemoscope.web.opened import Jobs, OpenedCells
from mnemoscope.web.runs import Runs
from mnemoscope.web.shapes import NAMELESS

LOOPBACK = "127.0.0.1"
PATIENCE = 2  # seconds for requests in progress, once the server is asked to stop
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
OUTER = ("body", "path", "query", "question", "steering")  # as the library names fields, these are left out


def build_app(root: Path, token: str, first: str | None = None) -> FastAPI:
    """The playground over the runs in a folder.

    Args:
        root: the folder of the run folders.
        token: what a browser or program must know; see ``serve``.
        first: name of the run that is shown first.
    """
    app = FastAPI(title="Mnemoscope", version=version(), docs_url=None, redoc_url=None, lifespan=_until_stopped)
    app.state.runs, app.state.jobs, app.state.first, app.state.token = Runs(root), Jobs(), first, token
    app.state.opened = OpenedCells(app.state.runs)
    # The token is checked by the middleware; this puts it into the description.
    bearer = HTTPBearer(auto_error=False, description="the token in the address that the server printed")
    app.include_router(api.router, dependencies=[Depends(bearer)])
    app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    # The last one added sees a request first.
    app.add_middleware(AuthenticationMiddleware, backend=Admission(token), on_error=_refused)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", LOOPBACK], www_redirect=False)
    app.add_middleware(_with_headers)
    for kind in (InputError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    return app


@asynccontextmanager
async def _until_stopped(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.jobs.stop()
    app.state.opened.close()


def _with_headers(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await app(scope, receive, send_with_headers)

    return answer


def _refused(conn: HTTPConnection, error: Exception) -> Response:
    """The field and what is wrong with it: JSON for programs, a page for people."""
    status, text = 500, f"server: {type(error).__name__}; the log of the server has the rest"
    if isinstance(error, RequestValidationError):
        wrong = error.errors()[0]
        places = () if wrong["type"] == "json_invalid" else wrong["loc"]  # there the place is a character
        where = ".".join(str(part) for part in places if part not in OUTER)
        status, text = 422, f"{where or 'body'}: {wrong['msg']}"
    elif isinstance(error, HTTPException):
        status, text = error.status_code, str(error.detail)
    elif isinstance(error, InputError):
        status, text = 422, str(error).removesuffix(f" (item {NAMELESS!r})")  # nobody gave it that name
    field, found, message = text.partition(": ")
    field, message = (field, message) if found else ("request", text)
    if conn.url.path.startswith(("/api", "/openapi")):
        return JSONResponse({"error": {"field": field, "message": message}}, status)
    server = conn.scope.get("server") or ("", 0)
    return pages.page("error.html", status, field=field, message=message, port=server[1])


def serve(run: str | Path | None, port: int, announce: Callable[[str], object]) -> None:
    """Listen on this machine until stopped.

    Args:
        run: a run folder, shown first; the folders beside it are offered too. None: those in ``runs``.
        announce: called with the address, which holds a token that is new at every start.

    Raises:
        InputError: ``run`` is no run folder or has nothing to show yet, or the port is taken.
    """
    root, first = Path("runs").resolve(), None
    if run is not None:
        folder = Path(run).resolve()
        root, first = folder.parent, folder.name
        if not (folder / "study.yaml").is_file():
            raise InputError(f"RUN: {run} is not a run folder (it has no study.yaml)")
        if not list(folder.glob("cells/*/records/chosen.json")):
            raise InputError(f"RUN: {run} has no cell with steering vectors yet; let its study run to its end first")
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise InputError(f"port: {port} cannot be listened on ({error.strerror}); give another one") from error
    token = secrets.token_urlsafe()
    app = build_app(root, token, first)
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=PATIENCE)
    announce(f"http://{LOOPBACK}:{listener.getsockname()[1]}/?token={token}")
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        app.state.opened.close()  # a second request to stop ends it without the end of its lifespan
