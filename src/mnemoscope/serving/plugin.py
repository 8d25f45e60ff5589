"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``).

Where a plugin cannot be imported, vLLM logs it and goes on without; an error of its function ends the start. So this
module imports nothing that could be missing.
"""

from __future__ import annotations

import os

TRIED = ("0.32",)  # versions of vLLM whose inner parts are as ``engine`` and ``http`` expect
_installed = False


def register() -> None:
    """Put steering and reading in place; they are off until a run is named.

    Raises InputError where a run is named and this version of vLLM was not tried.
    """
    global _installed
    if _installed:
        return
    import vllm

    from mnemoscope.errors import InputError

    if not vllm.__version__.startswith(tuple(f"{version}." for version in TRIED)):
        if os.environ.get("MNEMOSCOPE_RUN"):
            tried = ", ".join(TRIED)
            raise InputError(f"vllm: version {vllm.__version__} was not tried; allowed are {tried} (MNEMOSCOPE_RUN)")
        return
    from mnemoscope.serving import engine

    engine.install()
    _installed = True
