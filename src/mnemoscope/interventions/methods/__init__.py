"""The methods, one file each: ``candidates(bench, toward)`` fits one and returns its settings, to be chosen on tune.

A module of this folder, or of ``rivals``, that says what it is (``ABOUT``) is a method.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

from mnemoscope.errors import InputError

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench
    from mnemoscope.interventions.contract import Intervention, Toward

PLACES = ("mnemoscope.interventions.methods", "mnemoscope.rivals")


@cache
def _modules() -> dict[str, str]:
    """By name of a method, its module; nothing is imported."""
    found = {}
    for place in PLACES:
        for path in sorted(files(place).iterdir(), key=lambda path: path.name):
            if path.name.endswith(".py") and re.search(r"^ABOUT\b", path.read_text(encoding="utf-8"), re.MULTILINE):
                name = path.name.removesuffix(".py")
                found[name.replace("_", "-")] = f"{place}.{name}"
    return found


def method_names() -> list[str]:
    """Names of all methods, those of users last of all first."""
    return list(_modules())


def about(method: str) -> str:
    """What a method is, in a line."""
    return str(import_module(_modules()[method]).ABOUT)


def candidates(method: str, bench: Bench, toward: Toward) -> Sequence[Intervention]:
    """Fit a method and return its settings.

    Raises:
        InputError: this model or task cannot take it; the reason is named.
    """
    if method not in _modules():
        raise InputError(f"methods: {method!r} is not one of {', '.join(_modules())}")
    found: Sequence[Intervention] = import_module(_modules()[method]).candidates(bench, toward)
    return found
