"""The report: ``results.json`` and ``report.html`` from the records of a run, without torch."""

from __future__ import annotations

from pathlib import Path

from mnemoscope.files import write_atomically
from mnemoscope.processes import Map, in_order
from mnemoscope.report.brief import brief, brief_of, compare_briefs, in_words
from mnemoscope.report.figures_neuron import draw_neuron
from mnemoscope.report.html import page_style, render
from mnemoscope.report.records import read_run
from mnemoscope.report.results import compute_results, to_json

__all__ = ["brief", "brief_of", "build_report", "compare_briefs", "draw_neuron", "in_words", "page_style"]


def build_report(run: Path, parallel: Map = in_order) -> Path:
    """Compute ``results.json`` and ``report.html`` from the records of a run folder; equal records give equal bytes.

    Args:
        run: the folder, as docs/RECORDS.md describes it.
        parallel: maps over the cells that are measured and the pages that are drawn.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: a record file is missing, cannot be read or lacks a column; one line that names the file.
    """
    run = Path(run)
    records = read_run(run)
    results = compute_results(records, parallel)
    write_atomically(run / "results.json", to_json(results).encode())
    write_atomically(run / "report.html", render(records, results, parallel).encode())
    return run / "report.html"
