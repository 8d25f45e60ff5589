"""What the plugin costs inside vLLM: throughput of a server with it, over that of a server without it.

    PYTHONPATH=tests python benchmarks/serving_vllm.py [--model smollm2] [--rounds 7] [--requests 32] [--tokens 48]

Runs where vLLM is installed. See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from rounds import ratios, seconds_of

from vllm_server import Material, serving


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a name or folder; an empty one: the tests' tiny model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        out = Path(folder)
        material = Material.make(out, arguments.model)
        prompts = [material.prompts[n % len(material.prompts)] for n in range(arguments.requests)]
        body = {"model": "served", "prompt": prompts, "max_tokens": arguments.tokens, "ignore_eos": True}
        gated = {"steer": "generalized", "gate": material.threshold(), "read": 1}
        with serving(material, out / "plain.log", plugin=False) as plain, serving(material, out / "log") as client:
            ways = {
                "vLLM without the plugin": partial(_answer, plain, body),
                "with it, nobody steered": partial(_answer, client, body),
                "everybody steered": partial(_answer, client, {**body, "vllm_xargs": {"steer": "generalized"}}),
                "gated and read": partial(_answer, client, {**body, "vllm_xargs": gated}),
            }
            seconds = seconds_of(ways, arguments.rounds)
    first = next(iter(ways))
    tokens = arguments.requests * arguments.tokens
    for name, (middle, least, most) in ratios({n: 1 / s for n, s in seconds.items()}, first).items():
        speed = tokens / float(seconds[name].min())
        print(f"{name}: throughput {middle:.3f} ({least:.3f} to {most:.3f}) of the first, at best {speed:.0f} tokens/s")


def _answer(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post("/v1/completions", json={**body, "temperature": 0})
    answer.raise_for_status()
    assert len(answer.json()["choices"]) == len(body["prompt"])


if __name__ == "__main__":
    main()
