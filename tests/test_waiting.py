"""Threads that wait sleep soon, in every process the project starts, unless the user has said otherwise."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mnemoscope as ms
from helpers import MINI_TASKS
from mnemoscope.behaviour import Asking
from mnemoscope.runs import waiting
from mnemoscope.runs.waiting import bound_waiting, warn_of_waiting

COMMAND = "import sys; sys.argv[1:] = ['doctor', 'no/such/model']; from mnemoscope.cli import main; main()"
LATE = """
import os, torch
from mnemoscope.runs.processes import in_processes
assert "GOMP_SPINCOUNT" not in os.environ
"""
WORKER = """
with in_processes(2, 1) as parallel:
    print(list(parallel(os.getenv, ["GOMP_SPINCOUNT"] * 2)))
"""


def settings_of(code: str, **given: str) -> str:
    """What copies of libgomp say that they were loaded with, and what the code prints."""
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = unset | {"OMP_DISPLAY_ENV": "VERBOSE"} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def spins(said: str) -> set[str]:
    return set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said))


linux = pytest.mark.skipif(sys.platform != "linux", reason="libgomp is of Linux builds")


@linux
@pytest.mark.parametrize("code", ["import mnemoscope, torch", COMMAND])
def test_libgomp_is_loaded_with_it(code: str) -> None:
    assert spins(settings_of(code)) == {"1000"}


@linux
def test_workers_have_it_though_the_user_imported_torch_first() -> None:
    said = settings_of(LATE + WORKER)
    assert "['1000', '1000']" in said
    assert "1000" in spins(said)
    assert len(spins(said)) == 2, "the first process spins as torch does by itself"


@linux
@pytest.mark.parametrize(
    ("given", "expected"), [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_what_the_user_has_said_stays(given: dict[str, str], expected: str) -> None:
    said = settings_of("import mnemoscope, torch", **given)
    assert spins(said) == {expected}


def test_a_fit_warns_once_where_torch_came_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(waiting, "_late", False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    bound_waiting()
    warn_of_waiting(2)
    assert not caplog.records
    monkeypatch.delenv("GOMP_SPINCOUNT")
    bound_waiting()  # torch is there, as in every test
    assert "GOMP_SPINCOUNT" not in os.environ
    warn_of_waiting(1)
    assert not caplog.records
    for _ in range(2):
        warn_of_waiting(2)
    ((name, level, told),) = caplog.record_tuples
    assert (name, level) == ("mnemoscope", logging.WARNING)
    assert "2 threads" in told
    assert "import mnemoscope first, set GOMP_SPINCOUNT=1000, or give threads=1" in told


def test_a_fit_on_the_cpu_calls_it_and_times_with_its_threads(
    mini: Callable[[str], Asking], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class StoppedError(Exception):
        pass

    def stop(cell: str, stage: str, done: float, total: float, note: str) -> None:
        raise StoppedError(str(torch.get_num_threads()))

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(waiting, "_late", True)
    asking, before = mini("addition"), torch.get_num_threads()
    fields = {"options": MINI_TASKS["addition"], "progress": stop}
    with pytest.raises(StoppedError, match=str(before + 1)):
        ms.fit(asking.model, asking.tokenizer, "addition", tmp_path / "run", threads=before + 1, **fields)
    assert torch.get_num_threads() == before
    assert [record.message.startswith("threads: torch was imported before") for record in caplog.records] == [True]
