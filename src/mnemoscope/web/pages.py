"""The pages, rendered here and brought to life by small scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import jinja2
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from mnemoscope.errors import InputError
from mnemoscope.report import compare_briefs, page_style
from mnemoscope.web.admission import ENTRANCE, remember
from mnemoscope.web.runs import NAME, Runs

NOTHING_ELSE = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
Name = Annotated[str | None, Query(pattern=NAME)]

_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(name: str, status: int = 200, **facts: Any) -> HTMLResponse:
    """A page; it may load nothing from elsewhere."""
    shown: dict[str, str] = {key: facts[key] for key in ("run", "cell") if key in facts}
    facts |= {"here": name.removesuffix(".html"), "shown": f"?{urlencode(shown)}" if shown else ""}
    text = _environment.get_template(name).render(**facts)
    return HTMLResponse(text, status, {"Content-Security-Policy": NOTHING_ELSE})


router = APIRouter(include_in_schema=False)


def _shown(template: str, request: Request, run: str | None, cell: str | None) -> HTMLResponse:
    """A page of one cell; another page where there is nothing to show."""
    found: Runs = request.app.state.runs
    with_cells = [name for name in found.names() if found.cells(name)]
    if run is None:
        preferred = [name for name in (request.app.state.first, "quickstart") if name in with_cells]
        run = next(iter([*preferred, *with_cells]), None)
    if run is None:
        return page("nothing.html", root=found.root)
    cells = found.cells(run)
    if not cells:
        raise InputError(f"run: {run} has no cell with steering vectors yet; let its study run to its end first")
    # The form of another run still holds the cell of the one before.
    return page(template, run=run, cell=cell if cell in cells else cells[0], runs=with_cells, cells=cells)


@router.get(ENTRANCE)
def playground(request: Request, run: Name = None, cell: Name = None, token: str | None = None) -> Response:
    """A question, and the model's answer to it with and without steering."""
    if token is None:
        return _shown("playground.html", request, run, cell)
    # From now on the cookie has the token, and neither the address bar nor the history keeps it.
    address = request.url.remove_query_params("token")
    entered = RedirectResponse(address.replace(scheme="", netloc=""), 303)
    remember(request.app.state.token, request, entered)
    return entered


@router.get("/neurons")
def neurons(request: Request, run: Name = None, cell: Name = None) -> HTMLResponse:
    """The map of neurons."""
    return _shown("neurons.html", request, run, cell)


@router.get("/runs")
def runs(request: Request, first: Name = None, second: Name = None) -> HTMLResponse:
    """Every run, and two of them side by side."""
    found: Runs = request.app.state.runs
    if not found.names():
        return page("nothing.html", root=found.root)
    compared = compare_briefs(found.brief(first), found.brief(second)) if first and second else None
    listed = [found.facts(name) for name in found.names()]
    return page("runs.html", runs=listed, first=first, second=second, compared=compared)


@router.get("/runs/{run}/report")
def report(request: Request, run: str) -> FileResponse:
    """The report of a run, unchanged."""
    path = request.app.state.runs.folder(run) / "report.html"
    if not path.is_file():
        raise InputError(f"run: {run} has no report yet")
    inline = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; form-action 'none'"
    return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": inline})


@router.get("/report.css")
def style() -> Response:
    """The report's style sheet."""
    return Response(page_style(), media_type="text/css")
