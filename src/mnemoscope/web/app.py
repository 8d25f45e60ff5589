"""The application: who is answered, the pages, one way to explain errors, and its server, which listens on loopback."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import jinja2
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from mnemoscope.config import NAME
from mnemoscope.report import page_style
from mnemoscope.runs.digests import check_run, intact
from mnemoscope.runs.errors import InputError
from mnemoscope.study.cells import version
from mnemoscope.web import api
from mnemoscope.web.connections import MOST, WithDeadline
from mnemoscope.web.runs import OpenedCells, Runs
from mnemoscope.web.shapes import NAMELESS

LOOPBACK = "127.0.0.1"
UNFINISHED = "no cell with steering vectors yet; the command that began it goes on with it"
PATIENCE = 2  # seconds for requests in progress, once the server is asked to stop
LOOKING = 2  # looks at neurons at a time, whose steps alternate with requests
HEADERS = [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("X-Frame-Options", "DENY")]
NOTHING_ELSE = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
# Of a page that came with a run: no scripts, no forms, nothing loaded, and it leads nowhere by itself (``sandbox``).
INLINE = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'; sandbox"
)
OUTER = ("body", "path", "query", "question", "steering")  # as the library names fields, these are left out
LARGEST_BODY = 64 * 1024  # bytes
OPEN = ("/report.css", "/static/playground.css", "/static/icon.svg")  # the page that asks for the token needs them
FOR_PROGRAMS = ("/api", "/openapi")
ENTRANCE = "/"  # the one page that takes the token from its address

Name = Annotated[str | None, Query(pattern=NAME)]
HERE = Path(__file__).parent
_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
router = APIRouter(include_in_schema=False)


class Admission:
    """Answers requests of other sites' pages (403), without the token (401), or of a large body (411, 413) itself."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        answer = self._app
        if scope["type"] in ("http", "websocket"):
            conn = HTTPConnection(scope)
            if refusal := self._refusal(conn):
                answer = _refused(conn, HTTPException(*refusal))
        await answer(scope, receive, send)

    def _refusal(self, conn: HTTPConnection) -> tuple[int, str] | None:
        headers, path = conn.headers, conn.scope["path"]  # an address is built of the Host header too
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
        foreign = foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        # Of what a page of another site can make a browser do, only following a link to a page is as good as typing its
        # address; nobody types those of the API.
        follows = conn.scope.get("method") == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if foreign and not (follows and not path.startswith(FOR_PROGRAMS)):
            return 403, "origin: pages of other sites may not ask"
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer if scheme.lower() == "bearer" else "", conn.cookies.get(_cookie_name(conn), "")]
        given += [conn.query_params.get("token", "")] if path == ENTRANCE else []
        if path not in OPEN and not any(secrets.compare_digest(g.encode(), self._token.encode()) for g in given):
            return 401, "token: missing or wrong"
        if "transfer-encoding" in headers:
            return 411, "body: its length must be given"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return 413, f"body: at most {LARGEST_BODY} bytes are read"
        return None


def _cookie_name(conn: HTTPConnection) -> str:
    """Named by the port in the address: browsers share cookies between all ports of a host."""
    port = conn.headers.get("host", "").rpartition(":")[2]
    return f"mnemoscope-{port if port.isdigit() else 'None'}"


def _page(name: str, status: int = 200, **facts: Any) -> HTMLResponse:
    """A page; it may load nothing from elsewhere."""
    shown: dict[str, str] = {key: facts[key] for key in ("run", "cell") if key in facts}
    facts |= {"here": name.removesuffix(".html"), "shown": f"?{urlencode(shown)}" if shown else ""}
    text = _environment.get_template(name).render(**facts)
    return HTMLResponse(text, status, {"Content-Security-Policy": NOTHING_ELSE})


def _page_of_cell(template: str, request: Request, run: str | None, cell: str | None) -> HTMLResponse:
    """A page of one cell; another page where there is nothing to show."""
    found: Runs = request.app.state.runs
    with_cells = [name for name in found.names() if found.cells(name)]
    if run is None:
        preferred = [name for name in (request.app.state.first, "quickstart") if name in with_cells]
        run = next(iter([*preferred, *with_cells]), None)
    if run is None:
        return _page("nothing.html", root=found.root)
    cells = found.cells(run)
    if not cells:
        raise InputError(f"run: {run} has {UNFINISHED}")
    # The form of another run still holds the cell of the one before.
    return _page(template, run=run, cell=cell if cell in cells else cells[0], runs=with_cells, cells=cells)


