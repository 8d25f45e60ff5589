"""P(memorized) of a prompt before it is answered, and gates that steer by it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mnemoscope.detect.detector import Detector, Reading

if TYPE_CHECKING:
    from mnemoscope.detect.fitting import LEAST, Observed, fit_detectors

__all__ = ["LEAST", "Detector", "Observed", "Reading", "fit_detectors"]


def __getattr__(name: str) -> Any:
    """Import what fits detectors on first use: it needs scikit-learn, and reading saved ones does not."""
    if name not in __all__:
        raise AttributeError(f"module 'mnemoscope.detect' has no attribute {name!r}")
    return getattr(importlib.import_module("mnemoscope.detect.fitting"), name)
