"""The cells that are open, each with a thread of its own in which it is asked."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mnemoscope.bench import Bench
from mnemoscope.web.busy import BusyError
from mnemoscope.web.rooms import Rooms

OPEN = 2  # cells whose models are kept in memory, but for those that somebody is still asking
MOST_WAITING = 256  # requests to one cell
T = TypeVar("T")
Key = tuple[object, ...]


@dataclass
class _Opened:
    bench: Bench
    thread: ThreadPoolExecutor
    waiting: int = 0


class OpenedCells:
    """Cells, opened when they are first asked; the one that was asked longest ago is closed where too many are open.

    Whoever waits holds no thread, and waits for nobody who asks another cell. Each thread that a model is asked in
    keeps memory of its own, so there are few of them, and always the same. All of this but the work is done in the
    event loop.
    """

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._open: OrderedDict[Key, _Opened] = OrderedDict()
        self._opening: dict[Key, asyncio.Task[None]] = {}
        # One at a time: while the library opens a model it changes settings of the whole process, and puts them back.
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="opener")

    async def ask(self, run: str, cell: str, work: Callable[[Bench], T]) -> T:
        """What the work finds.

        Raises:
            InputError: there is no such cell, or it cannot be opened.
            BusyError: too many wait for it.
        """
        folder = self._rooms.cell(run, cell)
        # A study that was run again has other vectors, and one that is still running may have a detector by now.
        made = [path for path in (folder / "records" / "chosen.json", folder / "detector.safetensors") if path.exists()]
        key = (run, cell, *(path.stat().st_mtime_ns for path in made))
        while key not in self._open:
            if key not in self._opening:
                self._opening[key] = asyncio.create_task(self._open_cell(key, self._rooms.run(run), cell))
            await asyncio.shield(self._opening[key])  # whoever leaves does not end it for the others
        self._open.move_to_end(key)
        opened = self._open[key]
        if opened.waiting >= MOST_WAITING:
            raise BusyError(f"cell: {MOST_WAITING} requests wait for {cell} already; ask again later")
        opened.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(opened.thread, work, opened.bench)
        finally:
            opened.waiting -= 1

    async def _open_cell(self, key: Key, run: Path, cell: str) -> None:
        try:
            bench = await asyncio.get_running_loop().run_in_executor(self._opener, Bench.of, run, cell)
            self._open[key] = _Opened(bench, ThreadPoolExecutor(1, thread_name_prefix=f"asks {cell}"))
            while len(self._open) > OPEN:
                _, closed = self._open.popitem(last=False)
                closed.thread.shutdown(wait=False)  # what waits there is still answered
        finally:
            del self._opening[key]

    def close(self) -> None:
        """Answer nobody any more."""
        for thread in (self._opener, *(opened.thread for opened in self._open.values())):
            thread.shutdown(wait=False, cancel_futures=True)
