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


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("cell")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=50)
    arguments = parser.parse_args()
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
    asked = _questions(client, cell)

    def answer(number: int) -> tuple[float, Any]:
        began = time.perf_counter()
        found = client.post(f"{cell}/ask", json=asked[number % len(asked)])
        found.raise_for_status()
        return time.perf_counter() - began, found.json()

    quiet = [answer(number) for number in range(len(asked))]
    alone = np.array([seconds for seconds, _ in (answer(number) for number in range(len(asked)))])
    print(f"one client, slider to answer: median {1000 * np.median(alone):.0f} ms, p95 {_p95(alone):.0f} ms")
    with ThreadPoolExecutor(20) as crowd:
        twenty = np.array([seconds for seconds, _ in crowd.map(answer, range(400))])
    print(f"20 clients: median {1000 * np.median(twenty):.0f} ms, p95 {_p95(twenty):.0f} ms")
    order = np.random.default_rng(0).integers(len(asked), size=arguments.requests)
    wrong, early = 0, 0.0
    with ThreadPoolExecutor(arguments.clients) as crowd:
        for number, (_, found) in enumerate(crowd.map(answer, order.tolist())):
            wrong += found != quiet[order[number]][1]
            early = _resident(process) if number == 200 else early
    late = _resident(process)
    print(f"{arguments.clients} clients, {arguments.requests} requests: {wrong} answers differ from a quiet client's")
    print(f"memory after 200: {early:.0f} MiB, at the end {late:.0f} MiB, ratio {late / early:.3f}")


def _questions(client: httpx.Client, cell: str) -> list[dict[str, Any]]:
    """Different prompts, vectors and strengths."""
    for _ in range(PORT_TRIES):
        try:
            facts = client.get(cell).raise_for_status().json()
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    methods = [row["method"] for row in facts["methods"]]
    pairs = client.get(f"{cell}/questions?n=24").json()
    rng, asked = np.random.default_rng(1), []
    for pair in pairs:
        for question in pair.values():
            toward = str(rng.choice(["generalized", "memorized"]))
            alpha = round(float(rng.uniform(0.1, 2.0)), 2)
            turning = {"toward": toward, "method": str(rng.choice(methods)), "alpha": alpha}
            asked.append({"question": question, "turning": turning})
    return asked


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
