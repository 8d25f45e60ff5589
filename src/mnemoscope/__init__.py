"""Measure whether a language model answers from memory or by a rule, find the neurons that separate the two, and steer.

Public names are imported on first use, so that importing the package costs nothing. Import it before torch
(``waiting``)::

    import mnemoscope as ms

    model, tokenizer = ms.load_model("smollm2")
    fitted = ms.fit(model, tokenizer, "mine.jsonl", out="runs/mine")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemoscope.runs.lazily import handed_on
from mnemoscope.runs.waiting import bound_waiting

if TYPE_CHECKING:
    from mnemoscope.auditing.items import Item, Variant
    from mnemoscope.auditing.run import audit
    from mnemoscope.behaviour import Asking, Prompting, draw_candidates, mine_pairs, prepare, read_states, score
    from mnemoscope.bench.run import arena
    from mnemoscope.config import load_study
    from mnemoscope.face.fitted import Fitted, fit
    from mnemoscope.face.ready import ready
    from mnemoscope.interventions import SteeringVector
    from mnemoscope.interventions.detect import Detector
    from mnemoscope.models import load_model
    from mnemoscope.report import build_report
    from mnemoscope.runs.errors import InputError, StudyError
    from mnemoscope.serving.export import bake
    from mnemoscope.serving.llama_cpp import from_gguf, to_gguf
    from mnemoscope.statistics.contrast import Contrast, ContrastAccumulator
    from mnemoscope.study.run import run_study
    from mnemoscope.tasks import Example, Task, allow_code, build_task
    from mnemoscope.watch.callback import BehaviourCallback

bound_waiting()  # before anything here imports torch: in commands, workers and Ray's tasks as in Python

__getattr__, __all__ = handed_on(__name__, __file__)


def __dir__() -> list[str]:
    return __all__
