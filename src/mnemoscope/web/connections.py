"""How connections are kept: deadlines for what a client sends, and a limit on their number."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

DEADLINE = 10.0  # seconds in which a request must be there, headers and body
MOST = 400  # connections at a time, half of the open files that systems usually allow; others are told to come again
_UNFINISHED = (h11.IDLE, h11.SEND_BODY)


class WithDeadline(H11Protocol):
    """Closes a connection whose request is not whole within ``DEADLINE`` seconds of its first byte, or of the start."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Read, and wait for the rest of the request, if there is any."""
        if self._closing is None:
            self._wait()
        super().data_received(data)
        if self.conn.their_state not in _UNFINISHED:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._closing = self.loop.call_later(DEADLINE, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
