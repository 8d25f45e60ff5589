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

from mnemoscope.interventions.detect import Reading
from mnemoscope.serving import engine, worker
from mnemoscope.serving.admission import Offered
from mnemoscope.serving.http import wrapped
from mnemoscope.serving.written import Writing


def shifts_removed(begin: Any, self: Any, *rest: Any) -> None:
    begin(self, *rest)
    for parts in (self.now.shifted if self.now else {}).values():
        parts[:] = [part[:0] for part in parts]


def stale_pass(begin: Any, self: Any, *rest: Any) -> None:
    """What was prepared for the pass before stays, where its rows are there."""
    before = self.now_before if hasattr(self, "now_before") else {}
    begin(self, *rest)
    if self.now:
        kept, self.now_before, rows = before, self.now.shifted, sum(rest[2])
        self.now.shifted = {
            way: parts for way, parts in kept.items() if not len(parts[0]) or int(parts[0].max()) < rows
        }


def alpha_ignored(begin: Any, self: Any, *rest: Any) -> None:
    begin(self, *rest)
    for parts in (self.now.shifted if self.now else {}).values():
        parts[2].fill_(1.0)


def wrong_layer(opened: Any, *about: Any) -> Offered:
    offered = opened(*about)
    moved = {way: {n + 1: shift for n, shift in one.shifts.items()} for way, one in offered.vectors.items()}
    return replace(offered, levers={w: {"shift": replace(one, edits=moved[w])} for w, one in offered.vectors.items()})


def no_cache_separation(key_of_block: Any, *about: Any) -> None:
    return None


def rows_mixed_up(rows_of: Any, counts: Any, *rest: Any) -> Any:
    """Each request's shift acts on the rows of the next one."""
    shifted_R, owner_R, decision_N = rows_of(counts, *rest)
    first_N, next_R = np.cumsum(counts) - counts, (owner_R + 1) % len(counts)
    place_R = np.minimum(shifted_R - first_N[owner_R], np.array(counts)[next_R] - 1)
    return first_N[next_R] + place_R, owner_R, decision_N


def row_before(read: Any, self: Any, name: Any, now: Any, whole: Any) -> None:
    """What a detector reads is the state of the token before, which may be another request's."""
    read(self, name, now, lambda rows_R: whole((rows_R - 1).clamp(min=0)))


def tokens_of_the_row_before(keep: Any, self: Any, layer: Any, whole: Any) -> None:
    keep(self, layer, lambda rows_S: whole((rows_S - 1).clamp(min=0)))


def gate_always_open(acts: Any, self: Any, *about: Any) -> Any:
    return np.ones_like(acts(self, *about))


def operator_removed(acting: Any, *about: Any) -> None:
    """As by a compiler that sees no use in it."""


# Each with the check that must find it, and what it replaces; those ``AT_START`` need a server of their own.
AT_START = ("wrong layer", "operator removed")
FAULTS: dict[str, tuple[Callable[..., Any], str, Any, str]] = {
    "shifts removed": (shifts_removed, "steered = transformers'", worker.Steerer, "begin"),
    "stale pass": (stale_pass, "steered = transformers'", worker.Steerer, "begin"),
    "alpha ignored": (alpha_ignored, "steered = transformers'", worker.Steerer, "begin"),
    "wrong layer": (wrong_layer, "steered = transformers'", Offered, "open"),
    "row before": (row_before, "read = detect", worker.Steerer, "_read"),
    "tokens of the row before": (tokens_of_the_row_before, "tokens = read", Writing, "keep"),
    "gate always open": (gate_always_open, "gate as in transformers", Reading, "acts"),
    "operator removed": (operator_removed, "steered = transformers'", worker, "act"),
    "no cache separation": (no_cache_separation, "follow-up after steering = fresh", engine, "key_of_block"),
    # Which requests share a pass is the server's choice: on a busy machine no unsteered one may have such a neighbour.
    "rows mixed up": (rows_mixed_up, "steered = transformers'", worker, "rows_of"),
}


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
    for name, (acts, _, owner, replaced) in FAULTS.items():

        def around(original: Any, *args: Any, name: str = name, acts: Any = acts) -> Any:
            present = Path(os.environ["PLANTED_FAULT"]).read_text() == name
            return acts(original, *args) if present else original(*args)

        wrapped(owner, replaced, around)
