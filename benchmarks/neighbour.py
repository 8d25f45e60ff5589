"""What another busy process costs a pass, by number of threads and by how OpenMP's threads wait for each other.

    python benchmarks/neighbour.py [--model smollm2] [--policies GOMP_SPINCOUNT=1000 OMP_WAIT_POLICY=passive]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import product

import numpy as np
from rounds import Way, ratios, seconds_of

PLAIN = "torch's own"
POLICIES = ("GOMP_SPINCOUNT=10000", "GOMP_SPINCOUNT=1000", "OMP_WAIT_POLICY=passive")
SETTING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
SIZES = {"large": (8, 48), "small": (4, 3)}  # prompts, tokens
BUSY = "import numpy, os\na, parent = numpy.ones((1000, 1000)), os.getppid()\nwhile os.getppid() == parent: a @ a"


def main() -> None:
    """Ask a process of each policy in turn, with the neighbour at work or stopped, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder or hub id of a causal model, or a packaged one")
    parser.add_argument("--policies", nargs="*", default=POLICIES, help="variables, each NAME=VALUE, beside none")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured, in turn")
    parser.add_argument("--answer", action="store_true", help="be one of the processes that are asked")
    arguments = parser.parse_args()
    if arguments.answer:
        answer(arguments.model)
        return
    plain = {name: value for name, value in os.environ.items() if name not in SETTING}
    with ExitStack() as stack:
        neighbour = started(stack, ["-c", BUSY], plain | {"OPENBLAS_NUM_THREADS": "1"})
        neighbour.send_signal(signal.SIGSTOP)
        asked = {}
        for policy in (PLAIN, *arguments.policies):
            given = dict([policy.split("=")]) if policy != PLAIN else {}
            asked[policy] = started(stack, [__file__, "--answer", "--model", arguments.model], plain | given)
            ask(asked[policy], arguments.threads[0], "small")  # once it has opened its model, the next opens its own
        for size in SIZES:
            ways: dict[str, Way] = {
                named(policy, threads, beside): passing(asked[policy], threads, size, neighbour, beside)
                for policy, threads, beside in product(asked, arguments.threads, (False, True))
            }
            show(size, seconds_of(ways, arguments.rounds), named(PLAIN, arguments.threads[0], False))


def named(policy: str, threads: int, beside: bool) -> str:
    """The row of a way."""
    return f"{policy}, {threads} thread(s), {'beside' if beside else 'idle'}"


def started(stack: ExitStack, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """A Python process that is asked line by line and ends with the stack."""
    process = subprocess.Popen(
        [sys.executable, *command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def passing(
    process: subprocess.Popen[str], threads: int, size: str, neighbour: subprocess.Popen[str], beside: bool
) -> Callable[[], None]:
    """A pass in a process, while the neighbour works or is stopped."""

    def run() -> None:
        neighbour.send_signal(signal.SIGCONT if beside else signal.SIGSTOP)
        ask(process, threads, size)

    return run


def ask(process: subprocess.Popen[str], threads: int, size: str) -> None:
    """Let a process make a pass, and wait for it."""
    assert process.stdin
    assert process.stdout
    print(threads, size, file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n"


def answer(name: str) -> None:
    """Make the passes that are asked for; torch is imported first, so that the package leaves its waiting alone."""
    import torch

    from mnemoscope.models import load_model
    from mnemoscope.runs.processes import quiet_library

    quiet_library()
    model, _ = load_model(name)
    batches = {size: torch.randint(100, shape) for size, shape in SIZES.items()}
    with torch.no_grad():
        for line in sys.stdin:
            threads, size = line.split()
            torch.set_num_threads(int(threads))
            model(batches[size], logits_to_keep=1)
            print("done", flush=True)


def show(size: str, seconds: dict[str, np.ndarray], to: str) -> None:
    """Print the median seconds of each way, and its ratio to one of them within a round: median, least, largest."""
    print(f"a pass of {' x '.join(map(str, SIZES[size]))} tokens, seconds and ratio to '{to}'", flush=True)
    for name, (middle, least, most) in ratios(seconds, to).items():
        print(f"{name:48}{np.median(seconds[name]):8.3f} s{middle:8.2f}{least:8.2f} .. {most:.2f}", flush=True)


if __name__ == "__main__":
    main()
