"""Set-up of worker processes: equal arithmetic in each, shared memory, an end together with their parent."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from signal import SIG_BLOCK, SIG_SETMASK, SIGINT, pthread_sigmask
from threading import RLock, Thread
from types import ModuleType
from typing import Any, Protocol, TypeVar

from mnemoscope.runs.errors import StudyError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Map(Protocol):
    """The built-in ``map`` of one iterable, or a parallel one (``executors``) with results in the same order.

    In parallel, function, items and results are pickled; a function opens its model when it is first called.
    """

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]: ...


in_order: Map = map
_beside = 1


class LostError(StudyError):
    """A call whose process the system killed again and again."""


LOST = 3  # kills of its process after which a call is given up
KILLED = (
    f"its process was killed {LOST} times, most likely for lack of memory; use fewer processes (--workers 1), smaller "
    "batches or a smaller model, and run the same command again: what was finished is kept"
)


@contextmanager
def pool_of(
    workers: int, threads: int | None = None, begin: Callable[[], Callable[[], None] | None] = lambda: None
) -> Iterator[Workers]:
    """Processes, each started when work waits; an error inside the context ends all at once.

    ``threads`` of torch in each (None leaves torch alone). ``begin`` is called for every set of processes; what it
    returns is called first in each.
    """
    pool = Workers(workers, threads, begin)
    try:
        yield pool
    except BaseException:
        pool.end(now=True)
        raise
    pool.end()


@dataclass(eq=False)
class _Call:
    """A call, what its caller waits for, and how often its process was killed."""

    run: Callable[[], Any]
    future: Future[Any]
    lost: int = 0


class Workers:
    """Processes that are started anew where the system kills one: unfinished calls run again, in fewer processes.

    Once a process was lost no more calls are given out than there are processes, so that only those at work can be
    to blame; after the second loss there is one process. A call that is lost ``LOST`` times gets a LostError.
    """

    def __init__(self, workers: int, threads: int | None, begin: Callable[[], Callable[[], None] | None]) -> None:
        self._workers, self._threads, self._begin = workers, threads, begin
        self._most = math.inf  # calls given out at a time
        self._waiting, self._active = deque[_Call](), set[_Call]()
        self._pool: _Pool | None = None
        self._losses, self._lock = 0, RLock()

    def submit(self, function: Callable[..., Result], /, *args: Any) -> Future[Result]:
        """Call a function in one of the processes."""
        call = _Call(partial(function, *args), Future())
        call.future.set_running_or_notify_cancel()
        with self._lock:
            self._waiting.append(call)
            self._give_out()
        return call.future

    def end(self, now: bool = False) -> None:
        """End the processes once their calls are done, or ``now``."""
        with self._lock:
            pool, self._pool, self._most = self._pool, None, 0
        if pool is None:
            return
        processes = list((pool._processes or {}).values())  # a pool that is shut down forgets them
        pool.shutdown(wait=not now, cancel_futures=True)
        if now:
            for process in processes:
                process.terminate()
            pool.shutdown()

    def _give_out(self) -> None:
        while self._waiting and len(self._active) < self._most:
            if self._pool is None:
                given = (os.getpid(), self._workers * beside(), self._threads, self._begin())
                self._pool = _Pool(self._workers, get_context("spawn"), _begin_worker, given)
            call, pool = self._waiting.popleft(), self._pool
            self._active.add(call)
            try:
                sent = pool.submit(call.run)
            except BrokenProcessPool:
                self._lose(pool, call)
            else:
                sent.add_done_callback(partial(self._ended, pool, call))

    def _ended(self, pool: _Pool, call: _Call, sent: Future[Any]) -> None:
        if sent.cancelled():
            return
        error = sent.exception()
        if isinstance(error, BrokenProcessPool):
            # Not in this thread, which may hold a lock of the broken pool.
            Thread(target=self._take_back, args=(pool, call), daemon=True).start()
            return
        with self._lock:
            self._active.discard(call)
            self._give_out()
        if error is None:
            call.future.set_result(sent.result())
        else:
            call.future.set_exception(error)

    def _take_back(self, pool: _Pool, call: _Call) -> None:
        with self._lock:
            self._lose(pool, call)
            self._give_out()

    def _lose(self, pool: _Pool, call: _Call) -> None:
        if self._pool is pool:  # the first call of this pool to be told
            self._losses += 1
            self._pool, self._workers = None, 1 if self._losses > 1 else max(1, self._workers // 2)
            self._most = min(self._most, self._workers)
        self._active.discard(call)
        call.lost += 1
        if call.lost < LOST:
            self._waiting.append(call)
        else:
            call.future.set_exception(LostError(KILLED))


class _Pool(ProcessPoolExecutor):
    """A pool whose processes do not import the main module, and are not stopped by the keys that stop this one.

    A script without a guard would start itself in each; and a worker that is stopped (Ctrl-C) would print a traceback.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        before = pthread_sigmask(SIG_BLOCK, {SIGINT})  # processes that are started here inherit it
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return super().submit(function, *args, **named)
        finally:
            sys.modules["__main__"] = main
            pthread_sigmask(SIG_SETMASK, before)


def _begin_worker(parent: int, sharing: int, threads: int | None, begin: Callable[[], None] | None) -> None:
    global _beside
    _beside = sharing
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    if threads is not None:
        settle(threads)
    if begin is not None:
        begin()


def _end_with(parent: int) -> None:
    """End this process once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def beside() -> int:
    """Number of processes, this one included, that share the memory of this machine."""
    return _beside


def settle(threads: int) -> None:
    """Set up torch so that all processes with this number of threads compute the same bits."""
    import torch
    from threadpoolctl import threadpool_limits

    quiet_library()
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # glibc returns large blocks to the system and gets them back page by page at every training step: a fifth of
        # the time of a step (docs/LOG.md). The numbers are those of malloc.h.
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(trim_threshold, 2**29)
        mallopt(top_pad, 2**26)
        mallopt(mmap_threshold, 2**25)  # the largest value allowed
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # of numpy and scipy
    torch.use_deterministic_algorithms(True)
    # It would also fill new memory: four per cent of a training step (docs/LOG.md).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def quiet_library() -> None:
    """Turn off the progress bars and hints of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
