"""The runs in a folder, and the cells of them that are open."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

from mnemoscope.bench import Bench
from mnemoscope.errors import InputError
from mnemoscope.report import brief
from mnemoscope.web.shapes import first_numbers

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
OPEN = 2  # cells whose models are kept in memory, but for those that somebody is still asking
SCHEMA = 1  # of results.json


class Rooms:
    """Runs by name; a name is one folder below the root and never leads out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: OrderedDict[tuple[object, ...], Bench] = OrderedDict()
        self._opening: dict[tuple[object, ...], Lock] = {}
        self._lock = Lock()

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

    def bench(self, name: str, cell: str) -> Bench:
        """A cell, opened once; the one that was asked longest ago is closed where too many are open.

        Raises:
            InputError: there is no such cell.
        """
        run = self.run(name)
        if cell not in self.cells(name):
            raise InputError(f"cell: {cell!r} is not one of {', '.join(self.cells(name)) or 'none'}")
        folder = run / "cells" / cell
        # A study that was run again has other vectors, and one that is still running may have a detector by now.
        made = [path for path in (folder / "records" / "chosen.json", folder / "detector.safetensors") if path.exists()]
        key = (name, cell, *(path.stat().st_mtime_ns for path in made))
        with self._lock:
            opening = self._opening.setdefault(key, Lock())
        try:
            with opening:  # whoever asks for another cell does not wait for this one to open
                with self._lock:
                    if key in self._open:
                        self._open.move_to_end(key)
                        return self._open[key]
                bench = Bench.of(run, cell)
                with self._lock:
                    self._open[key] = bench
                    while len(self._open) > OPEN:
                        self._open.popitem(last=False)
                return bench
        finally:
            with self._lock:
                self._opening.pop(key, None)

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
