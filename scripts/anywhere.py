"""What ``scripts/anywhere.sh`` runs and prints: a study under one setting, and a table of the runs of all.

python scripts/anywhere.py run STUDY RUN [--precision P] [--jitter X] [--set a.b=c]
python scripts/anywhere.py table FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mnemoscope.config import dump_study, load_study

HEAD = (
    "| setting | cell | arrived | attempts, steps | training s | conflicts memorized / generalized | to generalized: "
    "pairs, strongest control | by | to memorized | by | study s, exit code | tests |"
)
DIRECTIONS = ("to_generalized", "to_memorized")


def main() -> int:
    """Run a study, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("names", nargs="+", metavar="STUDY RUN | FOLDER")
    parser.add_argument("--precision", help="of the passes of trainings from scratch")
    parser.add_argument("--jitter", help="relative noise on first weights")
    parser.add_argument("--models", type=Path, help="a run whose models are analysed, instead of training others")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    arguments = parser.parse_args()
    if arguments.what == "table":
        print("\n".join(table(Path(arguments.names[0]))))
        return 0
    study, run = arguments.names
    config = load_study(study)
    trained = [label for label, cell in config.cells.items() if cell.model.is_trained and not cell.model.lora]
    changes = list(arguments.changes)
    if arguments.models:
        folders = {label: next(arguments.models.glob(f"cells/{label}-*/model"), None) for label in trained}
        cells = {label: config.cells[label] for label, folder in folders.items() if folder}
        study = f"{run}.yaml"
        Path(study).write_text(dump_study(config.model_copy(update={"cells": cells, "seeds": 1, "first_seed": 0})))
        changes += [
            f"cells.{label}.model={{folder: {folder.resolve()}}}" for label, folder in folders.items() if folder
        ]
    for field, value in {"training.precision": arguments.precision, "model.jitter": arguments.jitter}.items():
        changes += [f"cells.{label}.{field}={value}" for label in trained if value is not None]
    given = [part for change in changes for part in ("--set", change)]
    return subprocess.call([sys.executable, "-m", "mnemoscope", "run", study, "--out", run, *given])


def table(folder: Path) -> list[str]:
    """A row for each cell of each run of a folder."""
    rows = [HEAD, "|" + "---|" * HEAD.count(" |")]
    for status in sorted(folder.glob("*.status")):
        run = status.with_suffix("")
        tests = run.with_suffix(".tests")
        passed = tests.read_text().strip() if tests.exists() else "-"
        seconds = (
            json.loads((run / "manifest.json").read_text())["seconds"] if (run / "manifest.json").exists() else "-"
        )
        results = json.loads((run / "results.json").read_text())["tasks"] if (run / "results.json").exists() else {}
        for cell in sorted((run / "cells").glob("*")):
            task = results.get(cell.name.rpartition("-")[0], {})
            steered = [part for direction in DIRECTIONS for part in _steered(task, direction)]
            told = [run.name, cell.name, *_trained(cell), *steered, f"{seconds}, {status.read_text().strip()}", passed]
            rows.append(f"| {' | '.join(map(str, told))} |")
    return rows


def _trained(cell: Path) -> list[str]:
    """Whether a training arrived, in which attempt and step, its seconds, and the mixture that was kept."""
    import pandas as pd

    records = cell / "records"
    if not (records / "training.parquet").exists():
        return ["given" if (cell / "cell.json").exists() else "no", "-", "-", "-"]
    last = pd.read_parquet(records / "training.parquet").iloc[-1]
    time = json.loads((records / "training_time.json").read_text())
    facts = json.loads((cell / "cell.json").read_text()) if (cell / "cell.json").exists() else {}
    arrived, attempts = ("yes", facts["attempt"] + 1) if facts else ("no", "all")
    mixture = f"{last['conflict_memorized']:.2f} / {last['conflict_generalized']:.2f}"
    return [arrived, f"{attempts}, {time['steps']}", str(time["seconds"]), mixture]


def _steered(task: dict[str, Any], direction: str) -> list[str]:
    """Share of test pairs that a chosen vector steers beside its strongest control, and what was chosen."""
    block = task.get("steering", {}).get(direction)
    if not block:
        return ["-", "-"]
    controls = [found["pairs"]["shift"]["estimate"] for found in block["controls"].values()]
    strongest = max((share for share in controls if share == share and share is not None), default=float("nan"))
    shift, chosen = block["pairs"]["shift"], block["chosen"]
    layers = ",".join(map(str, chosen["layers"]))
    setting = f"{chosen['method']}, {chosen['site']} {layers}, {chosen['strength']:g}"
    return [f"{shift['estimate']:.3f} of {shift['n']}, {strongest:.3f}", setting]


if __name__ == "__main__":
    sys.exit(main())
