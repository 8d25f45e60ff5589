"""Tables in ``docs/results/benchmarks.json``: a section for each work, and which command, code and machine it is of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from mnemoscope.study.cells import git_state

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "nnsight", "pyvene", "transformer-lens")


def put(path: Path, title: str, part: list[str]) -> None:
    """Replace the section of that title, or add it at the end: its Markdown, as paragraphs and tables."""
    sections = json.loads(path.read_text()) if path.exists() else {}
    sections[title] = [cells_of(block) if block.startswith("|") else block for block in blocks(part)]
    lines = [f"{json.dumps(name)}: {json.dumps(parts, ensure_ascii=False)}" for name, parts in sections.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def blocks(part: list[str]) -> list[str]:
    """Paragraphs and tables below the title."""
    return [block.strip() for block in "\n".join(part[1:]).split("\n\n") if block.strip()]


def cells_of(block: str) -> dict[str, Any]:
    """The table of a block, as ``docs/printing.py`` reads it."""
    columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
    return {"columns": columns, "rows": rows}


def origin(rounds: int, threads: int) -> str:
    """Which command, code and machine figures are of."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if _version(name) != "not installed")
    commit = git_state()
    return (
        f"`{' '.join(['python', *sys.argv])}`:\ncommit {(commit['commit'] or 'unknown')[:7]}"
        f"{' with changes' if commit['dirty'] else ''}, {rounds} rounds, Python {platform.python_version()}, "
        f"{_processor()}, {os.cpu_count()} cores, {threads} thread(s);\n{versions}."
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
