"""The runs in a folder, and what they have come to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mnemoscope.errors import InputError
from mnemoscope.report import brief
from mnemoscope.web.shapes import first_numbers

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
SCHEMA = 1  # of results.json


class Rooms:
    """Runs by name; a name is one folder below the root and never leads out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def runs(self) -> list[str]:
        """Names of the run folders, in the order of the alphabet."""
        if not self.root.is_dir():
            return []
        return sorted(path.parent.name for path in self.root.glob("*/study.yaml") if re.match(NAME, path.parent.name))

    def run(self, name: str) -> Path:
        """The folder of a run.

        Raises:
            InputError: there is no run of that name.
        """
        if not re.match(NAME, name):
            raise InputError(f"run: {name!r} is no name: letters, digits, dots, dashes and underscores only")
        if name not in self.runs():
            raise InputError(f"run: {name!r} is not one of {', '.join(self.runs()) or 'none'}")
        return self.root / name

    def cells(self, name: str) -> list[str]:
        """Names of the cells of a run that can be opened: those that have steering vectors."""
        found = (self.run(name) / "cells").glob("*/records/chosen.json")
        return sorted(path.parents[1].name for path in found)

    def cell(self, name: str, cell: str) -> Path:
        """The folder of a cell that can be opened.

        Raises:
            InputError: there is no such run or cell.
        """
        if cell not in self.cells(name):
            raise InputError(f"cell: {cell!r} is not one of {', '.join(self.cells(name)) or 'none'}")
        return self.run(name) / "cells" / cell

    def results(self, name: str) -> dict[str, Any]:
        """What ``results.json`` holds; nothing where the run has not come that far, or by another version."""
        try:
            found = json.loads((self.run(name) / "results.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and found.get("schema") == SCHEMA else {}

    def brief(self, name: str) -> dict[str, Any]:
        """A run's first numbers by task; nothing where there are none yet, or where they are another version's."""
        try:
            found = brief(self.results(name))
        except (KeyError, TypeError, AttributeError):
            return {}
        known = first_numbers(found)
        return {task: numbers for task, numbers in found.items() if task in known}
