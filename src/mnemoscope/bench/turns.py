"""Who may use the model when: one at a time, so that no answer sees another's shift."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class CancelledError(Exception):
    """Whoever asked does not want to know any more."""


class Turns:
    """Lets short work go ahead of long work, and each step of long work wait for one answer at most."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counting = Lock()
        self._waiting = self._answered = 0  # those that are waiting or being answered; those that have been

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """The model, for one answer: long work lets it go first."""
        with self._counting:
            self._waiting += 1
        try:
            with self._lock:
                yield
        finally:
            with self._counting:
                self._waiting -= 1
                self._answered += 1

    @contextmanager
    def step(self, wanted: Callable[[], bool]) -> Iterator[None]:
        """The model, for one step of long work: of those who wait, one at least is answered before.

        Raises:
            CancelledError: it is not wanted any more.
        """
        answered = self._answered
        while (self._waiting and self._answered == answered) or not self._lock.acquire(timeout=0.1):
            _check(wanted)
            time.sleep(0.001)
        try:
            _check(wanted)
            yield
        finally:
            self._lock.release()


def _check(wanted: Callable[[], bool]) -> None:
    if not wanted():
        raise CancelledError
