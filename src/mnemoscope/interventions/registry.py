"""Which methods there are: modules of ``methods`` and ``rivals``, found by their files; see ``contract``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

from mnemoscope.runs.errors import InputError, meant
from mnemoscope.tasks import allowed_code

PLACES = ("mnemoscope.interventions.methods", "mnemoscope.rivals")


@cache
def _modules() -> dict[str, str]:
    """By name of a method, its module; nothing is imported."""
    names = ((place, path.name) for place in PLACES for path in files(place).iterdir())
    stems = sorted((place, name[:-3]) for place, name in names if name.endswith(".py") and name[0] != "_")
    return {name_of(stem): f"{place}.{stem}" for place, stem in stems}


def method_names() -> list[str]:
    """Names of all methods."""
    return list(_modules())


def name_of(method: str) -> str:
    """The name of a method: its own, or the last part of the path of a user's own module."""
    return method.rpartition(".")[2].replace("_", "-")


def check_method(method: str) -> str:
    """The path of a method's module; InputError where there is none of this name, or it is not allowed."""
    name = name_of(method)
    if "." in method and _modules().get(name, method) != method:
        raise InputError(f"methods: {method!r} has the name of a method that is built in; rename its module")
    path = _modules().get(name) or {name_of(one): one for one in allowed_code() if ":" not in one}.get(name)
    if path is None:
        known = f"methods: {method!r} is not one of {', '.join(_modules())}{meant(name, _modules())}"
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
    if not {"candidates", "direction", "joined"} & vars(module).keys():
        raise InputError(f"methods: module {path!r} lacks candidates")
    return module
