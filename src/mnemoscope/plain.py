"""Convert values to strict JSON, which has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def plain(value: Any) -> Any:
    """Nested dicts, lists and tuples with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumped(value: Any) -> str:
    """One line of JSON, undefined numbers as null."""
    return json.dumps(plain(value), allow_nan=False)
