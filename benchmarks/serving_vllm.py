"""What the plugin costs inside vLLM: throughput of a server with it, over that of a server without it.

    PYTHONPATH=tests python benchmarks/serving_vllm.py [--model smollm2] [--rounds 7] [--adapters] [--eager]

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
OWN, OURS = "vLLM's own adapter", "an adapter that steers"
ADAPTERS = ("--enable-lora", "--max-loras", "13", "--max-lora-rank", "8")  # with which its CPU build compiles nothing
Way = Callable[[], None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a name or folder; an empty one: the tests' tiny model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--servers", type=int, default=2, help="of each kind; they differ more than it costs")
    parser.add_argument("--dtype", default="float32", help="of the servers")
    parser.add_argument("--eager", action="store_true", help="no compiled passes")
    parser.add_argument("--adapters", action="store_true", help="of these alone, which need servers of their own")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder, ExitStack() as opened:
        out = Path(folder)
        material = Material.make(out, arguments.model, low_rank=["memorized"], adapters=arguments.adapters)
        rows, gate = _rows_and_gate(material)
        prompts = [rows[n % len(rows)] for n in range(arguments.requests)]
        body = {"model": "served", "prompt": prompts, "max_tokens": arguments.tokens, "ignore_eos": True}
        flags = ("--dtype", arguments.dtype, *(("--enforce-eager",) if arguments.eager else ()))
        if arguments.adapters:
            (own,) = material.run.rglob("to_generalized-lora")
            servers = (*flags, *ADAPTERS), ("--lora-modules", f"own={own}")
            settings = {OURS: {"steer": "generalized", "lever": "adapter"}}
        else:
            servers, settings = (flags, ()), _settings(gate)
        ways: dict[str, Way] = {}
        kinds = [(False, sum(servers, ())), (True, servers[0])]
        for n in range(arguments.servers):
            clients = {
                plugin: opened.enter_context(serving(material, out / f"{plugin}{n}.log", *some, plugin=plugin))
                for plugin, some in kinds
            }
            plain, client = clients[False], clients[True]
            kinds.reverse()  # what starts later has less memory left
            ways[f"{PLAIN} {n}"] = partial(_answer, plain, body)
            if arguments.adapters:
                ways[f"{OWN} {n}"] = partial(_answer, plain, {**body, "model": "own"})
            ways[f"{UNSTEERED} {n}"] = partial(_answer, client, body)
            for name, some in settings.items():
                ways[f"{name} {n}"] = partial(_answer, client, {**body, "vllm_xargs": some})
        seconds = seconds_of(ways, arguments.rounds)
    _print(seconds, arguments.requests * arguments.tokens)


def _rows_and_gate(material: Material) -> tuple[list[list[int]], float]:
    """Token ids of the prompts, and a gate that half of them pass; the model is gone before the servers come."""
    fitted = material.fitted()
    found = replace(fitted, detector=fitted.lower_detector).detect(material.texts)
    return [fitted.inputs([text]).input_ids[0].tolist() for text in material.texts], float(np.median(found.p_memorized))


def _settings(gate: float) -> dict[str, dict[str, Any]]:
    """What everybody asks for, by name."""
    return {
        "steered by a shift": {"steer": "generalized"},
        "steered by an edit": {"steer": "memorized"},
        "gated and read": {"steer": "generalized", "gate": gate, "read": 1},
        "tokens read": {"read": "tokens", "document": ""},
    }


def _print(seconds: dict[str, np.ndarray], tokens: int) -> None:
    """Throughput of each way, the mean of its servers, and of each server."""
    ways = {name.rpartition(" ")[0]: [] for name in seconds} | dict[str, list[np.ndarray]]()
    for name, some in seconds.items():
        ways[name.rpartition(" ")[0]].append(some)
    both = {name: np.mean(several, axis=0) for name, several in ways.items()}
    for first in [name for name in (PLAIN, OWN) if name in both]:
        for name, (middle, least, most) in ratios({n: 1 / s for n, s in both.items()}, first).items():
            speed = tokens / float(both[name].min())
            told = f"throughput {middle:.3f} ({least:.3f} to {most:.3f}) of {first}, at best {speed:.0f} tokens/s"
            print(f"{name}: {told}")
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
