"""How printed pages keep their tables, in ``docs/results``, and how these become Markdown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

FOLDER = Path(__file__).parent


class Table(TypedDict):
    """A table as a file keeps it; cells are Markdown, but for the bar between them."""

    columns: list[str]
    rows: list[list[str]]


Sections = Mapping[str, Sequence[str | Table]]  # paragraphs and tables, by the title of their section
Found = Mapping[str, Any]  # what a benchmark keeps as JSON
Told = Callable[[Mapping[str, Mapping[str, Found]]], Sections]  # from files, by the name of a run and their own


def table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> Table:
    """A table of whatever can be written."""
    return {"columns": [str(column) for column in columns], "rows": [[str(cell) for cell in row] for row in rows]}


def lines_of(table: Table) -> str:
    """A table in Markdown."""
    rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def page(name: str, sections: Sections | None = None) -> str:
    """A page: what was written by hand, then the sections given, or else those that are published."""
    if sections is None:
        sections = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    parts = [part for title, of in sections.items() for part in (f"## {title}", *of)]
    return "\n\n".join([head(name).rstrip(), *(p if isinstance(p, str) else lines_of(p) for p in parts)]) + "\n"


def head(name: str) -> str:
    """What a page begins with, written by hand."""
    return (FOLDER / f"{name}.head.md").read_text()


def put(name: str, sections: Sections, path: Path | None) -> None:
    """Print a page of these sections; keep them where a path is given, a line each."""
    print(page(name, sections))
    if path is not None:
        lines = [f"{json.dumps(title)}: {json.dumps(parts, ensure_ascii=False)}" for title, parts in sections.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def of_runs(name: str, told: Told) -> str:
    """A page of runs whose files are published whole."""
    return page(name, told(json.loads((FOLDER / "results" / f"{name}.json").read_text())))


def print_runs(name: str, told: Told, files: Sequence[str]) -> None:
    """Print the page of the runs that the command line names; keep their files where it says so."""
    parser = argparse.ArgumentParser(description=f"Print the page {name}.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, help="keep the runs for the site")
    asked = parser.parse_args()
    runs = {run.name: {file: json.loads((run / f"{file}.json").read_text()) for file in files} for run in asked.runs}
    print(page(name, told(runs)))
    if asked.keep is not None:
        lines = [f"{json.dumps(run)}: {json.dumps(found)}" for run, found in runs.items()]
        asked.keep.write_text("{\n" + ",\n".join(lines) + "\n}\n")
