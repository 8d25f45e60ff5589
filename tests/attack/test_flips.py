"""One bit of a finished run is wrong: whoever reads it refuses it by name, or nothing that is shown changes."""

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

pytestmark = [pytest.mark.slow, pytest.mark.faults]
FLIPS = 320 if os.environ.get("MNEMOSCOPE_ATTACK") == "whole" else 7
PROMPTS = ["12+34=", "63+45="]


@pytest.fixture(scope="module")
def copy(mini_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(mini_run, tmp_path_factory.mktemp("flips") / "first")


def report(run: Path) -> Any:
    """What is computed from records."""
    return build_report(run).read_text(), (run / "results.json").read_text()


def fitted(run: Path) -> Any:
    """What `detect`, `steer` and a summary give."""
    opened = Fitted.open(run, *load_model(run / "cells" / "addition-0" / "model"))
    shown = opened.answers(PROMPTS, "generalized", gate=0.5), opened.answers(PROMPTS, "memorized")
    return opened.detect(PROMPTS).p_memorized_by_layer.tolist(), shown, str(opened.summary())


def artefacts(run: Path) -> Any:
    """What the file of every single vector and detector gives."""
    cell = run / "cells" / "addition-0"
    found: list[Any] = [SteeringVector.load(path) for path in sorted(cell.glob("vectors/*.safetensors"))]
    found += [Detector.load(path) for path in sorted(cell.glob("detector*.safetensors"))]
    return [({name: t.tolist() for name, t in one.tensors().items()}, one.facts()) for one in found]


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


READERS: tuple[Callable[[Path], Any], ...] = (fitted, artefacts, playground, report)  # the last one writes its pages


@pytest.fixture(scope="module")
def before(copy: Path) -> dict[str, str]:
    """What every reader gives of the run as it is."""
    return {reader.__name__: json.dumps(reader(copy), default=str) for reader in READERS}


@pytest.mark.parametrize("number", range(FLIPS))
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(copy: Path, before: dict[str, str], number: int) -> None:
    """Files of all kinds in turn: a stride through their list, sorted by what they end in."""
    rng = np.random.default_rng([21, number])
    files = sorted((path for path in copy.rglob("*.*") if path.name != ".lock"), key=lambda path: (path.suffix, path))
    files = [path for path in files if path.is_file()]
    path = files[number * len(files) // FLIPS if len(files) > FLIPS else number % len(files)]
    kept = {page: page.read_bytes() for page in (path, *copy.glob("re*.*"), copy / "stages" / "report.json")}
    content = bytearray(kept[path])
    place, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[place] ^= 1 << bit
    path.write_bytes(content)
    refused = []
    try:
        for reader in READERS:
            try:
                found = json.dumps(reader(copy), default=str)
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
