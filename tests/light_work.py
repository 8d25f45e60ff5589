"""What tests give to other processes, without a model library, which each of these would import for seconds."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from mnemoscope.runs.errors import StudyError
from mnemoscope.runs.telling import Progress
from mnemoscope.study.cells import Cell


class Counting:
    """Squares numbers; opens something slow once and says in which process, and how often it was called there."""

    def __init__(self) -> None:
        self.calls = 0

    def __reduce__(self) -> tuple[type[Counting], tuple[()]]:
        return Counting, ()

    def __call__(self, number: int) -> tuple[int, int, int]:
        self.calls += 1
        time.sleep(0.02)
        return number**2, os.getpid(), self.calls


def fails(number: int) -> int:
    raise StudyError(f"{number} cannot be done")


def dies(number: int) -> int:
    os._exit(number)


def dies_at_first(folder: Path, number: int) -> int:
    """The process of 3 is killed at the first call, that of 5 at each; others say how often they were called."""
    calls = folder / f"{number}-{time.monotonic_ns()}"
    calls.touch()
    if number == 5 or (number == 3 and len(list(folder.glob("3-*"))) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number


def killed_cell(folder: Path, cell: Cell, progress: Progress) -> None:
    dies_at_first(folder, int(cell.name))


def notes_when(cell: Cell, progress: Progress, meeting: bool) -> None:
    """Stands in for a cell's stages: notes when it began and ended; the second donor cannot go on.

    Args:
        meeting: the last donor stays at work until the first borrower has been, or for a minute.
    """
    began = time.monotonic()
    other = cell.folder.parent / "borrower-0" / "times.json"
    while meeting and cell.name == "donor-2" and not other.exists() and time.monotonic() < began + 60:
        time.sleep(0.05)
    cell.folder.mkdir(parents=True)
    progress(cell.name, "train", 1, 1, "")
    (cell.folder / "times.json").write_text(json.dumps([began, time.monotonic()]))
    if cell.name == "donor-1":
        raise StudyError("donor-1: never mixed")
