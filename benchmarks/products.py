"""What linear layers by oneDNN save, against those by MKL and passes in bfloat16.

    python benchmarks/products.py [--model gemma3-270m] [--threads 1]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from rounds import ratios, seconds_of

from mnemoscope.models import in_precision, load_model, quick_products

PLAIN = "MKL"


def main() -> None:
    """Measure passes and gradients, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder or hub id of a causal model, or a packaged one")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured, in turn")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, _ = load_model(arguments.model)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    shape = arguments.prompts, arguments.tokens
    ids_NT = torch.randint(model.config.vocab_size // 2, shape, generator=generator)
    states_NTD = model.get_input_embeddings()(ids_NT).requires_grad_()
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {
        PLAIN: nullcontext,
        "oneDNN": quick_products,
        "bfloat16": lambda: in_precision(model, "bfloat16"),
    }

    def passed() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(ids_NT, logits_to_keep=1).logits
        return found

    def gradient() -> torch.Tensor:
        logits = model(inputs_embeds=states_NTD, logits_to_keep=1).logits
        return torch.autograd.grad(logits.log_softmax(-1)[..., 0].sum(), states_NTD)[0]

    for what, run in (("pass", passed), ("pass and gradient", gradient)):

        def within(context: Callable[[], AbstractContextManager[None]], run: Callable[[], torch.Tensor] = run) -> None:
            with context():
                run()

        ways = {name: (lambda context=context: within(context)) for name, context in contexts.items()}
        seconds = seconds_of(ways, arguments.rounds)
        of_plain = ratios(seconds, PLAIN)
        for name, values in seconds.items():
            middle, least, most = of_plain[name]
            print(f"{what:20}{name:10}{np.median(values):7.2f} s   {middle:.3f}   {least:.3f} .. {most:.3f}")


if __name__ == "__main__":
    main()
