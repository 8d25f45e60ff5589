"""How far a run is, told to whoever waits for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mnemoscope.runs.errors import InputError

Progress = Callable[[str, str, float, float, str], None]  # (cell, stage, done, total, note)
STEADY = 0.03  # of a run


@contextmanager
def shown(progress: Progress | bool | None, shares: Mapping[str, float] | None = None) -> Iterator[Progress]:
    """What a run calls with (cell, stage, done, total, note).

    Args:
        progress: a callable, which is given back; True: a bar for each cell on a terminal, lines on stderr elsewhere;
            False or None: nothing is shown.
        shares: of the whole time, by stage, of a run with one cell: then it is told how much is left.

    Raises:
        InputError: ``progress`` is none of these.
    """
    if callable(progress):
        yield progress
        return
    if not isinstance(progress, bool | None):
        raise InputError(f"progress: {progress!r}; give True, False, None, or what is called with how far it is")
    left = _Left(shares or {})
    if not (progress and sys.stderr.isatty()):
        yield _Lines(left) if progress else lambda *_: None
        return
    from rich import progress as bar
    from rich.console import Console

    told = bar.TextColumn("{task.fields[note]}")
    columns = (bar.TextColumn("{task.description}"), bar.BarColumn(), bar.TimeElapsedColumn(), told)
    with bar.Progress(*columns, console=Console(stderr=True)) as screen:
        bars: dict[str, Any] = {}

        def show(cell: str, stage: str, done: float, total: float, note: str) -> None:
            if cell not in bars:
                bars[cell] = screen.add_task(cell, total=1.0, note="")
            note += left(stage, done / max(total, 1e-9), note)
            screen.update(bars[cell], description=f"{cell} {stage}", completed=done / max(total, 1e-9), note=note)

        yield show


class _Left:
    """Estimates how much is left of a run, once a tenth of it has passed, from the shares that its stages usually take.

    What is left of the present stage is taken at its recent pace, in the last half of the time so far; later stages at
    the pace of the whole run so far, of which ``STEADY`` is mixed into the recent one, or its first steps would rule.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.shares, self.began, self.skipped = shares, time.monotonic(), 0.0
        self.stage, self.seen = "", list[tuple[float, float]]()  # (seconds, done) of calls in the present stage

    def __call__(self, stage: str, part: float, note: str) -> str:
        if stage not in self.shares:
            return ""
        stages, now = list(self.shares), time.monotonic()
        before = sum(self.shares[name] for name in stages[: stages.index(stage)])
        done = before + self.shares[stage] * min(part, 1.0)
        if note == "done before":
            self.began, self.skipped = now, done
        if stage != self.stage or done < self.seen[-1][1]:  # a further attempt starts again
            self.stage, self.seen = stage, []
        self.seen.append((now, done))
        mine = done - self.skipped
        if mine < 0.1 or done > 0.98:
            return ""
        pace, half = (now - self.began) / mine, (now + self.began) / 2  # seconds for the whole, at the pace so far
        then, from_there = max((call for call in self.seen if call[0] <= half), default=self.seen[0])
        recent = (now - then + STEADY * pace) / (done - from_there + STEADY)
        left = recent * (before + self.shares[stage] - done) + pace * (1 - before - self.shares[stage])
        return f"; about {left / 60:.0f} min left" if left > 90 else f"; about {left:.0f} s left"


class _Lines:
    """Prints one line on stderr for each tenth of a stage."""

    def __init__(self, left: _Left) -> None:
        self.seen: dict[tuple[str, str], int] = {}
        self.left = left

    def __call__(self, cell: str, stage: str, done: float, total: float, note: str) -> None:
        left, tenth = self.left(stage, done / max(total, 1), note), int(10 * done / max(total, 1))
        if self.seen.get((cell, stage)) != tenth:  # a further attempt starts again at 0
            self.seen[cell, stage] = tenth
            print(f"{cell}  {stage:<10} {min(10 * tenth, 100):3d} %  {note}{left}", file=sys.stderr, flush=True)
