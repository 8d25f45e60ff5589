"""The rows of a pass that requests concern. Imports no vLLM.

A pass holds tokens of many requests, one request behind the other. Shapes: N requests, R shifted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a pass.

    Attributes:
        shifted_R: int64, rows that are shifted.
        owner_R: int64, the request that each belongs to.
        decision_N: int64, the row of each request's decision position; -1 where this pass does not hold it.
    """

    shifted_R: np.ndarray
    owner_R: np.ndarray
    decision_N: np.ndarray


def rows_of(
    begins: Sequence[int],
    counts: Sequence[int],
    computed: Sequence[int],
    starts: Sequence[int | None],
    decisions: Sequence[int],
) -> Rows:
    """Find the rows of N requests.

    Args:
        begins: the first row of each request in this pass.
        counts: its tokens in this pass.
        computed: its tokens before this pass: computed, or taken from a cache.
        starts: the first position that is shifted, or None.
        decisions: the position of the last prompt token.
    """
    shifted, owners, decision_N = [], [], np.full(len(begins), -1, np.int64)
    for n, (begin, count, before, start) in enumerate(zip(begins, counts, computed, starts, strict=True)):
        if before <= decisions[n] < before + count:
            decision_N[n] = begin + decisions[n] - before
        if start is not None and start < before + count:
            rows = np.arange(begin + max(0, start - before), begin + count)
            shifted.append(rows)
            owners.append(np.full(len(rows), n))
    nothing = np.empty(0, np.int64)
    return Rows(np.concatenate([nothing, *shifted]), np.concatenate([nothing, *owners]), decision_N)
