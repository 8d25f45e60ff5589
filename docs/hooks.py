"""Hook of the documentation site: the API page lists every public name of the package, the face first."""

from __future__ import annotations

from typing import Any

import mnemoscope

FIRST = ("face", "models")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append a mkdocstrings block for each public name to the page ``api.md``."""
    if page.file.src_uri != "api.md":
        return markdown
    public = mnemoscope._PUBLIC | mnemoscope._MODULES
    blocks = [f"::: mnemoscope.{module}.{name}" for name, module in sorted(public.items(), key=_order)]
    return "\n\n".join([markdown, *blocks])


def _order(item: tuple[str, str]) -> tuple[int, str]:
    name, module = item
    return (FIRST.index(module) if module in FIRST else len(FIRST), name)
