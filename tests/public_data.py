"""What other people published: data sets beside the repository, or where MNEMOSCOPE_DATA says, and packaged models."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from mnemoscope.models import PACKAGED

HERE = Path(__file__).parents[1]


def is_installed(model: str) -> bool:
    """Whether the packages of a packaged model are there."""
    return all(find_spec(package.replace("-", "_")) for package in PACKAGED[model].packages)


def data_folder(name: str) -> Path:
    """The folder of a data set; the test is skipped without it."""
    folder = Path(os.environ.get("MNEMOSCOPE_DATA") or HERE.parent / "shared" / "data") / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not there")
    return folder
