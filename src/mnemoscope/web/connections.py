"""How connections are kept: deadlines for what a client sends, and a limit on their number."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

DEADLINE = 10.0  # seconds in which a request must be there, headers and body; and in which a client reads anything
MOST = 400  # connections at a time, half of the open files that systems usually allow; others are told to come again


class WithDeadline(H11Protocol):
    """Closes a connection whose request is not whole within ``DEADLINE`` seconds of its first byte, or of the start.

    So it does where the client takes nothing of an answer for as long.
    """

    _closing: asyncio.TimerHandle | None = None
    _looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that whatever the system does not take pauses us
        self._closing = self.loop.call_later(DEADLINE, transport.close)

    def data_received(self, data: bytes) -> None:
        """Read, and wait for the rest of the request, if there is any."""
        self._closing = self._closing or self.loop.call_later(DEADLINE, self.transport.close)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._closing.cancel()
            self._closing = None

    def pause_writing(self) -> None:
        """Wait for a client that does not read."""
        super().pause_writing()
        self._look(self.transport.get_write_buffer_size() + 1)

    def _look(self, before: int) -> None:
        """Give up where nothing was read since the last look, of which one is waited for at a time."""
        if self._looking:
            self._looking.cancel()
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        elif left:
            self._looking = self.loop.call_later(DEADLINE, self._look, left)
