"""What goes wrong: bad inputs, damaged files, hostile ones, kills."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, so that ``make test-faults`` runs them and ``make test`` does not."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("faults")
