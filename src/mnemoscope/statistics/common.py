"""Array types, groups, and checks that the statistics share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Groups = Sequence[Any] | NDArray[Any]  # names of groups: strings or integers

TIE = 1e-9  # statistics that differ by less are equal up to rounding


def group_index(groups_N: Groups, n: int) -> NDArray[np.intp]:
    """Number of the group of each example, in sorted order of the names."""
    same("groups_N: length", n, len(groups_N))
    return np.unique(np.asarray(groups_N), return_inverse=True)[1]


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover 0 to ``total``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def same(name: str, allowed: object, value: object) -> None:
    """Raise ValueError with the name unless the value is the allowed one."""
    if value != allowed:
        raise ValueError(f"{name}: {value}; allowed is {allowed}")


def as_batch(name: str, values: ArrayLike, like_LD: Floats) -> Floats:
    """Values as float64 (N, L, D); ValueError unless each has the shape of ``like_LD``."""
    values_NLD = np.asarray(values, dtype=np.float64)
    same(f"{name}: shape", (len(values_NLD), *like_LD.shape), values_NLD.shape)
    return values_NLD
