"""What reading an answer while it is written costs, against the same generation, and writing it again.

    python benchmarks/reading.py READER [--model FOLDER] [--threads 1]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import ratios, seconds_of

import mnemoscope as ms
from mnemoscope.auditing.origins.reader import Asked, Reader
from mnemoscope.behaviour import Asking, continued

PLAIN = "plain"
DOCUMENT = "The museum was founded in 1912 by Ada Berg and moved to Lisbon in 1955. It has 40 rooms. " * 6


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", type=Path)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9, help="how often everything is measured, in turn")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = ms.load_model(arguments.model, dtype=arguments.dtype)
    asking, reader = Asking(model, tokenizer, None, 1), Reader.load(arguments.reader)
    asked, tokens = Asked(f"{DOCUMENT}\n\nThe museum tells its story like this:", DOCUMENT), arguments.new_tokens
    model.generation_config.eos_token_id = None

    def plain(more: int) -> Any:
        with torch.no_grad():
            return continued(model, tokenizer, asking.padded([asked.prompt]), tokens + more, ends=[])

    ways = {
        PLAIN: lambda: plain(0),
        "one token more": lambda: plain(1),
        "read": lambda: reader.write(asking, asked, tokens),
    }
    print(f"{len(reader.write(asking, asked, tokens).offsets)} of {tokens} tokens")
    seconds = seconds_of(ways, arguments.rounds)
    of_plain = ratios(seconds, PLAIN)
    for name, values in seconds.items():
        middle, least, most = of_plain[name]
        print(f"{name:28}{np.median(values):7.2f} s   {middle:.3f}   {least:.3f} .. {most:.3f}")


if __name__ == "__main__":
    main()
