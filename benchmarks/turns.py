"""Trainings in turns: each in a process of its own, one at work at a time, so that a slow minute is slow for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Turn:
    """Some steps of a training and the measurement after them.

    Attributes:
        seconds: of the whole turn; the first also has what a training does before its first step.
        per_step: seconds of a step, without the measurement.
        work_per_step: the same in seconds of processor time, of all threads.
        steps: optimizer steps of the training by then.
        missed: what the stop rule still misses.
    """

    seconds: float
    per_step: float
    work_per_step: float
    steps: int
    missed: list[str]


class Turns:
    """What a training calls: ``begin`` before its clock starts, ``stepped`` after a step, ``measured`` after measuring.

    It measures every ``every`` steps, at least 2, and waits there for its next turn.
    """

    def __init__(self, pipe: Connection, every: int) -> None:
        self.pipe, self.every = pipe, every
        self._began = self._stepped = (0.0, 0.0)

    def begin(self) -> None:
        """Say that everything is built, and wait for the first turn."""
        self.pipe.send("built")
        self._wait()

    def stepped(self, step: int) -> None:
        """Note the time of the last step that has no measurement after it."""
        if step % self.every == self.every - 1:
            self._stepped = _clocks()

    def measured(self, step: int, missed: list[str]) -> None:
        """Report the turn, and wait for the next."""
        of_step = [(end - begin) / (self.every - 1) for begin, end in zip(self._began, self._stepped, strict=True)]
        self.pipe.send(Turn(time.perf_counter() - self._began[0], *of_step, step, missed))
        self._wait()

    def _wait(self) -> None:
        self.pipe.recv()  # EOFError where there is no next turn: it ends the process
        self._began = _clocks()


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


Training = Callable[[Turns], None]


def in_turns(
    trainings: Mapping[str, Training], every: int, is_over: Callable[[str, Mapping[str, list[Turn]]], bool]
) -> dict[str, list[Turn]]:
    """The turns of each training, until it ends or ``is_over`` of its name and all turns so far.

    Raises EOFError where the process of a training failed.
    """
    context, pipes, processes = get_context("spawn"), {}, {}
    for name, training in trainings.items():
        pipes[name], other = context.Pipe()
        processes[name] = context.Process(target=_child, args=(other, every, training), daemon=True)
        processes[name].start()
        other.close()
        pipes[name].recv()  # one builds after the other
    turns: dict[str, list[Turn]] = {name: [] for name in trainings}
    names = list(trainings)
    while pipes:
        for name in names:
            if name not in pipes:
                continue
            pipes[name].send("go on")
            turn = pipes[name].recv()
            turns[name] += [turn] if turn else []
            if not turn or is_over(name, turns):
                pipes.pop(name).close()
                processes[name].join()  # its end is no time of another
        names = [*names[1:], names[0]]  # each goes first in turn
    return turns


def _child(pipe: Connection, every: int, training: Training) -> None:
    with suppress(EOFError):
        training(Turns(pipe, every))
        pipe.send(None)
