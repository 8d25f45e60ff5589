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

FIRST = "import mnemoscope, torch"
LATE = """
import os, torch
from mnemoscope.runs.processes import in_processes
assert "GOMP_SPINCOUNT" not in os.environ
with in_processes(2) as parallel:
    print(list(parallel(os.getenv, ["GOMP_SPINCOUNT"] * 2)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is of Linux builds")
@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [
        (FIRST, {}, {"1000"}),
        (FIRST, {"GOMP_SPINCOUNT": "77"}, {"77"}),
        (FIRST, {"OMP_WAIT_POLICY": "passive"}, {"0"}),
        (LATE, {}, {"300000"}),  # workers have it (see below); the first process spins as torch does by itself
    ],
)
def test_libgomp_is_loaded_with_it(code: str, given: dict[str, str], expected: set[str]) -> None:
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = unset | {"OMP_DISPLAY_ENV": "VERBOSE"} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stdout + done.stderr)) == expected
    assert code == FIRST or "['1000', '1000']" in done.stdout


def test_a_fit_warns_once_where_torch_came_first(
    mini: Callable[[str], Asking], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class StoppedError(Exception):
        pass

    def stop(cell: str, stage: str, done: float, total: float, note: str) -> None:
        raise StoppedError(str(torch.get_num_threads()))

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(waiting, "_late", False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    bound_waiting()
    warn_of_waiting(2)
    monkeypatch.delenv("GOMP_SPINCOUNT")
    bound_waiting()  # torch is there, as in every test
    warn_of_waiting(1)
    assert not caplog.records
    assert "GOMP_SPINCOUNT" not in os.environ
    asking, before = mini("addition"), torch.get_num_threads()
    fields = {"options": MINI_TASKS["addition"], "progress": stop, "threads": before + 1}
    for _ in range(2):
        with pytest.raises(StoppedError, match=str(before + 1)):
            ms.fit(asking.model, asking.tokenizer, "addition", tmp_path / "run", **fields)
    assert torch.get_num_threads() == before
    ((name, level, told),) = caplog.record_tuples
    assert (name, level) == ("mnemoscope", logging.WARNING)
    assert f"{before + 1} threads" in told
    assert "import mnemoscope first, set GOMP_SPINCOUNT=1000, or give threads=1" in told
