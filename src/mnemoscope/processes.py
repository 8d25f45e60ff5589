"""How a process that runs cells is set up, so that every one of them computes alike, and several beside each other."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from threading import Thread
from typing import Any

# Calls a function with parts of a list, in one place or several, and gives what it found for each, in their order.
Spread = Callable[[Callable[[list[Any]], list[Any]], list[Any]], list[Any]]

_beside = 1


def in_one_place(function: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
    """All of them here."""
    return function(items)


@contextmanager
def side_by_side(many: int) -> Iterator[Spread]:
    """Parts of a list in ``many`` processes of this machine, which begin when they are first needed."""
    if many == 1:
        yield in_one_place
        return
    with pool_of(many) as pool:

        def spread(function: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
            if len(items) < 2:
                return function(items)
            found: list[Any] = [None] * len(items)
            parts = [items[place::many] for place in range(min(many, len(items)))]
            for place, part in enumerate(pool.map(function, parts)):
                found[place::many] = part
            return found

        yield spread


@contextmanager
def pool_of(many: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that work for this one; whatever goes wrong here ends them at once, whatever they are at."""
    with ProcessPoolExecutor(many, get_context("spawn"), _begin_worker, (os.getpid(), many)) as pool:
        try:
            yield pool
        except BaseException:
            processes = list((pool._processes or {}).values())  # which a pool that is shut down no longer knows
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


def _begin_worker(parent: int, many: int) -> None:
    share_memory(many)
    die_with(parent)


def die_with(parent: int) -> None:
    """End this process when the one that started it is gone, so that a killed run leaves nobody behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def share_memory(processes: int) -> None:
    """Say how many processes like this one, itself included, take their memory from this machine at a time."""
    global _beside
    _beside = processes


def beside() -> int:
    """How many processes share this machine's memory."""
    return _beside


def settle(threads: int) -> None:
    """Make this process compute as every process does that runs a cell with so many threads."""
    import torch
    from threadpoolctl import threadpool_limits

    quiet_library()
    keep_freed_memory()
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # of numpy and scipy, which go by the environment of whoever started this
    torch.use_deterministic_algorithms(True)
    # It would also fill all memory before anything is written there, which only a reader of nothing would notice: four
    # per cent of a training step (docs/LOG.md).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free for the next ones.

    It would give large blocks back to the system, which hands them out again page by page, at every step of a training:
    a fifth of its time (docs/LOG.md). Another C library than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # as malloc.h numbers them
        mallopt(trim_threshold, 2**29)
        mallopt(top_pad, 2**26)
        mallopt(mmap_threshold, 2**25)  # the most it takes


def quiet_library() -> None:
    """Keep bars and hints of transformers out of what is shown of our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
