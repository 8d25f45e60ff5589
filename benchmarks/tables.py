"""Tables in ``docs/BENCHMARKS.md``: one section for each work, and which command, code and machine it is of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

from mnemoscope.study.cells import git_state

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "nnsight", "pyvene", "transformer-lens")
HEAD = """# Benchmarks against other tools

Written by `benchmarks/peers.py`, `benchmarks/training.py` and `benchmarks/memory.py`. All rows of a table are measured
in turn, round by round, so that a slow minute of the machine is slow for all of them. Ratios are taken within a round:
median (range).

"""


def put(path: Path, title: str, part: list[str]) -> None:
    """Replace the section of that title, or add it at the end."""
    head, *sections = re.split(r"^(?=## )", path.read_text() if path.exists() else HEAD, flags=re.MULTILINE)
    made, place = "\n".join(part) + "\n", f"## {title}\n"
    found = [made if section.startswith(place) else section for section in sections]
    path.write_text((head + "".join(found if made in found else [*found, made])).rstrip() + "\n")


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
