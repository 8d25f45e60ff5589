"""Mnemoscope: is a language model remembering or thinking when it answers, which neurons separate the two, and how to
steer it.

The public names are imported on first use, so that importing the package costs nothing::

    import mnemoscope as ms

    model, tokenizer = ms.load_model("smollm2")
    fitted = ms.fit(model, tokenizer, "mine.jsonl", out="runs/mine")
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
    "Fitted": "face",
    "InputError": "errors",
    "Prompting": "behaviour",
    "SteeringVector": "steering",
    "StudyError": "errors",
    "Task": "tasks",
    "bake": "export",
    "build_report": "report",
    "build_task": "tasks",
    "draw_candidates": "behaviour",
    "fit": "face",
    "load_model": "models",
    "load_study": "config",
    "mine_pairs": "behaviour",
    "prepare": "behaviour",
    "read_states": "behaviour",
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
