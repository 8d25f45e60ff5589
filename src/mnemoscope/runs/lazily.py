"""Packages whose names are imported on first use, so that who takes one of them does not import all the others."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def handed_on(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """``__getattr__`` and the names of a package, which are what its ``if TYPE_CHECKING`` imports: said once for both.

    Args:
        package: its ``__name__``; ``file``: its ``__file__``.
    """
    tops = ast.parse(Path(file).read_text()).body
    blocks = [node for node in tops if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    places = {alias.name: str(node.module) for node in imports for alias in node.names}

    def found(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(places[name]), name)

    return found, sorted(places)
