"""The run folders below one root, and their first numbers."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mnemoscope.errors import InputError
from mnemoscope.files import plain
from mnemoscope.report import brief

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
SCHEMA = 1  # of results.json


class RunFacts(BaseModel):
    """A run: its study, the cells that can be opened, and once it is finished the numbers of ``fit --json`` by task."""

    run: str
    study: str | None
    finished: bool
    cells: list[str]
    tasks: dict[str, dict[str, Any]]


class Runs:
    """Runs by name; a name is one folder below the root and never leads out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Names of the run folders, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(path.parent.name for path in self.root.glob("*/study.yaml") if re.match(NAME, path.parent.name))

    def folder(self, name: str) -> Path:
        """The folder of a run.

        Raises:
            InputError: there is no run of that name.
        """
        if name not in self.names():
            raise InputError(f"run: {name!r} is not one of {', '.join(self.names()) or 'none'}")
        return self.root / name

    def cells(self, name: str) -> list[str]:
        """Names of the cells of a run that can be opened: those that have steering vectors."""
        found = (self.folder(name) / "cells").glob("*/records/chosen.json")
        return sorted(path.parents[1].name for path in found)

    def cell(self, name: str, cell: str) -> Path:
        """The folder of a cell that can be opened.

        Raises:
            InputError: there is no such run or cell.
        """
        if cell not in self.cells(name):
            raise InputError(f"cell: {cell!r} is not one of {', '.join(self.cells(name)) or 'none'}")
        return self.folder(name) / "cells" / cell

    def results(self, name: str) -> dict[str, Any]:
        """Content of ``results.json``; empty where the run is not finished, or where it is another version's."""
        try:
            found = json.loads((self.folder(name) / "results.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and found.get("schema") == SCHEMA else {}

    def brief(self, name: str) -> dict[str, Any]:
        """A run's first numbers by task, as ``report.brief`` gives them."""
        with suppress(AttributeError):  # results.json holds something else
            return brief(self.results(name))
        return {}

    def facts(self, name: str) -> RunFacts:
        """What the list of runs shows of one."""
        results, tasks = self.results(name), plain(self.brief(name))
        study = str(results.get("study", "")) or None
        return RunFacts(run=name, study=study, finished=bool(results), cells=self.cells(name), tasks=tasks)
