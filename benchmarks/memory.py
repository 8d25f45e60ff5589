"""Peak memory of mining and contrast over more and more candidates: it should not grow with them.

    python benchmarks/memory.py RUN CELL [--candidates 10000 1000000]

``CELL`` is one of a finished run, for example ``inference-0`` of the quickstart. Each number of candidates is a process
of its own, which mines fit pairs with the model of the cell, streams their contrast and writes every candidate's row.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tables import origin, put

from mnemoscope.config import load_study, parse_model
from mnemoscope.runs.processes import settle
from mnemoscope.study.cells import Cell, cells_of
from mnemoscope.study.stages.train import pairs_stage

OTHERS = 2000  # tune and test examples, the same for all


def main() -> None:
    """Measure, and print a table; as its own child mine once and print the peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("cell", help="name of one of its cells")
    parser.add_argument("--candidates", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--write", type=Path, help="file for the table, as peers.py writes it")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cells = cells_of(load_study(str(arguments.run / "study.yaml")), arguments.run)
    cell = next(cell for cell in cells if cell.name == arguments.cell)
    if arguments.once:
        _mine(cell, arguments.candidates[0])
        return
    first, lines = None, ["| candidates | peak, MiB | times the first | seconds |", "|---|---|---|---|"]
    for n in arguments.candidates:
        command = [sys.executable, __file__, str(arguments.run), arguments.cell, "--once", "--candidates", str(n)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, seconds = map(float, told.split()[-2:])
        first = first or peak
        lines.append(f"| {n:,} | {peak / 1024:.1f} | {peak / first:.3f} | {seconds:.1f} |")
        print(lines[-1], flush=True)
    if arguments.write:
        what = "Peak resident memory of mining, contrast and records, a process for each row. Bar: at most 1.1 times."
        put(arguments.write, "memory", ["## memory", "", what, "", *lines, "", origin(1, cell.threads), ""])


def _mine(cell: Cell, n: int) -> None:
    settle(cell.threads)
    pairs = cell.config.pairs.model_copy(
        update={"fit_examples": n, "tune_examples": OTHERS, "test_examples": OTHERS, "rephrasings": 1}
    )
    model = parse_model({"folder": str(cell.model_folder)})
    config = cell.config.model_copy(update={"pairs": pairs, "model": model})
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pairs_stage(replace(cell, config=config, folder=Path(folder)), lambda *_: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter() - began)


if __name__ == "__main__":
    main()
