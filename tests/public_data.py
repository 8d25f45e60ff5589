"""Data sets that other people published, where they lie: beside the repository, or where MNEMOSCOPE_DATA says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


def data_folder(name: str) -> Path:
    """The folder of a data set; the test is skipped without it."""
    folder = Path(os.environ.get("MNEMOSCOPE_DATA") or HERE.parent / "shared" / "data") / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not there")
    return folder
