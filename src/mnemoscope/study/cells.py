"""The cells of a study, and the version of the code that runs them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, Literal

from mnemoscope.config import CellConfig, StudyConfig
from mnemoscope.runs.processes import Map, in_order

Tell = Callable[[float, float, str], None]  # (done, total, note): progress of a stage
STATES = "states"  # folder of a cell with the states that its stages read; deleted when its study has ended


@dataclass(frozen=True, slots=True)
class Opened:
    """A model, tokenizer and task that were open before the study began."""

    model: Any
    tokenizer: Any
    task: Any = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One (task, model, seed) of a study, with the folder it writes to.

    ``map`` maps a function over parts of a stage, in parallel where processes are idle. ``depends_on`` is the hash of
    all that the running stage depends on. ``code`` are the paths of a user's own tasks that may be imported
    (``tasks.allow_code``), which every process of the study is told.
    """

    name: str
    label: str
    seed: int
    config: CellConfig
    threads: int
    folder: Path
    map: Map = in_order
    opened: Opened | None = None
    depends_on: str = ""
    code: tuple[str, ...] = ()

    @property
    def records(self) -> Path:
        """Folder of the records (tables)."""
        return self.folder / "records"

    @property
    def lender(self) -> str | None:
        """Name of the cell whose model it uses."""
        label = self.config.model.cell
        return f"{label}-{self.seed}" if label else None

    @property
    def model_folder(self) -> Path:
        """Folder of the model: the cell's own, another cell's, or one that the study names."""
        shape = self.config.model
        if shape.folder and not shape.is_trained:
            return Path(shape.folder)
        owner = self.folder.parent / self.lender if self.lender else self.folder
        return owner / "model"


def cells_of(config: StudyConfig, run: Path) -> list[Cell]:
    """Every cell of a study, seeds innermost."""
    return [
        Cell(f"{label}-{seed}", label, seed, cell, config.threads, run / "cells" / f"{label}-{seed}")
        for label, cell in config.cells.items()
        for seed in range(config.first_seed, config.first_seed + config.seeds_of(label))
    ]


def grouped(cells: Sequence[Cell], by: Literal["label", "model"]) -> list[list[Cell]]:
    """The seeds of each label, or the cells of one seed that use one model."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        key = cell.label if by == "label" else (cell.model_folder.resolve(), cell.seed)
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


def version() -> str:
    """Version of the installed package."""
    return metadata.version("mnemoscope")


@cache
def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the source tree; None where the package is not run from one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(here), *arguments]
            return subprocess.check_output(command, stderr=DEVNULL, text=True, timeout=10).strip()
        except (OSError, subprocess.SubprocessError):
            return None

    if not git("ls-files", "--error-unmatch", str(Path(__file__))):
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
