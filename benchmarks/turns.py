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

    Times are pairs: seconds of the clock, and of the processor, which counts all threads and not the time of others.

    Attributes:
        whole: time of the turn; the first also has what a training does before its first step.
        per_step: time of a step, without the measurement.
        steps: optimizer steps of the training by then.
        missed: what the stop rule still misses.
    """

    whole: tuple[float, float]
    per_step: tuple[float, float]
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
            self._stepped = _now()

    def measured(self, step: int, missed: list[str]) -> None:
        """Report the turn, and wait for the next."""
        clock, processor = (since / (self.every - 1) for since in _since(self._began, self._stepped))
        self.pipe.send(Turn(_since(self._began, _now()), (clock, processor), step, missed))
        self._wait()

    def _wait(self) -> None:
        self.pipe.recv()  # EOFError where there is no next turn: it ends the process
        self._began = _now()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float], ended: tuple[float, float]) -> tuple[float, float]:
    return ended[0] - began[0], ended[1] - began[1]


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
