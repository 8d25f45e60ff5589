"""The page of one arena or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def render_arena(found: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``arena.html``."""
    return "<html></html>"
