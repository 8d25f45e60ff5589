"""What ships with the package: low-rank edits for a packaged model, so that a first answer needs no fit."""

from __future__ import annotations

from pathlib import Path

from mnemoscope.face.fitted import Fitted
from mnemoscope.models import load_model
from mnemoscope.runs.errors import InputError

SHIPPED = Path(__file__).parent / "shipped"


def shipped(model: str) -> Path:
    """The run that ships for a packaged model; InputError where none does."""
    if model not in (there := sorted(path.name for path in SHIPPED.iterdir())):
        raise InputError(f"from: missing; name a run, as edits ship for {', '.join(there)} only")
    return SHIPPED / model


def ready(model: str = "smollm2") -> Fitted:
    """Open a packaged model with the edits that ship for it; their cards say what was measured.

    Raises InputError where the packages of the model are not installed, or nothing ships for it.
    """
    return Fitted.open(shipped(model), *load_model(model))
