"""What every benchmark here does alike: measure all ways in turn, round by round, and compare within a round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import numpy as np

Way = Callable[[], object]


def seconds_of(ways: Mapping[str, Way], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each way, one per round; the first round, in which everything warms up, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names, rng = list(ways), np.random.default_rng(0)
    for _ in range(rounds + 1):
        # None goes first, or behind the same other one, in every round.
        for name in rng.permutation(names).tolist():
            way = ways[name]
            gc.collect()
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, np.ndarray], to: str) -> dict[str, tuple[float, float, float]]:
    """By way: the median, least and largest ratio to the way ``to`` over rounds."""
    found = {name: values / seconds[to] for name, values in seconds.items()}
    return {name: (float(np.median(r)), float(r.min()), float(r.max())) for name, r in found.items()}
