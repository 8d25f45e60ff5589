"""What the plugin costs inside vLLM: throughput of a server with it, over that of a server without it.

    PYTHONPATH=tests python benchmarks/serving_vllm.py [--model smollm2] [--rounds 7] [--requests 32] [--servers 2]

Runs where vLLM is installed. See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from rounds import ratios, seconds_of

from test_vllm import Material, serving

PLAIN, UNSTEERED = "vLLM without the plugin", "with it, nobody steered"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a name or folder; an empty one: the tests' tiny model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--servers", type=int, default=2, help="of each kind; they differ more than it costs")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder, ExitStack() as opened:
        out = Path(folder)
        material = Material.make(out, arguments.model)
        fitted = material.fitted()
        rows = [fitted.inputs([text]).input_ids[0].tolist() for text in material.texts]
        prompts = [rows[n % len(rows)] for n in range(arguments.requests)]
        gate = float(np.median(replace(fitted, detector=fitted.lower_detector).detect(material.texts).p_memorized))
        body = {"model": "served", "prompt": prompts, "max_tokens": arguments.tokens, "ignore_eos": True}
        settings = {
            "everybody steered": {"steer": "generalized"},
            "gated and read": {"steer": "generalized", "gate": gate, "read": 1},
        }
        ways: dict[str, Callable[[], None]] = {}
        for n in range(arguments.servers):
            plain = opened.enter_context(serving(material, out / f"plain{n}.log", plugin=False))
            client = opened.enter_context(serving(material, out / f"plugin{n}.log"))
            ways[f"{PLAIN} {n}"] = partial(_answer, plain, body)
            ways[f"{UNSTEERED} {n}"] = partial(_answer, client, body)
            for name, some in settings.items():
                ways[f"{name} {n}"] = partial(_answer, client, {**body, "vllm_xargs": some})
        seconds = seconds_of(ways, arguments.rounds)
    both = {
        name: np.mean([seconds[f"{name} {n}"] for n in range(arguments.servers)], axis=0)
        for name in (PLAIN, UNSTEERED, *settings)
    }
    tokens = arguments.requests * arguments.tokens
    for name, (middle, least, most) in ratios({n: 1 / s for n, s in both.items()}, PLAIN).items():
        speed = tokens / float(both[name].min())
        print(f"{name}: throughput {middle:.3f} ({least:.3f} to {most:.3f}) of the first, at best {speed:.0f} tokens/s")
    for kind in (PLAIN, UNSTEERED):
        alone = {name: 1 / s for name, s in seconds.items() if name.startswith(kind)}
        for name, (middle, least, most) in ratios(alone, f"{kind} 0").items():
            print(f"    {name}: {middle:.3f} ({least:.3f} to {most:.3f}) of the first server of its kind")


def _answer(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post("/v1/completions", json={**body, "temperature": 0})
    answer.raise_for_status()
    assert len(answer.json()["choices"]) == len(body["prompt"])


if __name__ == "__main__":
    main()
