"""What steered, gated and baked generation cost, against plain ``generate``.

    python benchmarks/generation.py [--model FOLDER] [--threads 1]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import ratios, seconds_of

from mnemoscope.interventions import SteeringVector
from mnemoscope.interventions.detect import Detector, Gate
from mnemoscope.models import blocks_of, load_model, width_of
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.export import bake

PLAIN = "plain"
WORDS = "The capital of a country is where its government sits, and most people have heard of it since they were "


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder or hub id of a causal model, or smollm2")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="how often everything is measured, in turn")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(model, tokenizer, Path(folder) / "baked", arguments)
        seconds = seconds_of(ways, arguments.rounds)
    of_plain = ratios(seconds, PLAIN)
    for name, values in seconds.items():
        middle, least, most = of_plain[name]
        print(f"{name:28}{np.median(values):7.2f} s   {middle:.3f}   {least:.3f} .. {most:.3f}")


def _ways(model: Any, tokenizer: Any, folder: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Each way to generate, by name; steps are fixed, so that all do the same number of passes."""
    texts = [WORDS[row:] for row in range(arguments.prompts)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")

    def generate(which: Any, context: Callable[[], Any] = nullcontext) -> Callable[[], Any]:
        def run() -> Any:
            with context():
                return which.generate(
                    **{key: inputs[key] for key in ("input_ids", "attention_mask")},
                    do_sample=False,
                    max_new_tokens=arguments.new_tokens,
                    eos_token_id=None,
                    pad_token_id=tokenizer.pad_token_id,
                )

        return run

    layers, width = len(blocks_of(model)), width_of(model)
    shifts = {layer: torch.full((width,), 1e-3) for layer in range(layers)}
    every = SteeringVector("generalized", shifts)
    middle = SteeringVector("generalized", {layers // 2: shifts[0]})
    nothing = np.zeros((layers, width))
    detector = Detector(
        "block", layers // 2, nothing, np.ones(layers), np.zeros(width), 9.0, np.zeros(width), np.zeros((width, width))
    )
    ways = {
        PLAIN: generate(model),
        "steered, every block": generate(model, lambda: every.apply(model)),
        "steered, one block": generate(model, lambda: middle.apply(model)),
        "gated, one block": generate(model, lambda: middle.apply(model, gate=Gate(detector, "generalized"))),
    }
    try:
        # Some shift that survives rounding, so that the check of what was baked has something to see.
        bake(model, tokenizer, replace(30 * every, positions="all"), folder)
    except InputError as error:
        print(f"not baked: {error}")
    else:
        ways["baked, every block"] = generate(load_model(folder)[0])
    return ways


if __name__ == "__main__":
    main()
