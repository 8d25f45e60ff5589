"""The run folders below one root, cells that are open with a thread each, and long work on them in short steps."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fastapi import HTTPException

from mnemoscope.config import NAME
from mnemoscope.report import Summary
from mnemoscope.runs.digests import intact
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import plain
from mnemoscope.runs.strict import read_json
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.shapes import Job, RunFacts, Watched

SCHEMA = 1  # of results.json
OPEN = 2  # cells whose models are kept in memory, apart from those with requests in progress
LOOK = 0.5  # seconds between two looks at whether a client has left
MOST_WAITING = 256  # requests to one cell
KEPT_JOBS = 64  # after their end
MOST_JOBS = 16  # running or waiting
WORKING_JOBS = 2  # at a time; their steps alternate with requests

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

    def folder(self, name: str, field: str = "run") -> Path:
        """The folder of a run; InputError, which names the field, where there is no run of that name."""
        return self.root / _one_of(field, name, self.names())

    def cells(self, name: str) -> list[str]:
        """Names of the cells of a run that can be opened: those that have steering vectors."""
        found = (self.folder(name) / "cells").glob("*/records/chosen.json")
        return sorted(path.parents[1].name for path in found)

    def cell(self, name: str, cell: str) -> Path:
        """The folder of a cell that can be opened; InputError where there is no such run or cell."""
        return self.folder(name) / "cells" / _one_of("cell", cell, self.cells(name))

    def results(self, name: str) -> dict[str, Any]:
        """Content of ``results.json``; empty where the run is not finished, or where it is another version's.

        InputError where it is damaged.
        """
        path = self.folder(name) / "results.json"
        found = read_json(intact(path), dict[str, Any]) if path.exists() else {}
        return found if found.get("schema") == SCHEMA else {}

    def brief(self, name: str) -> dict[str, Any]:
        """A run's first numbers by task, as ``report.Summary`` gives them."""
        with suppress(AttributeError):  # results.json holds something else
            return Summary.of(self.results(name)).brief()
        return {}

    def facts(self, name: str) -> RunFacts:
        """What the list of runs shows of one."""
        try:
            results, tasks, damaged = self.results(name), plain(self.brief(name)), None
        except InputError as error:  # it hides no other run
            results, tasks, damaged = {}, {}, str(error)
        study, cells = str(results.get("study", "")) or None, self.cells(name)
        return RunFacts(run=name, study=study, finished=bool(results), cells=cells, tasks=tasks, damaged=damaged)


def _one_of(field: str, name: str, known: list[str]) -> str:
    if name not in known:
        raise InputError(f"{field}: {name!r} is not one of {', '.join(known) or 'none'}")
    return name


async def _unless_left(future: asyncio.Future[T], left: Left | None) -> T:
    """The result of a future, which goes on for others where this client leaves."""
    while not (await asyncio.wait({future}, timeout=LOOK))[0]:
        if left is not None and await left():
            raise HTTPException(499, "request: the client has left")
    return future.result()


class _Entry:
    """An opened cell and the one thread that uses its model, so that no answer sees another's shift."""

    def __init__(self, cell: asyncio.Future[OpenedCell], name: str) -> None:
        self.cell, self.waiting = cell, 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"cell {name}")


class OpenedCells:
    """Cells, opened at their first request; the least recently used one is closed where too many are open.

    Requests wait in the event loop, not in threads, and only for requests to the same cell. All of this runs in the
    event loop, except for the work on a model.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._open: OrderedDict[tuple[object, ...], _Entry] = OrderedDict()
        # One at a time: while the library opens a model it changes settings of the whole process, and restores them.
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="opener")

    async def ask(self, run: str, cell: str, work: Callable[[OpenedCell], T], left: Left | None = None) -> T:
        """Do work on a cell, in its thread; work that waits is dropped where the client has ``left``.

        Raises InputError where it cannot be opened, HTTPException where too many requests wait for it (429) or the
        client has left (499).
        """
        folder, loop = self._runs.cell(run, cell), asyncio.get_running_loop()
        # A study that was run again has other vectors, and one that is still running may have a detector by now.
        made = [path for path in (folder / "records" / "chosen.json", folder / "detector.safetensors") if path.exists()]
        key = (run, cell, *(path.stat().st_mtime_ns for path in made))
        if key not in self._open:
            opening = loop.run_in_executor(self._opener, OpenedCell, self._runs.folder(run), cell, self._runs.model)
            self._open[key] = _Entry(opening, cell)
            while len(self._open) > OPEN:
                self._open.popitem(last=False)  # its thread ends after the requests that still hold it
        self._open.move_to_end(key)
        entry = self._open[key]
        if entry.waiting >= MOST_WAITING:
            raise HTTPException(429, f"cell: {MOST_WAITING} requests wait for {cell} already; ask again later")
        entry.waiting += 1
        try:
            opened = await _unless_left(entry.cell, left)
            waiting = loop.run_in_executor(entry.thread, work, opened)
            try:
                return await _unless_left(waiting, left)
            finally:
                waiting.cancel()  # of no effect once it has begun
        finally:
            entry.waiting -= 1
            if entry.cell.done() and entry.cell.exception() and self._open.get(key) is entry:
                del self._open[key]

    def close(self) -> None:
        """Answer no further request."""
        for thread in (self._opener, *(entry.thread for entry in self._open.values())):
            thread.shutdown(wait=False, cancel_futures=True)


class Jobs:
    """Long work behind a request, in steps, so that other requests are answered in between."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(WORKING_JOBS)

    def start(self, step: Callable[[], Awaitable[float | Watched]]) -> Job:
        """Start work; HTTPException (429) where too many jobs are running.

        ``step`` does one step, and gives the share that is done, or the result once it is finished.
        """
        if len(self._tasks) >= MOST_JOBS:
            raise HTTPException(429, f"job: {MOST_JOBS} are running already; wait for one or cancel it")
        for name in [name for name in self._jobs if name not in self._tasks][:-KEPT_JOBS]:
            del self._jobs[name]
        job = Job(job=secrets.token_urlsafe(12))
        self._jobs[job.job] = job
        task = asyncio.create_task(self._run(job, step))
        self._tasks[job.job] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.job))
        return job

    async def _run(self, job: Job, step: Callable[[], Awaitable[float | Watched]]) -> None:
        try:
            async with self._slots:
                while job.result is None:
                    found = await step()
                    if isinstance(found, Watched):
                        job.result = found
                    else:
                        job.share = found
            job.share, job.state = 1.0, "done"
        except Exception as error:  # the client reads it in the job; the server goes on
            job.state = "failed"
            job.error = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"

    def get(self, name: str) -> Job:
        """A job by its name; HTTPException (404) where there is none."""
        if name not in self._jobs:
            raise HTTPException(404, "job: there is none of that name (any more)")
        return self._jobs[name]

    def cancel(self, name: str) -> Job:
        """End a job before its next step; see ``get``."""
        job = self.get(name)
        if job.state == "running":
            job.state = "cancelled"
            self._tasks[name].cancel()
        return job

    def stop(self) -> None:
        """Cancel all of them."""
        for name in list(self._tasks):
            self.cancel(name)
