"""How long threads of torch spin where they wait for each other.

OpenMP's default suits a machine where nothing else runs. Beside one busy process a pass of two threads on two cores can
take several times as long as one of one thread; threads that soon sleep take about as long (benchmarks/neighbour.py).
The runtimes of Intel and LLVM yield while they spin, and are left alone.
"""

from __future__ import annotations

import os
import sys

SPINS = "GOMP_SPINCOUNT"  # of libgomp, which Linux builds of torch bring: turns of a loop before a thread sleeps
_late = False


def bound_waiting() -> None:
    """Let waiting threads sleep soon, unless the user has said how they wait; the package calls this when imported.

    libgomp reads its variables once, when torch is imported: too late then, and nothing is set.
    """
    global _late
    if SPINS in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    _late = "torch" in sys.modules
    if not _late:
        os.environ[SPINS] = "1000"


def warn_of_waiting(threads: int) -> None:
    """Warn once, in a line, where several threads spin because torch was imported first."""
    global _late
    if _late and threads > 1 and sys.platform == "linux":
        import logging  # importing the package costs nothing

        _late = False
        logging.getLogger("mnemoscope").warning(
            "threads: torch was imported before mnemoscope, so beside another busy process %d threads are slower than "
            "one; import mnemoscope first, set GOMP_SPINCOUNT=1000, or give threads=1",
            threads,
        )
