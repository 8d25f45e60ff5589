"""What the playground's server takes per answer, alone and among many, and whether its memory grows.

    python benchmarks/serving.py RUN CELL [--requests 2000] [--clients 50]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

PORT_TRIES = 200
EARLY = 200  # requests after which memory should not grow any more
SLID = 30  # prompts that are slid over


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("cell")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.requests <= EARLY:
        parser.error(f"--requests: at least {EARLY + 1}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mnemoscope", "serve", str(arguments.run), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            _measure(client, server.pid, arguments)
    finally:
        server.terminate()
        server.wait()


def _measure(client: httpx.Client, process: int, arguments: argparse.Namespace) -> None:
    cell = f"/api/runs/{arguments.run.resolve().name}/cells/{arguments.cell}"
    asked = _questions(client, cell, arguments.requests)

    def answer(number: int) -> tuple[float, Any]:
        began = time.perf_counter()
        found = client.post(f"{cell}/ask", json=asked[number])
        found.raise_for_status()
        return time.perf_counter() - began, found.json()

    # The crowd first, on a server that has answered nobody: what it keeps by then is part of what is measured.
    crowded, early = [], 0.0
    with ThreadPoolExecutor(arguments.clients) as crowd:
        for number, (_, found) in enumerate(crowd.map(answer, range(len(asked)))):
            crowded.append(found)
            early = _resident(process) if number == EARLY else early
    late = _resident(process)
    told = f"{arguments.clients} clients, {len(asked)} requests"
    print(f"{told}: memory after {EARLY} {early:.0f} MiB, at the end {late:.0f} MiB, ratio {late / early:.3f}")
    quiet = [answer(number) for number in range(len(asked))]
    wrong = sum(found != alone for found, (_, alone) in zip(crowded, quiet, strict=True))
    print(f"{told}: {wrong} answers differ from a quiet client's")
    slid = []
    for first, *rest in _by_prompt(asked)[:SLID]:  # as a person does: one prompt, then other vectors and strengths
        answer(first)
        slid += [answer(number)[0] for number in rest]
    sliding = np.array(slid)
    print(f"one client, slider to answer: median {1000 * np.median(sliding):.0f} ms, p95 {_p95(sliding):.0f} ms")
    fresh = np.array([seconds for seconds, _ in quiet])
    print(f"one client, another prompt each time: median {1000 * np.median(fresh):.0f} ms, p95 {_p95(fresh):.0f} ms")
    with ThreadPoolExecutor(20) as crowd:
        twenty = np.array([seconds for seconds, _ in crowd.map(answer, range(min(400, len(asked))))])
    print(f"20 clients: median {1000 * np.median(twenty):.0f} ms, p95 {_p95(twenty):.0f} ms")


def _questions(client: httpx.Client, cell: str, n: int) -> list[dict[str, Any]]:
    """``n`` requests, each with a strength of its own; prompts, vectors and directions are drawn."""
    for _ in range(PORT_TRIES):
        try:
            facts = client.get(cell).raise_for_status().json()
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    else:
        raise SystemExit("the server does not answer")
    methods = [row["method"] for row in facts["methods"]]
    pairs = client.get(f"{cell}/questions?n=100").json()
    prompts = [question for pair in pairs for question in pair.values()]
    rng, asked = np.random.default_rng(1), []
    for _ in range(n):
        turning = {
            "toward": str(rng.choice(["generalized", "memorized"])),
            "method": str(rng.choice(methods)),
            "alpha": float(rng.uniform(0.1, 2.0)),
        }
        asked.append({"question": prompts[rng.integers(len(prompts))], "turning": turning})
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


def _resident(process: int) -> float:
    """Resident memory of a process in MiB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not say how much memory is resident")


if __name__ == "__main__":
    main()
