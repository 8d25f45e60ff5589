"""Set-up of worker processes: equal arithmetic in each, shared memory, an end together with their parent."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from threading import Thread
from types import ModuleType
from typing import Any, Protocol, TypeVar

from mnemoscope.errors import StudyError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Map(Protocol):
    """The built-in ``map`` of one iterable, or a parallel one (``executors``) with results in the same order.

    In parallel, function, items and results are pickled; a function opens its model when it is first called.
    """

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]: ...


in_order: Map = map
_beside = 1


@contextmanager
def pool_of(
    workers: int, threads: int | None = None, begin: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, each started when work waits; an error inside the context ends all at once.

    ``threads`` of torch in each (None leaves torch alone); ``begin`` is called first in each. Raises StudyError where
    the system killed a process.
    """
    given = (os.getpid(), workers * beside(), threads, begin)
    with _Pool(workers, get_context("spawn"), _begin_worker, given) as pool:
        try:
            yield pool
        except BaseException as error:
            processes = list((pool._processes or {}).values())  # a pool that is shut down forgets them
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise StudyError("a worker process was killed, perhaps for lack of memory; use fewer") from error
            raise


class _Pool(ProcessPoolExecutor):
    """A pool whose processes do not import the main module: a script without a guard would start itself in each."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return super().submit(function, *args, **named)
        finally:
            sys.modules["__main__"] = main


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
