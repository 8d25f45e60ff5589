"""The report: ``results.json`` and ``report.html`` from the records of a run, without torch."""

from __future__ import annotations

import os
from pathlib import Path

from mnemoscope.report.html import render
from mnemoscope.report.records import read_run
from mnemoscope.report.results import compute_results, to_json

__all__ = ["build_report"]


def build_report(run: Path) -> Path:
    """Compute ``results.json`` and ``report.html`` from the records of a run folder; equal records give equal bytes.

    Args:
        run: the folder, as docs/RECORDS.md describes it.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: a record file is missing, cannot be read or lacks a column; one line that names the file.
    """
    run = Path(run)
    records = read_run(run)
    results = compute_results(records)
    _write(run / "results.json", to_json(results))
    _write(run / "report.html", render(records, results))
    return run / "report.html"


def _write(path: Path, text: str) -> None:
    """Under a temporary name first, so that a killed process leaves no half file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
