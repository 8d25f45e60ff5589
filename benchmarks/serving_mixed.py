"""Hundreds of requests of all kinds at once inside vLLM, each compared with transformers under the same intervention.

    PYTHONPATH=tests python benchmarks/serving_mixed.py [--model smollm2] [--proofs 2] [--dtype float32] [--only NAME]

Runs where vLLM is installed. Each server has a shift, a low-rank edit of all tokens, a detector and a reader, of random
numbers; those with adapters two of these, too. Several proofs ask at once, each about prompts of its own, and begin one
after another, so that requests of every kind share passes. See ``benchmarks/README.md`` for the latest figures.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import torch
from serving_vllm import ADAPTERS

from mnemoscope.models import load_model
from mnemoscope.serving.client import Server
from mnemoscope.serving.proof import prove
from mnemoscope.serving.served import Answer, Proof, Request
from test_vllm import CHUNKED, CONTEXT, EAGER, SMALL, Material, counter, serving

SERVERS = {
    "compiled": (),
    "compiled, in chunks of 16, preempted": (*CHUNKED, *SMALL),
    "compiled, no prefix caching": ("--no-enable-prefix-caching",),
    "eager, adapters": (*EAGER, *ADAPTERS),
    "eager, adapters, in chunks of 16, preempted": (*EAGER, *ADAPTERS, *CHUNKED, *SMALL),
}
STAGGER = 5.0  # seconds between the beginnings of proofs


def main() -> None:
    """Prove each server and print one line of sums for each check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a name or a folder")
    parser.add_argument("--proofs", type=int, default=2, help="at once, each of about 160 requests or more")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--only", help="a part of the names of the servers to prove")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        for number, (name, flags) in enumerate(SERVERS.items()):
            if arguments.only and arguments.only not in name:
                continue
            out = Path(folder) / str(number)
            kinds = {"everywhere": ["memorized"], "low_rank": ["memorized"], "adapters": "adapters" in name}
            material = Material.make(out, arguments.model, **kinds)
            began = time.monotonic()
            with serving(material, out / "log", "--dtype", arguments.dtype, *flags) as client:
                started = time.monotonic() - began
                print(f"\n{arguments.model}, {arguments.dtype}, {name}: started in {started:.0f} s", flush=True)
                _print(_proofs(client, material, arguments.proofs, arguments.dtype))
                preempted, hits = (counter(client, what) for what in ("num_preemptions", "prefix_cache_hits"))
                took = time.monotonic() - began - started
                print(f"{preempted:.0f} preemptions, {hits:.0f} cached tokens used, {took:.0f} s", flush=True)


def _proofs(client: httpx.Client, material: Material, number: int, dtype: str) -> list[list[Proof]]:
    """Of several that ask at the same time, each about prompts of its own."""
    server, texts = Server(str(client.base_url)), _texts(material, 8 * number)
    opened = load_model(material.folder, dtype=dtype)

    def one(n: int) -> list[Proof]:
        time.sleep(n * STAGGER)
        return list(prove(ask, fitted[n], texts[8 * n : 8 * n + 8], CONTEXT))

    asked: list[Request] = []

    def ask(requests: list[Request]) -> list[Answer]:
        asked.extend(requests)
        return server.ask(requests)

    # One model: hooks belong to a module, so each proof has modules of its own over the same weights.
    fitted = [material.fitted(dtype=dtype) for _ in range(number)]
    for other in fitted:
        for mine, theirs in zip(other.model.parameters(), opened[0].parameters(), strict=True):
            mine.data = theirs.data
    with ThreadPoolExecutor(number) as threads:
        found = list(threads.map(one, range(number)))
    print(f"{len(asked)} requests of {number} proofs")
    return found


def _texts(material: Material, number: int) -> list[str]:
    """Prompts of random words, a third of which begin alike."""
    tokenizer = load_model(material.folder)[1]
    draws = torch.Generator().manual_seed(5)
    shared = torch.randint(3, len(tokenizer), (number // 3 + 1, 60), generator=draws).tolist()
    own = torch.randint(3, len(tokenizer), (number, 6), generator=draws).tolist()
    return [tokenizer.decode(shared[n // 3][: 10 + 20 * (n % 3)] + tail) for n, tail in enumerate(own)]


def _print(proofs: list[list[Proof]]) -> None:
    """Of each check: the largest difference, the least that its fault would make, and sums over proofs."""
    for several in zip(*proofs, strict=True):
        first = several[0]
        whole = replace(
            first,
            name=first.name.partition(" (")[0],
            difference=max(one.difference for one in several),
            allowed=min(one.allowed for one in several),
            answers=sum(one.answers for one in several),
            wrong=sum(one.wrong for one in several),
            ties=sum(one.ties for one in several),
            visible=float(np.min([one.visible for one in several])),
            why=next((one.why for one in several if one.why), ""),
        )
        print(whole if all(one.passed for one in several) else f"{whole}; a proof failed", flush=True)


if __name__ == "__main__":
    main()
