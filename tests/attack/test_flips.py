"""One bit of a finished run is wrong: whoever reads it refuses it by name, or nothing that is shown changes.

A sample of the flips runs with the other tests, all of them by ``make attack``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import SteeringVector
from mnemoscope.interventions.detect import Detector
from mnemoscope.models import load_model
from mnemoscope.report import build_report
from mnemoscope.runs.errors import InputError, StudyError
from playground import CELL, client_of

pytestmark = pytest.mark.slow
WHOLE, SAMPLE = 320, 16
FLIPS = WHOLE if os.environ.get("MNEMOSCOPE_ATTACK") == "whole" else SAMPLE
PROMPTS = ["12+34=", "63+45="]
# Every file of the run belongs to one kind; flips are dealt to the kinds in turn.
KINDS = {
    "pages": ["report.html", "results.json"],
    "facts of the run": ["study.yaml", "manifest.json", "failed.json", "stages/*.json"],
    "facts of a cell": ["cells/*/*.json", "cells/*/records/*.json"],
    "markers": ["cells/*/stages/*.json"],
    "tables": ["cells/*/records/*.parquet"],
    "tensors": ["cells/*/*.safetensors", "cells/*/vectors/*.safetensors"],
    "facts of vectors": ["cells/*/vectors/*.json"],
    "model": ["cells/*/model/*"],
}
NOT_READ = [".lock"]  # empty


@pytest.fixture(scope="module")
def copy(mini_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(mini_run, tmp_path_factory.mktemp("flips") / "first")


def report(run: Path) -> Any:
    page = build_report(run)
    return page.read_bytes(), (run / "results.json").read_bytes()


def fitted(run: Path) -> Any:
    """What `detect`, `steer` and a summary give."""
    opened = Fitted.open(run, *load_model(run / "cells" / "addition-0" / "model"))
    shown = opened.answers(PROMPTS, "generalized", gate=0.5), opened.answers(PROMPTS, "memorized")
    return opened.detect(PROMPTS).p_memorized_by_layer.tolist(), shown, str(opened.summary())


def artefacts(run: Path) -> Any:
    """What the file of every single vector and detector gives."""
    cell = run / "cells" / "addition-0"
    vectors = [SteeringVector.load(path) for path in sorted(cell.glob("vectors/*.safetensors"))]
    detectors = [Detector.load(path) for path in sorted(cell.glob("detector*.safetensors"))]
    tensors = [{name: t.tolist() for name, t in one.tensors().items()} for one in (*vectors, *detectors)]
    return tensors, [one.facts() for one in (*vectors, *detectors)]


def playground(run: Path) -> Any:
    """What the pages and the API of the playground answer."""
    steering = [{"toward": "generalized", "method": method} for method in ("nmd", "learned", "low-rank", "gradient")]
    asked = [{"question": {"prompt": PROMPTS[0]}, "steering": one} for one in (None, *steering)]
    with client_of(run.parent) as client:
        answers = [client.get(path) for path in ("/runs", "/runs/first/report", "/api/runs", CELL)]
        answers += [client.get(f"{CELL}/{path}") for path in ("questions", "neurons")]
        answers += [client.post(f"{CELL}/ask", json=one) for one in asked]
    refused = [answer.text for answer in answers if answer.status_code != 200]
    refused += [run["damaged"] for run in answers[2].json() if run["damaged"]]
    if refused:
        assert all(answer.status_code == 422 for answer in answers if answer.status_code != 200), refused
        raise InputError(" ".join(refused))
    return [answer.text for answer in answers]


READERS: tuple[Callable[[Path], Any], ...] = (report, fitted, artefacts, playground)


@pytest.fixture(scope="module")
def before(copy: Path) -> dict[str, Any]:
    """What every reader gives of the run as it is."""
    return {reader.__name__: plainly(reader(copy)) for reader in READERS}


def plainly(value: Any) -> str:
    return json.dumps(value, default=lambda raw: raw.decode() if isinstance(raw, bytes) else str(raw))


def test_every_file_is_of_a_kind(copy: Path) -> None:
    known = {path for patterns in KINDS.values() for pattern in patterns for path in copy.glob(pattern)}
    files = {path for path in copy.rglob("*") if path.is_file()}
    assert {path.name for path in files - known} == set(NOT_READ)


@pytest.mark.parametrize("number", range(FLIPS))
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(copy: Path, before: dict[str, Any], number: int) -> None:
    rng = np.random.default_rng([21, number])
    patterns = list(KINDS.values())[number % len(KINDS)]
    files = sorted(path for pattern in patterns for path in copy.glob(pattern))
    path = files[(number // len(KINDS)) % len(files)]
    kept = {page: page.read_bytes() for page in (path, *copy.glob("re*.*"), copy / "stages" / "report.json")}
    content = bytearray(kept[path])
    place, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[place] ^= 1 << bit
    path.write_bytes(content)
    refused = []
    try:
        # Last the report, which writes its pages anew.
        for reader in (*READERS[1:], READERS[0]):
            try:
                found = plainly(reader(copy))
            except (InputError, StudyError) as error:
                refused.append((reader.__name__, str(error)))
                continue
            assert found == before[reader.__name__], (reader.__name__, path, place, bit)
    finally:
        for page, text in kept.items():
            page.write_bytes(text)
    assert [by for by, message in refused if path.stem not in message] == [], (refused, path, place, bit)
    if path.suffix in (".parquet", ".safetensors"):
        assert refused, (path, place, bit)
