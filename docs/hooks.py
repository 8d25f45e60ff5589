"""Hooks of the documentation site: printed pages, notebooks as pages, and every public name on the page of the API.

Pages link to the prose of a printed page, ``review.head.md``, which is there in a checkout; on the site this is
``REVIEW.md``, which has its tables, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from pages import PAGES

import mnemoscope

FIRST = ("fit", "Fitted", "load_model")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add what is printed, the notebooks of ``examples/`` with their saved outputs, and the programs they name."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"{name}.md", content=page()))
    examples = Path(config.config_file_path).parent / "examples"
    for path in sorted(examples.glob("*.ipynb")):
        text, _ = MarkdownExporter().from_filename(str(path))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    for path in sorted(examples.glob("*.py")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to printed pages; on the page ``api.md`` also a mkdocstrings block for each public name."""
    markdown = re.sub(r"\]\((\w+)\.head\.md", lambda found: f"]({found[1].upper()}.md", markdown)
    if page.file.src_uri != "api.md":
        return markdown
    names = sorted(mnemoscope.__all__, key=lambda name: (name not in FIRST, name))
    return "\n\n".join([markdown, *(f"::: mnemoscope.{name}" for name in names)])
