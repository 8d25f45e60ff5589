"""What clients of the playground may hold: deadlines, a limit, no work for who has left; no way in from outside."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

from mnemoscope.web import connections, runs
from mnemoscope.web.app import build_app
from playground import TOKEN, client_of, served

GET = f"GET /api/runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
POST = GET.replace("GET /api/runs", "POST /api/runs/a/cells/b/ask")


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a playground that waits half a second for a request and takes four connections."""
    monkeypatch.setattr(connections, "DEADLINE", 0.5)
    monkeypatch.setattr("mnemoscope.web.app.MOST", 4)
    with served(build_app(runs.Runs(tmp_path), TOKEN)) as address:
        yield int(address.rpartition(":")[2])


def answer_to(port: int, *parts: str, pause: float = 0.0) -> tuple[bytes, float]:
    """All that a client gets that sends parts of a request with pauses, and the seconds until the connection ends."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        got = b""
        for part in parts:
            client.sendall(part.encode())
            time.sleep(pause)
        while chunk := client.recv(65536):
            got += chunk
    return got, time.monotonic() - began


@pytest.mark.parametrize(
    "parts",
    [(), ("G",), ("GET / HTTP/1.1\r\nHost: localhost\r\n",), (f"{POST}Content-Length: 100\r\n\r\n", "{")],
    ids=["nothing", "a letter", "half of the headers", "half of the body"],
)
def test_a_request_that_does_not_arrive_is_not_waited_for(parts: tuple[str, ...], port: int) -> None:
    got, seconds = answer_to(port, *parts)
    assert not got.startswith(b"HTTP/1.1 2")
    assert 0.3 < seconds < 8, "the client itself gives up after ten"


def test_whole_requests_are_answered_on_one_connection_for_longer_than_the_deadline(port: int) -> None:
    got, _ = answer_to(port, f"{GET}\r\n", f"{GET}\r\n", f"{GET}Connection: close\r\n\r\n", pause=0.4)
    assert got.count(b"HTTP/1.1 200") == 3


def test_more_connections_than_the_limit_are_told_so(port: int) -> None:
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
    time.sleep(0.1)
    assert answer_to(port, f"{GET}\r\n")[0].startswith(b"HTTP/1.1 503")
    for one in held:
        one.close()


def test_work_of_a_client_that_has_left_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "LOOK", 0.01)
    monkeypatch.setattr(runs, "OpenedCell", lambda run, cell, model: "opened")
    folders: Any = SimpleNamespace(cell=lambda *_: tmp_path, folder=lambda _: tmp_path, model=None)
    opened, go_on, done = runs.OpenedCells(folders), Event(), list[str]()

    async def has_left() -> bool:
        return True

    async def asked() -> None:
        first = asyncio.create_task(opened.ask("run", "cell", lambda _: go_on.wait(5)))
        await asyncio.sleep(0.05)
        with pytest.raises(HTTPException) as refused:
            await opened.ask("run", "cell", lambda _: done.append("left"), has_left)
        assert refused.value.status_code == 499
        ended = asyncio.create_task(opened.ask("run", "cell", lambda _: done.append("cancelled")))
        last = asyncio.create_task(opened.ask("run", "cell", lambda _: done.append("stayed")))
        await asyncio.sleep(0.05)
        ended.cancel()
        with suppress(asyncio.CancelledError):
            await ended
        go_on.set()
        await asyncio.gather(first, last)

    asyncio.run(asked())
    opened.close()
    assert done == ["stayed"]


@pytest.mark.parametrize(
    "path", ["//evil.example/", "//evil.example", "/runs/", "//evil.example/?token={}", "/?token={}&run=//evil.example"]
)
def test_no_answer_leads_to_another_site(path: str, tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        answer: Any = client.get(f"http://localhost{path.format(TOKEN)}", follow_redirects=False)
        assert answer.headers.get("location", "/").split("?")[0] == "/"
