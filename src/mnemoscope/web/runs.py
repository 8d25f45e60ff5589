"""The run folders below one root, and cells that are open, with one thread that uses their models."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from fastapi import HTTPException

from mnemoscope.config import NAME
from mnemoscope.report import Summary
from mnemoscope.runs.digests import intact
from mnemoscope.runs.errors import InputError, check_one_of
from mnemoscope.runs.files import plain
from mnemoscope.runs.strict import read_json
from mnemoscope.web.cell import READER, OpenedCell
from mnemoscope.web.shapes import RunFacts

OPEN = 2  # cells whose models are kept in memory
LOOK = 0.5  # seconds between two looks at whether a client has left

T = TypeVar("T")
Left = Callable[[], Awaitable[bool]]  # whether a client has left


class Runs:
    """Runs by name; a name is one folder below the root and never leads out of it.

    ``only``: the one run that is offered; ``model``: that of runs whose study did not train one.
    """

    def __init__(self, root: Path, only: str | None = None, model: str | None = None) -> None:
        self.root, self.only, self.model = root, only, model

    def names(self) -> list[str]:
        """Names of the run folders, sorted."""
        names = sorted(path.parent.name for path in self.root.glob("*/study.yaml"))
        return [name for name in names if re.fullmatch(NAME, name) and self.only in (None, name)]

    def folder(self, name: str) -> Path:
        """The folder of a run; InputError where there is no run of that name."""
        check_one_of("run", name, self.names())
        return self.root / name

    def cells(self, name: str) -> list[str]:
        """Names of the cells of a run that can be opened: those that have steering vectors."""
        found = (self.folder(name) / "cells").glob("*/records/chosen.json")
        return sorted(path.parents[1].name for path in found)

    def cell(self, name: str, cell: str) -> Path:
        """The folder of a cell that can be opened; InputError where there is no such run or cell."""
        check_one_of("cell", cell, self.cells(name))
        return self.folder(name) / "cells" / cell

    def facts(self, name: str) -> RunFacts:
        """What the list of runs shows of one; a damaged one hides no other."""
        path, cells = self.folder(name) / "results.json", self.cells(name)
        if not path.exists():
            return RunFacts(run=name, cells=cells)
        try:
            results = read_json(intact(path), dict[str, Any])
        except InputError as error:
            return RunFacts(run=name, cells=cells, damaged=str(error))
        tasks: dict[str, Any] = {}
        with suppress(AttributeError):  # another version's, which holds something else
            tasks = plain(Summary.of(results).brief())
        return RunFacts(run=name, cells=cells, study=str(results.get("study")), finished=True, tasks=tasks)


class OpenedCells:
    """Cells, opened at their first request; the least recently used one is closed where too many are open.

    One thread does all work on models, so that no answer sees another's shift; requests wait in the event loop.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs, self._thread = runs, ThreadPoolExecutor(1, thread_name_prefix="models")
        self._open = lru_cache(OPEN)(lambda run, cell, *made: OpenedCell(runs.folder(run), cell, runs.model))

    async def ask(self, run: str, cell: str, work: Callable[[OpenedCell], T], left: Left | None = None) -> T:
        """Do work on a cell; work that waits is dropped where the client has ``left``.

        Raises InputError where it cannot be opened, HTTPException (499) where the client has left.
        """
        folder = self._runs.cell(run, cell)
        # A study that was run again has other vectors, and one that is still running may have a detector by now.
        files = (folder / "records" / "chosen.json", folder / "detector.safetensors", folder.parents[1] / READER)
        made = [path.stat().st_mtime_ns for path in files if path.exists()]
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._thread, lambda: work(self._open(run, cell, *made)))
        try:
            while not (await asyncio.wait({future}, timeout=LOOK))[0]:
                if left is not None and await left():
                    raise HTTPException(499, "request: the client has left")
            return future.result()
        finally:
            future.cancel()  # of no effect once it has begun

    def close(self) -> None:
        """Answer no further request."""
        self._thread.shutdown(wait=False, cancel_futures=True)
