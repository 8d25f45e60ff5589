"""The report: ``results.json`` and ``report.html`` from the records of a run, without torch."""

from __future__ import annotations

from pathlib import Path

from mnemoscope.report.page import page_style, render
from mnemoscope.report.records import read_run
from mnemoscope.report.results import compute_results
from mnemoscope.report.rows import to_json
from mnemoscope.report.stories import behaviour, cost, detector, differ, holds, read, steer_page, where
from mnemoscope.report.stories.arena_page import build_arena
from mnemoscope.report.stories.audit import build_audit
from mnemoscope.report.stories.differ import draw_neuron
from mnemoscope.report.summary import Summary, summary_of
from mnemoscope.runs.digests import write_marker
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.processes import Map, in_order

# In the order of the page.
CHAPTERS = [story.chapter for story in (behaviour, differ, read, steer_page, where, cost, holds, detector)]


def build_report(run: str | Path, parallel: Map = in_order) -> Path:
    """Compute ``results.json`` and ``report.html`` from the records of a run folder; equal records give equal bytes.

    Args:
        run: the folder, as docs/records.head.md describes it.
        parallel: where cells are measured and pages drawn; the bytes are the same everywhere.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: a record file is missing, is not as its stage wrote it, cannot be read or lacks a column; one line
            that names the file.
    """
    run = Path(run)
    records = read_run(run)
    results = compute_results(records, parallel)
    page = render(records, results, CHAPTERS, holds.transfer(results.transfer), parallel)
    found = write_atomically(run / "results.json", to_json(results).encode())
    path = write_atomically(run / "report.html", page.encode())
    write_marker(run, "report", [found, path])
    return path
