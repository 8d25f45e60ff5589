"""Mnemoscope: is a language model remembering or thinking when it answers, which neurons tell, and how to turn it.

The public names are imported on first use, so that importing the package costs nothing::

    from mnemoscope import Asking, SteeringVector, load_model, mine_pairs
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Asking": "behaviour",
    "Contrast": "contrast",
    "ContrastAccumulator": "contrast",
    "Detector": "detect",
    "Example": "tasks",
    "Gate": "detect",
    "InputError": "errors",
    "SteeringVector": "steering",
    "StudyError": "errors",
    "Task": "tasks",
    "bake": "export",
    "build_report": "report",
    "build_task": "tasks",
    "draw_candidates": "behaviour",
    "load_model": "models",
    "load_study": "config",
    "mine_pairs": "behaviour",
    "prepare": "behaviour",
    "run_study": "study",
    "score": "behaviour",
    "to_gguf": "export",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mnemoscope' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mnemoscope.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
