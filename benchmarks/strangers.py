"""What honest clients of the playground's server notice of others who ask wrongly, leave, or never finish asking.

    python benchmarks/strangers.py RUN CELL [--requests 2000] [--clients 50] [--half-open 100]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import numpy as np
from serving import EARLY, questions, resident, serving

BEGUN = b"POST /api HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
LEAVES = 0.02  # seconds after which a client that leaves is gone
BAD: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
    lambda asked: {"content": b"{"},
    lambda asked: {"json": {**asked, "question": {"prompt": ""}}},
    lambda asked: {"json": {**asked, "steering": {"toward": "sideways", "method": "nmd", "alpha": 1.0}}},
    lambda asked: {"json": {**asked, "steering": {"toward": "memorized", "method": "../nmd", "alpha": 1.0}}},
    lambda asked: {"json": [asked]},
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("cell")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--half-open", type=int, default=100)
    arguments = parser.parse_args()
    cell = f"/api/runs/{arguments.run.resolve().name}/cells/{arguments.cell}"
    with serving(arguments.run) as (client, _):
        asked = questions(client, cell, arguments.requests)
        honest = [number for number in range(len(asked)) if _kind(number) == "honest"]
        alone = _answers(client, cell, asked, honest, arguments.clients, lambda done: None)
    sizes: dict[int, float] = {}
    with serving(arguments.run) as (client, process), _half_open(client, arguments.half_open) as opened:
        questions(client, cell, arguments.requests)  # which opens the cell, as it did on the other server

        def watch(done: int) -> None:
            if done in (EARLY, len(asked)):
                sizes[done] = resident(process)

        beside = _answers(client, cell, asked, list(range(len(asked))), arguments.clients, watch)
    wrong = sum(alone[number][1] != beside[number][1] for number in honest)
    bad = [beside[number][1] for number in beside if _kind(number) == "bad"]
    print(f"{len(honest)} honest requests of {len(asked)}, {len(bad)} bad, {opened[0]} half-open connections, in all")
    print(f"honest answers that differ: {wrong}; bad requests answered by another code than 4xx: {sum(map(_odd, bad))}")
    for name, share in (("median", 0.5), ("p95", 0.95), ("longest", 1.0)):
        waits = [float(np.quantile([found[number][0] for number in honest], share)) for found in (alone, beside)]
        print(
            f"wait, {name}: {waits[0]:.2f} s alone, {waits[1]:.2f} s beside strangers, ratio {waits[1] / waits[0]:.2f}"
        )
    early, late = sizes[EARLY], sizes[len(asked)]
    print(f"memory after {EARLY} {early:.0f} MiB, at the end {late:.0f} MiB, ratio {late / early:.3f}")


def _kind(number: int) -> str:
    return {0: "bad", 5: "bad", 3: "left"}.get(number % 10, "honest")


def _odd(answer: int) -> bool:
    return not 400 <= answer < 500


def _answers(
    client: httpx.Client,
    cell: str,
    asked: list[dict[str, Any]],
    numbers: list[int],
    clients: int,
    watch: Callable[[int], None],
) -> dict[int, tuple[float, Any]]:
    """Seconds and answer of each request; of bad ones the status code, of those whose client left None."""
    answer, found = partial(_answer, client, f"{cell}/ask", asked), dict[int, tuple[float, Any]]()
    with ThreadPoolExecutor(clients) as crowd:
        for number, one in zip(numbers, crowd.map(answer, numbers), strict=True):
            found[number] = one
            watch(len(found))
    return found


def _answer(client: httpx.Client, where: str, asked: list[dict[str, Any]], number: int) -> tuple[float, Any]:
    began, kind = time.perf_counter(), _kind(number)
    if kind == "bad":
        given = BAD[number // 5 % len(BAD)](asked[number])
        return 0.0, client.post(where, **given).status_code
    if kind == "left":
        with suppress(httpx.TimeoutException):
            client.post(where, json=asked[number], timeout=LEAVES)
        return 0.0, None
    found = client.post(where, json=asked[number])
    found.raise_for_status()
    return time.perf_counter() - began, found.json()


@contextmanager
def _half_open(client: httpx.Client, most: int) -> Iterator[list[int]]:
    """Inside the context there are so many connections whose request never ends; how many were opened in all."""
    place, ended, opened = (client.base_url.host, client.base_url.port), Event(), [0]

    def hold() -> None:
        held: list[socket.socket] = []
        while not ended.is_set():
            for one in held[:]:
                with suppress(BlockingIOError):
                    if not one.recv(1, socket.MSG_DONTWAIT):  # the server closed it
                        held.remove(one)
                        one.close()
            for _ in range(most - len(held)):
                held.append(socket.create_connection(place))
                held[-1].sendall(BEGUN + b"\r\n" * (opened[0] % 2))  # in its headers, or before its body
                opened[0] += 1
            time.sleep(0.2)
        for one in held:
            one.close()

    holder = Thread(target=hold, daemon=True)
    holder.start()
    try:
        yield opened
    finally:
        ended.set()
        holder.join()


if __name__ == "__main__":
    main()