@router.get(ENTRANCE)
def playground(request: Request, run: Name = None, cell: Name = None, token: str | None = None) -> Response:
    """A question, and the model's answer to it with and without steering."""
    if token is None:
        return _page_of_cell("playground.html", request, run, cell)
    # From now on a cookie has the token, which scripts cannot read and pages of other sites do not send; neither the
    # address bar nor the history keeps it.
    asked = urlencode([(key, value) for key, value in request.query_params.multi_items() if key != "token"])
    entered = RedirectResponse(f"{ENTRANCE}?{asked}" if asked else ENTRANCE, 303)
    entered.set_cookie(_cookie_name(request), request.app.state.token, httponly=True, samesite="strict")
    return entered


@router.get("/neurons")
def neurons(request: Request, run: Name = None, cell: Name = None) -> HTMLResponse:
    """The map of neurons."""
    return _page_of_cell("neurons.html", request, run, cell)


@router.get("/sources")
def sources(request: Request, run: Name = None, cell: Name = None) -> HTMLResponse:
    """A document, a question, and where each part of the answer comes from."""
    return _page_of_cell("sources.html", request, run, cell)


@router.get("/runs")
def runs(request: Request) -> HTMLResponse:
    """Every run, with its report and its playground."""
    found: Runs = request.app.state.runs
    listed = [found.facts(name) for name in found.names()]
    return _page("runs.html", runs=listed) if listed else _page("nothing.html", root=found.root)


@router.get("/runs/{run}/report")
def report(request: Request, run: str) -> FileResponse:
    """The report of a run, unchanged."""
    path = request.app.state.runs.folder(run) / "report.html"
    if not path.is_file():
        raise InputError(f"run: {run} has no report yet")
    return FileResponse(intact(path), media_type="text/html", headers={"Content-Security-Policy": INLINE})


@router.get("/report.css")
def style() -> Response:
    """The report's style sheet."""
    return Response(page_style(), media_type="text/css")


def build_app(runs: Runs, token: str, first: str | None = None) -> FastAPI:
    """The playground over runs, for those who know the token; it shows run ``first`` first."""
    app = FastAPI(title="Mnemoscope", version=version(), docs_url=None, redoc_url=None)
    # A redirect to a path with or without its last "/" would also be one to "//another.site".
    app.router.redirect_slashes = False
    app.state.runs, app.state.token, app.state.first = runs, token, first
    app.state.opened, app.state.looking = OpenedCells(runs), asyncio.Semaphore(LOOKING)
    # The token is checked by the middleware; this puts it into the description.
    bearer = HTTPBearer(auto_error=False, description="the token in the address that the server printed")
    app.include_router(api.router, dependencies=[Depends(bearer)])
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    # The last one added sees a request first.
    app.add_middleware(Admission, token=token)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", LOOPBACK], www_redirect=False)
    for kind in (InputError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    return app


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
    if conn.scope["path"].startswith(FOR_PROGRAMS):
        return JSONResponse({"error": {"field": field, "message": message}}, status)
    server = conn.scope.get("server") or ("", 0)
    return _page("error.html", status, field=field, message=message, port=server[1])


def server_of(app: FastAPI) -> uvicorn.Server:
    """The server of an application, with limits on what clients may hold, and headers of every answer."""
    options: dict[str, Any] = {"http": WithDeadline, "limit_concurrency": MOST, "headers": HEADERS}
    options |= {"log_level": "warning", "server_header": False, "timeout_graceful_shutdown": PATIENCE}
    return uvicorn.Server(uvicorn.Config(app, **options))


def serve(
    run: str | Path | None,
    port: int,
    announce: Callable[[str], object],
    siblings: bool = False,
    model: str | None = None,
) -> None:
    """Listen on this machine until stopped; shows a run folder (None: those in ``runs``).

    With ``siblings`` the runs beside it are shown too; ``model`` is that of runs whose study did not train one.

    ``announce`` is called with the address, which holds a token that is new at every start. InputError where ``run`` is
    no run folder or has nothing to show yet, or the port is taken.
    """
    root, first = Path("runs").resolve(), None
    if run is not None:
        check_run(Path(run))
        folder = Path(run).resolve()
        root, first = folder.parent, folder.name
        if not re.fullmatch(NAME, first):
            raise InputError(f"RUN: {first!r} cannot be part of an address; letters, digits and any of _.- are wanted")
        if not Runs(root).cells(first):
            raise InputError(f"RUN: {run} has {UNFINISHED}")
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise InputError(f"port: {port} cannot be listened on ({error.strerror}); give another one") from error
    token = secrets.token_urlsafe()
    app = build_app(Runs(root, None if siblings else first, model), token, first)
    announce(f"http://{LOOPBACK}:{listener.getsockname()[1]}/?token={token}")
    try:
        server_of(app).run(sockets=[listener])
    finally:
        app.state.opened.close()
