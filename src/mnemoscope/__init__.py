"""Measure whether a language model answers from memory or by a rule, find the neurons that separate the two, and steer.

Public names are imported on first use, so that importing the package costs nothing. Import it before torch
(``waiting``)::

    import mnemoscope as ms

    model, tokenizer = ms.load_model("smollm2")
    fitted = ms.fit(model, tokenizer, "mine.jsonl", out="runs/mine")
"""

from __future__ import annotations

import importlib
from typing import Any

from mnemoscope.runs.waiting import bound_waiting

bound_waiting()  # before anything here imports torch: in commands, workers and Ray's tasks as in Python

_NAMES = {
    "behaviour": "Asking Prompting draw_candidates mine_pairs prepare read_states score",
    "bench.run": "arena",
    "config": "load_study",
    "statistics.contrast": "Contrast ContrastAccumulator",
    "interventions.detect": "Detector",
    "watch.callback": "BehaviourCallback",
    "runs.errors": "InputError StudyError",
    "serving.export": "bake to_gguf",
    "face.fitted": "Fitted fit",
    "interventions": "SteeringVector",
    "models": "load_model",
    "report": "build_report",
    "study.run": "run_study",
    "tasks": "Example Task allow_code build_task",
}
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mnemoscope' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mnemoscope.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
