"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``).

Where a plugin cannot be imported, vLLM logs it and goes on without; an error of its function ends the start. So this
module imports nothing that could be missing.
"""

from __future__ import annotations

import logging
import os
import re
import sys

TRIED = ("0.30", "0.31", "0.32")  # versions of vLLM whose inner parts are as ``engine`` and ``http`` expect
NAMED = re.compile(r'--additional[-_]config(\.mnemoscope\b|[= ]+\{[^}]*"mnemoscope")')  # a run, on a command line


def register() -> None:
    """Put steering and reading in place; they are off until a run is named.

    Raises InputError where this version of vLLM was not tried and a run is named in the environment or on the command
    line. Where it is named elsewhere (Python, a file of settings) only a warning can be given.
    """
    import vllm

    from mnemoscope.runs.errors import InputError

    if vllm.__version__.startswith(tuple(f"{version}." for version in TRIED)):
        from mnemoscope.serving import engine

        engine.install()
        return
    said = f"vllm: version {vllm.__version__} was not tried; allowed are {', '.join(TRIED)}"
    named = {
        "MNEMOSCOPE_RUN": os.environ.get("MNEMOSCOPE_RUN"),
        "--additional-config": NAMED.search(" ".join(sys.argv)),
    }
    for place in (place for place, found in named.items() if found):
        raise InputError(f"{said} ({place})")
    logging.getLogger("vllm.mnemoscope").warning("%s, so nothing is steered or read, whatever is asked", said)
