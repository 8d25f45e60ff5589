"""What a text names: an attribute of a module, imported on first use."""

from importlib import import_module
from typing import Any


def named(path: str) -> Any:
    """The attribute that ``package.module:name`` names; ImportError or AttributeError where there is none."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
