"""What a cell of a study is, and which version of the code runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mnemoscope.config import CellConfig, StudyConfig
from mnemoscope.processes import Spread, in_one_place

# (done, total, note): what a running stage tells.
Tell = Callable[[float, float, str], None]


@dataclass(frozen=True, slots=True)
class Opened:
    """What was open before a study of it began; nothing is opened in its place."""

    model: Any
    tokenizer: Any
    task: Any = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One (task, model, seed) of a study, with the folder it writes to.

    Attributes:
        spread: how a stage takes what can be done in parts, side by side.
        opened: a model that was open before the study began; stages use it as it is.
    """

    name: str
    label: str
    seed: int
    config: CellConfig
    threads: int
    folder: Path
    spread: Spread = in_one_place
    opened: Opened | None = None

    @property
    def records(self) -> Path:
        """Folder of the cell's tables."""
        return self.folder / "records"

    @property
    def trains_within_study(self) -> bool:
        """Whether its model is trained by this study: by the cell itself, or by the one that lends it."""
        return self.config.model.is_trained or self.config.model.cell is not None

    @property
    def lender(self) -> str | None:
        """The name of the cell whose model it takes."""
        label = self.config.model.cell
        return f"{label}-{self.seed}" if label else None

    @property
    def model_folder(self) -> Path:
        """Where the cell's model is: its own folder, another cell's, or one that the study names."""
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


def by_label(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The seeds of each label."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    return list(groups.values())


def by_model(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one seed that use one model."""
    groups: dict[tuple[Path, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model_folder.resolve(), cell.seed), []).append(cell)
    return list(groups.values())


def version() -> str:
    """Version of the installed package."""
    return metadata.version("mnemoscope")


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the source tree; None where the package is not run from one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", here, *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", str(Path(__file__)))
    if not tracked:
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
