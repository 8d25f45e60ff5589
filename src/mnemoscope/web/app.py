"""The application: who is answered, the pages, the JSON API, one way to explain errors. It listens on loopback only."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import jinja2
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnemoscope.report import compare_briefs, page_style
from mnemoscope.runs.digests import intact
from mnemoscope.runs.errors import InputError
from mnemoscope.study.cells import version
from mnemoscope.web import api
from mnemoscope.web.connections import MOST, WithDeadline
from mnemoscope.web.runs import NAME, Jobs, OpenedCells, Runs
from mnemoscope.web.shapes import NAMELESS

LOOPBACK = "127.0.0.1"
UNFINISHED = "no cell with steering vectors yet; the command that began it goes on with it"
PATIENCE = 2  # seconds for requests in progress, once the server is asked to stop
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
NOTHING_ELSE = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
# Of a page that came with a run: none of its scripts (those of a browser's own tools run), no forms, nothing loaded.
INLINE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'; "
INLINE += "sandbox allow-scripts"
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


class RefusedError(AuthenticationError, HTTPException):
    """A request that is not answered, with its status and "field: message"."""


class Admission(AuthenticationBackend):
    """Refuses requests of other sites' pages, without the token, or with a large body."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """Refuse a request that comes from another site (403), lacks the token (401), or is too large (411, 413)."""
        headers, path = conn.headers, conn.url.path
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
        foreign = foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        # Of what a page of another site can make a browser do, only following a link to a page is as good as typing its
        # address; nobody types those of the API.
        follows = conn.scope.get("method") == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if foreign and not (follows and not path.startswith(FOR_PROGRAMS)):
            raise RefusedError(403, "origin: pages of other sites may not ask")
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer if scheme.lower() == "bearer" else "", conn.cookies.get(_cookie_name(conn), "")]
        given += [conn.query_params.get("token", "")] if path == ENTRANCE else []
        if path not in OPEN and not any(secrets.compare_digest(g.encode(), self._token.encode()) for g in given):
            raise RefusedError(401, "token: missing or wrong")
        if "transfer-encoding" in headers:
            raise RefusedError(411, "body: its length must be given")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            raise RefusedError(413, f"body: at most {LARGEST_BODY} bytes are read")
        return AuthCredentials(), SimpleUser("")


def _cookie_name(conn: HTTPConnection) -> str:
    """Named by the port in the address: browsers share cookies between all ports of a host."""
    return f"mnemoscope-{conn.url.port}"


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


@router.get("/runs")
def runs(request: Request, first: Name = None, second: Name = None) -> HTMLResponse:
    """Every run, and two of them side by side."""
    found: Runs = request.app.state.runs
    if not found.names():
        return _page("nothing.html", root=found.root)
    compared = compare_briefs(found.brief(first), found.brief(second)) if first and second else None
    listed = [found.facts(name) for name in found.names()]
    return _page("runs.html", runs=listed, first=first, second=second, compared=compared)


def _leads_on(page: bytes) -> bool:
    """Whether a page may lead to another by itself, from which no policy keeps it.

    A browser reads what begins with a mark of UTF-16 as that, whatever it is told.
    """
    try:
        text = page.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return text.startswith("\ufeff") or "\0" in text or "http-equiv" in text.lower()


@router.get("/runs/{run}/report")
def report(request: Request, run: str) -> FileResponse:
    """The report of a run, unchanged."""
    path = request.app.state.runs.folder(run) / "report.html"
    if not path.is_file():
        raise InputError(f"run: {run} has no report yet")
    if _leads_on(intact(path).read_bytes()):
        raise InputError(f"run: {run} has a report that mnemoscope did not write; rebuild it: mnemoscope report")
    return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": INLINE})


@router.get("/report.css")
def style() -> Response:
    """The report's style sheet."""
    return Response(page_style(), media_type="text/css")


def build_app(
    root: Path, token: str, first: str | None = None, siblings: bool = True, model: str | None = None
) -> FastAPI:
    """The playground over the run folders in ``root``, for those who know the token; it shows run ``first`` first.

    Without ``siblings`` it shows no other; ``model``: that of runs which did not train one.
    """
    app = FastAPI(title="Mnemoscope", version=version(), docs_url=None, redoc_url=None, lifespan=_until_stopped)
    # A redirect to a path with or without its last "/" would also be one to "//another.site".
    app.router.redirect_slashes = False
    app.state.runs = Runs(root, None if siblings else first, model)
    app.state.jobs, app.state.first, app.state.token = Jobs(), first, token
    app.state.opened = OpenedCells(app.state.runs)
    # The token is checked by the middleware; this puts it into the description.
    bearer = HTTPBearer(auto_error=False, description="the token in the address that the server printed")
    app.include_router(api.router, dependencies=[Depends(bearer)])
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
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
    if conn.url.path.startswith(FOR_PROGRAMS):
        return JSONResponse({"error": {"field": field, "message": message}}, status)
    server = conn.scope.get("server") or ("", 0)
    return _page("error.html", status, field=field, message=message, port=server[1])


def server_of(app: FastAPI) -> uvicorn.Server:
    """The server of an application, with limits on what clients may hold."""
    options: dict[str, Any] = {"http": WithDeadline, "limit_concurrency": MOST}
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
        if not (Path(run) / "study.yaml").is_file():
            raise InputError(f"RUN: {run} is not a run folder (it has no study.yaml)")
        folder = Path(run).resolve()
        root, first = folder.parent, folder.name
        if not re.fullmatch(NAME, first):
            raise InputError(f"RUN: {first!r} cannot be part of an address; letters, digits and any of _.- are wanted")
        if not list(folder.glob("cells/*/records/chosen.json")):
            raise InputError(f"RUN: {run} has {UNFINISHED}")
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise InputError(f"port: {port} cannot be listened on ({error.strerror}); give another one") from error
    token = secrets.token_urlsafe()
    app = build_app(root, token, first, siblings or run is None, model)
    announce(f"http://{LOOPBACK}:{listener.getsockname()[1]}/?token={token}")
    try:
        server_of(app).run(sockets=[listener])
    finally:
        app.state.opened.close()  # a second request to stop ends it without the end of its lifespan
