"""Faults of our plugin inside vLLM: a plugin too, which each of vLLM's processes loads (see ``installed``).

A file says which of them is there at the time, so that one server, which takes long to start, has them in turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mnemoscope.serving import engine, worker
from mnemoscope.serving.offered import Offered
from mnemoscope.serving.rows import rows_of


def is_there(fault: str) -> bool:
    """Whether a fault is the present one."""
    return Path(os.environ["PLANTED_FAULT"]).read_text() == fault


def hooks_removed() -> None:
    act = worker.Steerer._act

    def reads_alone(self: Any, reads: list[str], shifts: Any, value: Any) -> Any:
        return act(self, reads, [] if is_there("hooks removed") else shifts, value)

    worker.Steerer._act = reads_alone  # type: ignore[method-assign]


def alpha_ignored() -> None:
    begin = worker.Steerer.begin

    def with_ones(self: Any, *rest: Any) -> None:
        begin(self, *rest)
        if not is_there("alpha ignored"):
            return
        for toward, (rows_R, owner_R, factors_R1) in (self.now.shifted if self.now else {}).items():
            self.now.shifted[toward] = rows_R, owner_R, factors_R1 * 0 + 1

    worker.Steerer.begin = with_ones  # type: ignore[method-assign]


def wrong_layer() -> None:
    opened = Offered.open

    def later(source: Any, binding: Any) -> Offered:
        offered = opened(source, binding)
        if not is_there("wrong layer"):
            return offered
        vectors = {
            toward: replace(vector, edits={layer + 1: shift for layer, shift in vector.shifts.items()})
            for toward, vector in offered.vectors.items()
        }
        return replace(offered, vectors=vectors)

    Offered.open = later  # type: ignore[method-assign]


def no_cache_separation() -> None:
    key_of = engine.key_of_block

    def key_of_block(*about: Any) -> Any:
        return None if is_there("no cache separation") else key_of(*about)

    engine.key_of_block = key_of_block  # type: ignore[assignment]


def rows_mixed_up() -> None:
    def mixed(begins: Any, counts: Any, *rest: Any) -> Any:
        """Each request's shift acts on the rows of the next one."""
        rows = rows_of(begins, counts, *rest)
        if not is_there("rows mixed up"):
            return rows
        first_N, count_N = np.array(begins), np.array(counts)
        next_R = (rows.owner_R + 1) % len(first_N)
        place_R = np.minimum(rows.shifted_R - first_N[rows.owner_R], count_N[next_R] - 1)
        return replace(rows, shifted_R=first_N[next_R] + place_R)

    worker.rows_of = mixed  # type: ignore[assignment]


FAULTS: tuple[Callable[[], None], ...] = (hooks_removed, alpha_ignored, wrong_layer, no_cache_separation, rows_mixed_up)


def installed(folder: Path, fault: Path) -> dict[str, str]:
    """Make a distribution whose entry point is ``register``; returns environment variables with which it is found.

    ``fault``: the file that names the present one.
    """
    info = folder / "planted-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\nplanted = {__name__}:register\n")
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    # The second lets a test empty the cache of prefixes, where a fault leaves states behind.
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_SERVER_DEV_MODE": "1",
        "PLANTED_FAULT": str(fault),
    }


@cache
def register() -> None:
    """Plant all of them, once a process."""
    for plant in FAULTS:
        plant()
