"""Latency of the playground's server, alone and among many clients, and whether its memory grows.

    python benchmarks/serving.py RUN CELL [--requests 2000] [--clients 50]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np

EARLY = 200  # requests after which memory should not grow any more
SLID = 30  # prompts on which a slider is moved
REPHRASINGS = 5  # draws of another phrasing for each question


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("cell")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--neurons", type=int, default=20, help="that are shown meanwhile")
    arguments = parser.parse_args()
    if arguments.requests <= EARLY:
        parser.error(f"--requests: at least {EARLY + 1}")
    cell = f"/api/runs/{arguments.run.resolve().name}/cells/{arguments.cell}"
    with serving(arguments.run) as (client, _):
        asked = questions(client, cell, arguments.requests)
        neurons = client.get(f"{cell}/neurons").raise_for_status().json()["nmd"]
    # The crowd gets a new server: what that keeps in memory by then is part of the measurement.
    with serving(arguments.run) as (client, process):
        answer, watch = partial(_answer, client, cell, asked), partial(_watch, client, cell, neurons)
        watch(0)  # what the first one loads stays
        crowded = _crowd(answer, process, arguments, watch)
    # One quiet client of another server, into which nothing can have leaked.
    with serving(arguments.run) as (client, _):
        _quiet(partial(_answer, client, cell, asked), asked, crowded)


@contextmanager
def serving(run: Path) -> Iterator[tuple[httpx.Client, int]]:
    """A client of a new server, and the number of its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mnemoscope", "serve", str(run), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        address, _, token = server.stderr.readline().strip().partition("/?token=")
        if not token:
            raise SystemExit(f"the server does not start: {address}")
        Thread(target=server.stderr.read, daemon=True).start()
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=address, headers=headers, timeout=600) as client:
            yield client, server.pid
    finally:
        server.terminate()
        server.wait()


def _answer(client: httpx.Client, cell: str, asked: list[dict[str, Any]], number: int) -> tuple[float, Any]:
    began = time.perf_counter()
    found = client.post(f"{cell}/ask", json=asked[number])
    found.raise_for_status()
    return time.perf_counter() - began, found.json()


def _watch(client: httpx.Client, cell: str, neurons: list[Any], number: int) -> None:
    """Look at a neuron while others move the slider."""
    layer = number % len(neurons)
    looked = client.post(f"{cell}/neurons/{layer}/{number % len(neurons[0])}").raise_for_status()
    assert json.loads(looked.text.splitlines()[-1])["result"], looked.text


def _crowd(
    answer: Callable[[int], tuple[float, Any]],
    process: int,
    arguments: argparse.Namespace,
    watch: Callable[[int], None],
) -> list[Any]:
    """Answers to many clients at once, two of which look at neurons."""
    crowded, early, numbers = [], 0.0, range(arguments.requests)
    with ThreadPoolExecutor(arguments.clients) as crowd, ThreadPoolExecutor(2) as lookers:
        looks = [lookers.submit(watch, number) for number in range(1, arguments.neurons)]
        for number, (_, found) in enumerate(crowd.map(answer, numbers)):
            crowded.append(found)
            early = resident(process) if number == EARLY else early
        for look in looks:
            look.result()
    late = resident(process)
    clients = f"{arguments.clients} clients, {arguments.requests} requests, {arguments.neurons} neurons"
    print(f"{clients}: memory after {EARLY} {early:.0f} MiB, at the end {late:.0f} MiB, ratio {late / early:.3f}")
    return crowded


def _quiet(answer: Callable[[int], tuple[float, Any]], asked: list[dict[str, Any]], crowded: list[Any]) -> None:
    """Compare with the answers to one client alone, and time those."""
    quiet = [answer(number) for number in range(len(asked))]
    wrong = sum(found != alone for found, (_, alone) in zip(crowded, quiet, strict=True))
    print(f"{wrong} of {len(asked)} answers differ from those of a quiet client of another server")
    slid = []
    for first, *rest in _by_prompt(asked)[:SLID]:  # as people do: one prompt, then other vectors and strengths
        answer(first)
        slid += [answer(number)[0] for number in rest]
    sliding = np.array(slid)
    print(f"one client, slider to answer: median {1000 * np.median(sliding):.0f} ms, p95 {_p95(sliding):.0f} ms")
    fresh = np.array([seconds for seconds, _ in quiet])
    print(f"one client, another prompt each time: median {1000 * np.median(fresh):.0f} ms, p95 {_p95(fresh):.0f} ms")
    with ThreadPoolExecutor(20) as crowd:
        twenty = np.array([seconds for seconds, _ in crowd.map(answer, range(min(400, len(asked))))])
    print(f"20 clients: median {1000 * np.median(twenty):.0f} ms, p95 {_p95(twenty):.0f} ms")


def questions(client: httpx.Client, cell: str, n: int) -> list[dict[str, Any]]:
    """``n`` requests, each with a strength of its own; prompts, vectors and directions are drawn.

    A tenth is not steered, and a tenth comes without the two answers.
    """
    facts = client.get(cell).raise_for_status().json()
    methods = [row["method"] for row in facts["methods"]]
    pairs = client.get(f"{cell}/questions?n=100").json()
    prompts = [question for pair in pairs for question in pair.values()]
    for seed in range(REPHRASINGS):
        for pair in pairs:
            other = client.post(f"{cell}/rephrase?seed={seed}", json=pair["memorized"])
            if other.status_code == 200:
                prompts.append(other.json())
    rng, asked = np.random.default_rng(1), []
    for number in range(n):
        steering = {
            "toward": str(rng.choice(["generalized", "memorized"])),
            "method": str(rng.choice(methods)),
            "alpha": float(rng.uniform(0.1, 2.0)),
        }
        question = prompts[rng.integers(len(prompts))]
        if number % 10 == 1:
            question = {"prompt": question["prompt"]}
        asked.append({"question": question, "steering": None if number % 10 == 0 else steering})
    return asked


def _by_prompt(asked: list[dict[str, Any]]) -> list[list[int]]:
    """The numbers of the requests about each prompt."""
    found: dict[str, list[int]] = {}
    for number, one in enumerate(asked):
        found.setdefault(one["question"]["prompt"], []).append(number)
    return list(found.values())


def _p95(seconds: np.ndarray) -> float:
    """In milliseconds."""
    return 1000 * float(np.quantile(seconds, 0.95))


def resident(process: int) -> float:
    """Resident memory of a process in MiB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not say how much memory is resident")


if __name__ == "__main__":
    main()
