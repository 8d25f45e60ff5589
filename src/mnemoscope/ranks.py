"""Processes that work on one cell together, as torchrun starts them: who they are, and how their parts become one.

A process that was started alone is the first and the only one; nothing is sent then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_joined = False
_group: Any = None


def started() -> bool:
    """Whether torchrun has started this process and others beside it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """Find the other processes of a start by torchrun, for as long as the context lasts; alone it does nothing."""
    global _joined, _group
    if not started() or _joined:
        yield
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # Models lie on the processor unless a study places them.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend)
    # The others wait for as long as the first one works alone; they should not wait as long to find each other.
    _group = distributed.new_group(timeout=timedelta(days=30), backend=backend)
    _joined = True
    try:
        yield
    finally:
        _joined, _group = False, None
        distributed.destroy_process_group()


def world() -> int:
    """How many processes work together."""
    return int(os.environ["WORLD_SIZE"]) if _joined else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if _joined else 0


def first() -> bool:
    """Whether this one writes files and does what one process does alone."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all of them do."""
    return items[rank() :: world()]


def from_all(found: T) -> list[T]:
    """What every process found, by rank; all of them get it. What is sent is pickled, between these processes only."""
    if world() == 1:
        return [found]
    from torch import distributed

    parts: list[T | None] = [None] * world()
    distributed.all_gather_object(parts, found, group=_group)
    return cast("list[T]", parts)


def to_first(found: T) -> list[T]:
    """What every process found, by rank, for the first one; nothing for the others."""
    if world() == 1:
        return [found]
    from torch import distributed

    parts: list[T | None] | None = [None] * world() if first() else None
    distributed.gather_object(found, parts, dst=0, group=_group)
    return cast("list[T]", parts or [])


def from_first(found: T) -> T:
    """What the first process found; the others wait for it."""
    if world() == 1:
        return found
    from torch import distributed

    parts = [found]
    distributed.broadcast_object_list(parts, src=0, group=_group)
    return parts[0]


def summed(tensors: Sequence[Tensor]) -> None:
    """Replace tensors, of one device and dtype, by their sums over all processes, in one message."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat, group=_group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
