"""How a process that runs cells is set up, so that every one of them computes alike."""

from __future__ import annotations

import ctypes
import sys

_beside = 1


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
