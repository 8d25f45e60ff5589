"""Faults of our plugin inside vLLM: a plugin too, which each of vLLM's processes loads (see ``installed``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mnemoscope.serving import engine, worker
from mnemoscope.serving.offered import Offered
from mnemoscope.serving.rows import rows_of


def hooks_removed() -> None:
    act = worker.Steerer._act

    def reads_alone(self: Any, reads: list[str], shifts: Any, value: Any) -> Any:
        return act(self, reads, [], value)

    worker.Steerer._act = reads_alone  # type: ignore[method-assign]


def alpha_ignored() -> None:
    begin = worker.Steerer.begin

    def with_ones(self: Any, *rest: Any) -> None:
        begin(self, *rest)
        for toward, (rows_R, owner_R, factors_R1) in (self.now.shifted if self.now else {}).items():
            self.now.shifted[toward] = rows_R, owner_R, factors_R1 * 0 + 1

    worker.Steerer.begin = with_ones  # type: ignore[method-assign]


def wrong_layer() -> None:
    opened = Offered.open

    def later(source: Any, binding: Any) -> Offered:
        offered = opened(source, binding)
        vectors = {
            toward: replace(vector, shifts={layer + 1: shift for layer, shift in vector.shifts.items()})
            for toward, vector in offered.vectors.items()
        }
        return replace(offered, vectors=vectors)

    Offered.open = later  # type: ignore[method-assign]


def no_cache_separation() -> None:
    engine.key_of_block = lambda *_: None  # type: ignore[assignment]


def rows_mixed_up() -> None:
    def mixed(begins: Any, counts: Any, *rest: Any) -> Any:
        """Each request's shift acts on the rows of the next one."""
        rows = rows_of(begins, counts, *rest)
        first_N, count_N = np.array(begins), np.array(counts)
        next_R = (rows.owner_R + 1) % len(first_N)
        place_R = np.minimum(rows.shifted_R - first_N[rows.owner_R], count_N[next_R] - 1)
        return replace(rows, shifted_R=first_N[next_R] + place_R)

    worker.rows_of = mixed  # type: ignore[assignment]


FAULTS: dict[str, Callable[[], None]] = {
    "hooks removed": hooks_removed,
    "alpha ignored": alpha_ignored,
    "wrong layer": wrong_layer,
    "no cache separation": no_cache_separation,
    "rows mixed up": rows_mixed_up,
}
planted: set[str] = set()


def installed(folder: Path) -> dict[str, str]:
    """Make a distribution whose entry point is ``register``; returns environment variables with which it is found."""
    info = folder / "planted-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\nplanted = {__name__}:register\n")
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def register() -> None:
    """Plant the fault that the environment names, once a process."""
    fault = os.environ["PLANTED_FAULT"]
    if fault not in planted:
        planted.add(fault)
        FAULTS[fault]()
