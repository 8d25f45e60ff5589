"""Worker processes: equal arithmetic in each, a ``map`` over them, an end together with their parent."""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache, partial
from itertools import chain, islice
from multiprocessing import get_context
from signal import SIG_BLOCK, SIG_SETMASK, SIGINT, pthread_sigmask
from threading import Thread
from types import ModuleType
from typing import Any

from mnemoscope.runs.errors import StudyError

# The built-in ``map`` of one iterable, or a parallel one with results in the same order, where function, items and
# results are pickled, and a function opens its model when it is first called.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
Send = Callable[[Any], Callable[[], Any]]  # submits an item, and returns what waits for its result
AHEAD = 4  # items of a stream held at a time, by process


in_order: Map = map
_beside = 1


KILLED = (
    "a process was killed, most likely for lack of memory; use fewer processes (--workers 1), smaller batches or a "
    "smaller model, and run the same command again: what was finished is kept"
)


class LostError(StudyError):
    """A process that the system killed."""


@contextmanager
def in_processes(workers: int, threads: int | None = None) -> Iterator[Map]:
    """A ``map`` over processes of this machine, started for two items or more, with the errors of ``pool_of``.

    ``threads`` of torch in each; None where they need no torch, which takes seconds to import.
    """
    with ExitStack() as stack:
        start = cache(lambda: stack.enter_context(pool_of(workers, threads)))
        yield partial(mapped, workers, lambda function: lambda item: start().submit(call, function, item).result)


def mapped(
    places: int, sender: Callable[[bytes], Send], function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """``map`` in other processes; the function is sent pickled, and keeps there what it opens."""
    # A stream may be longer than memory, a list is in it.
    most = len(items) if isinstance(items, Sized) else AHEAD * places
    left = iter(items)
    first = list(islice(left, 2))
    if places == 1 or len(first) < 2:
        yield from map(function, chain(first, left))
        return
    send, waiting = sender(pickle.dumps(function)), deque[Callable[[], Any]]()
    for item in chain(first, left):
        waiting.append(send(item))
        if len(waiting) >= most:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def call(function: bytes, item: Any) -> Any:
    """Call a pickled function, which is unpickled once in a row of calls."""
    return _unpickled(function)(item)


@lru_cache(maxsize=1)
def _unpickled(function: bytes) -> Callable[[Any], Any]:
    return pickle.loads(function)


@contextmanager
def pool_of(
    workers: int, threads: int | None = None, begin: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Processes, each started when work waits; an error inside the context ends all at once.

    ``threads`` of torch in each (None leaves torch alone). ``begin`` is called first in each.

    Raises:
        LostError: the system killed one of them.
    """
    given = (os.getpid(), workers * beside(), threads, begin)
    pool = _Pool(workers, get_context("spawn"), _begin_worker, given)
    try:
        yield pool
    except BaseException as error:
        processes = list((pool._processes or {}).values())  # a pool that is shut down forgets them
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise LostError(KILLED) from error
        raise
    finally:
        pool.shutdown()


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
