"""The arena: interventions behind one contract, on one frozen test set. ``mnemoscope.arena(...)`` runs one.

The module can be called, as it has the name of the function that users call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Arena(ModuleType):
    def __call__(self, *given: Any, **choices: Any) -> Any:
        """See ``mnemoscope.arena.run.arena``."""
        from mnemoscope.arena.run import arena

        return arena(*given, **choices)


sys.modules[__name__].__class__ = _Arena
