"""The pages, rendered here and brought to life by small scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import jinja2
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, Response

from mnemoscope.errors import InputError
from mnemoscope.report import compare_briefs, page_style
from mnemoscope.web.rooms import NAME, Rooms

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


def error_page(status: int, field: str, message: str) -> HTMLResponse:
    """What is wrong, for a person."""
    return page("error.html", status, field=field, message=message)


router = APIRouter(include_in_schema=False)


def _chosen(request: Request, run: str | None, cell: str | None) -> dict[str, Any] | None:
    """The run and the cell that are shown; None where there is nothing to show."""
    rooms: Rooms = request.app.state.rooms
    with_cells = [name for name in rooms.runs() if rooms.cells(name)]
    if run is None:
        wanted = [name for name in (request.app.state.first, "quickstart") if name in with_cells]
        run = next(iter([*wanted, *with_cells]), None)
    if run is None:
        return None
    cells = rooms.cells(run)
    if not cells:
        raise InputError(f"run: {run} has no cell with steering vectors yet; let its study run to its end first")
    # Whoever picks another run has the cell of the one before still picked.
    return {"run": run, "cell": cell if cell in cells else cells[0], "runs": with_cells, "cells": cells}


def _shown(name: str, request: Request, run: str | None, cell: str | None) -> HTMLResponse:
    found = _chosen(request, run, cell)
    return page(name, **found) if found else page("nothing.html", root=request.app.state.rooms.root)


@router.get("/")
def playground(request: Request, run: Name = None, cell: Name = None) -> HTMLResponse:
    """A question, what the model makes of it, and the same while it is turned."""
    return _shown("playground.html", request, run, cell)


@router.get("/neurons")
def neurons(request: Request, run: Name = None, cell: Name = None) -> HTMLResponse:
    """The map of neurons."""
    return _shown("neurons.html", request, run, cell)


@router.get("/runs")
def runs(request: Request, first: Name = None, second: Name = None) -> HTMLResponse:
    """Every run, and two of them side by side."""
    rooms: Rooms = request.app.state.rooms
    if not rooms.runs():
        return page("nothing.html", root=rooms.root)
    listed = [
        {
            "name": name,
            "study": rooms.results(name).get("study"),
            "tasks": rooms.brief(name),
            "cells": rooms.cells(name),
        }
        for name in rooms.runs()
    ]
    compared = compare_briefs(rooms.brief(first), rooms.brief(second)) if first and second else None
    return page("runs.html", runs=listed, first=first, second=second, compared=compared)


@router.get("/runs/{run}/report")
def report(request: Request, run: str) -> FileResponse:
    """The report of a run, as it is."""
    path = request.app.state.rooms.run(run) / "report.html"
    if not path.is_file():
        raise InputError(f"run: {run} has no report yet")
    inline = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
    return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": inline})


@router.get("/report.css")
def style() -> Response:
    """The report's style sheet."""
    return Response(page_style(), media_type="text/css")
