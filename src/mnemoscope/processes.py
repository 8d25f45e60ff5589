"""Set-up of worker processes: equal arithmetic in each, memory that they share, an end together with their parent."""

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
    """The built-in ``map`` of one iterable, or one in parallel (``executors``), whose results have the same order.

    Where it runs in parallel, function, items and results are pickled. A function that opens a model opens it when it
    is first called, and is pickled without it.
    """

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]: ...


in_order: Map = map
_beside = 1


@contextmanager
def pool_of(
    workers: int, threads: int | None = None, begin: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, each started when work waits for it; an error inside the context ends them all at once.

    Args:
        threads: of torch in each; None leaves torch alone.
        begin: called first in each.

    Raises:
        StudyError: the system killed a process.
    """
    given = (os.getpid(), workers * beside(), threads, begin)
    with _Pool(workers, get_context("spawn"), _begin_worker, given) as pool:
        try:
            yield pool
        except BaseException as error:
            processes = list((pool._processes or {}).values())  # which a pool that is shut down no longer knows
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
    end_with(parent)
    if threads is not None:
        settle(threads)
    if begin is not None:
        begin()


def end_with(parent: int) -> None:
    """End this process once its parent is gone, so that a killed run leaves no process behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def beside() -> int:
    """Number of processes, this one included, that share the memory of this machine."""
    return _beside


def settle(threads: int) -> None:
    """Set up torch so that this process computes the same bits as every other one with this number of threads."""
    import torch
    from threadpoolctl import threadpool_limits

    quiet_library()
    keep_freed_memory()
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # of numpy and scipy, which go by the environment of whoever started this
    torch.use_deterministic_algorithms(True)
    # It would also fill new memory, which matters only to code that reads it before writing: four per cent of a
    # training step (docs/LOG.md).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for later ones; another C library is left as it is.

    By default it returns large blocks to the system and gets them back page by page at every training step: a fifth of
    the time of a step (docs/LOG.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # numbers of malloc.h
        mallopt(trim_threshold, 2**29)
        mallopt(top_pad, 2**26)
        mallopt(mmap_threshold, 2**25)  # the largest value allowed


def quiet_library() -> None:
    """Turn off the progress bars and hints of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
