"""The methods, one file each: ``candidates(bench, toward)`` fits one and returns its settings, to be chosen on tune.

A module of this folder, or of ``rivals``, that says what it is (``ABOUT``) is a method.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import allowed_code

if TYPE_CHECKING:
    from mnemoscope.bench.lists import Bench
    from mnemoscope.interventions.contract import Intervention, Toward
    from mnemoscope.interventions.sources import Labels
    from mnemoscope.interventions.vector import SteeringVector

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
    """Names of all methods."""
    return list(_modules())


def about(method: str) -> str:
    """What a method is, in a line."""
    return str(method_module(method).ABOUT)


def is_one_direction(method: str) -> bool:
    """Whether both directions of a method come from one fit."""
    return hasattr(method_module(method), "METHOD")


def nulls(method: str) -> tuple[str, ...]:
    """Names of a method's controls that are fitted as it is, on other labels or answers; none for what is not ours."""
    try:
        module = method_module(method)
    except InputError:  # a vector of somebody's own
        return ()
    return getattr(module, "NULLS", ("shuffled_labels",) if hasattr(module, "again") else ())


def refitted(bench: Bench, one: SteeringVector, several: Sequence[Labels]) -> list[SteeringVector]:
    """A vector fitted again, by its method and in its setting, on other labels or answers."""
    found: list[SteeringVector] = method_module(one.method).again(bench, one, several)
    return found


def candidates(method: str, bench: Bench, toward: Toward) -> Sequence[Intervention]:
    """Fit a method and return its settings.

    Raises:
        InputError: this model or task cannot take it; the reason is named.
    """
    found: Sequence[Intervention] = method_module(method).candidates(bench, toward)
    for one in found:
        if (one.method, one.toward) != (name_of(method), toward):
            wrong = f"{one.method!r} to {one.toward}; {name_of(method)!r} to {toward} is wanted"
            raise InputError(f"methods: {method} breaks the contract: a candidate is {wrong}")
    return found


def name_of(method: str) -> str:
    """The name of a method: its own, or the last part of the path of a user's own module."""
    return method.rpartition(".")[2].replace("_", "-")


def check_method(method: str) -> str:
    """The path of a method's module; InputError where there is none of this name, or it is not allowed."""
    name = name_of(method)
    path = _modules().get(name) or {name_of(one): one for one in allowed_code() if ":" not in one}.get(name)
    if path is None:
        known = f"methods: {method!r} is not one of {', '.join(_modules())}"
        how = f"if you trust it, --allow-code {method} at the command line, mnemoscope.allow_code in Python"
        raise InputError(f"{known}, and importing it would run its code; {how}" if "." in method else known)
    return path


def method_module(method: str) -> Any:
    """The module of a method, built in or a user's own that ``allow_code`` has allowed.

    Raises InputError where there is none of this name, it is not allowed, or it is no method.
    """
    path = check_method(method)
    try:
        module = import_module(path)
    except ImportError as error:
        raise InputError(f"methods: {path!r} cannot be imported ({error})") from error
    for needed in ("ABOUT", "candidates"):
        if not hasattr(module, needed):
            raise InputError(f"methods: module {path!r} lacks {needed}")
    return module
