"""Values as machines that read strict JSON want them: it has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def known(value: float) -> float | None:
    """A number, or None where it is undefined or infinite."""
    return value if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Nested dicts, lists and tuples with None for every number that is not ``known``."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return known(value) if isinstance(value, float) else value


def dumped(value: Any) -> str:
    """One line of JSON, undefined numbers as null."""
    return json.dumps(plain(value), allow_nan=False)
