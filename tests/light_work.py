"""What tests give to other processes, without a model library, which each of these would import for seconds."""

from __future__ import annotations

import json
import os
import signal
import time

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
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def killed_cell(cell: Cell, progress: Progress) -> None:
    """The first cell ends well, the second is killed once the first has ended."""
    done = cell.folder / "done"
    while cell.seed and not done.exists():
        time.sleep(0.01)
    if cell.seed:
        time.sleep(0.5)  # the first has been told to its parent
        dies(0)
    done.touch()


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


def maps_on_a_node_that_dies(cell: Cell, progress: Progress) -> None:
    """Notes each of its runs; waits in the first until its node is removed, and maps in the next."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / f"run-{time.monotonic_ns()}").touch()
    while len(list(cell.folder.glob("run-*"))) < 2 and not (cell.folder.parent / "over").exists():
        time.sleep(0.05)
    progress(cell.name, "train", 1, 1, "")
    (cell.folder / "squares.json").write_text(json.dumps([square for square, *_ in cell.map(Counting(), [1, 2, 3])]))
