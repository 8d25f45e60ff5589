"""Cells and parts of cells in parallel: the same results for any number of processes, which end with their parent."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from light_work import Counting, dies, fails, killed_cell, notes_when
from mnemoscope.config import load_study, parse_study
from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.runs.processes import AHEAD, LostError, in_processes, pool_of
from mnemoscope.study.cells import Cell, cells_of
from mnemoscope.study.executors import run_cells

pytestmark = pytest.mark.slow  # new processes
KILLED = "a process was killed, most likely for lack of memory; use fewer processes"


def test_results_come_in_order_from_processes_that_keep_what_they_opened() -> None:
    drawn = 0

    def numbers() -> Iterator[int]:
        nonlocal drawn
        for number in range(1000):
            drawn += 1
            yield number

    with in_processes(2) as parallel:
        assert [process for _, process, _ in parallel(Counting(), iter([3]))] == [os.getpid()], "one item needs none"
        found = list(parallel(Counting(), list(range(60))))
        for (square, *_), number in zip(parallel(Counting(), numbers()), range(30), strict=False):
            assert square == number**2
            assert drawn <= number + 1 + AHEAD * 2, "a stream is drawn as it is needed"
    assert [square for square, *_ in found] == [n**2 for n in range(60)]
    processes = {process for _, process, _ in found}
    assert len(processes) == 2
    assert os.getpid() not in processes
    most = {process: max(calls for _, p, calls in found if p == process) for process in processes}
    assert sum(most.values()) == 60, "one object in each process was called for all items there"


def test_an_error_of_an_item_is_raised_and_a_killed_process_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="1 cannot be done"), in_processes(2) as parallel:
        list(parallel(fails, [1, 2]))
    with pytest.raises(LostError, match=KILLED) as lost, in_processes(2) as parallel:
        list(parallel(dies, [1, 2]))
    assert str(pickle.loads(pickle.dumps(lost.value))) == str(lost.value), "also where it is told to another process"
    config = load_study("quickstart").cells["addition"]
    cells = [Cell(f"{n}", "addition", n, config, 1, tmp_path) for n in range(2)]
    failed = run_cells(cells, killed_cell, lambda *_: None, workers=2)
    assert list(failed) == ["1"]
    assert failed["1"].startswith(f"1: {KILLED}")
    assert "\n" not in failed["1"]


def test_an_error_ends_processes_that_are_at_work() -> None:
    def interrupted() -> None:
        with pool_of(1) as pool:
            future = pool.submit(time.sleep, 120)
            while not future.running():
                time.sleep(0.01)
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 60, "nobody waited for it"


SCRIPT = """
import sys, time
from mnemoscope.runs.processes import in_processes
print('begun')
with in_processes(2) as parallel:
    print(list(parallel(float, [4, 9])), flush=True)
    list(parallel(time.sleep, [60, 60]))
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to see who is left")
def test_processes_of_a_script_do_not_run_it_again_and_end_when_it_is_killed(tmp_path: Path) -> None:
    mark = f"MNEMOSCOPE_TEST={tmp_path}"

    def alive() -> set[str]:
        found = set()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in entry.read_bytes():
                    found.add(entry.parent.name)
        return found

    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "MNEMOSCOPE_TEST": str(tmp_path)}
    command = [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n", "[4.0, 9.0]\n"]
        assert len(alive()) >= 4  # the script, a tracker, two workers
        process.kill()
        assert process.stdout.read() == ""
    deadline = time.monotonic() + 60
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive()


LENDING: dict[str, Any] = {
    "study": "lending",
    "seeds": 3,
    "cells": {  # borrowers are named first
        "borrower": {"task": "addition", "model": {"cell": "donor"}},
        "donor": {"task": "addition", "model": {"layers": 1, "width": 16}},
    },
}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_begins_once_its_lender_has_ended_and_nobody_waits_for_all_lenders(workers: int, tmp_path: Path) -> None:
    cells, told = cells_of(parse_study(LENDING), tmp_path), list[str]()
    run = partial(notes_when, meeting=workers == 2)
    failed = run_cells(cells, run, lambda *news: told.append(news[0]), workers)
    assert failed == {
        "donor-1": "donor-1: never mixed",
        "borrower-1": "borrower-1: donor-1, whose model it takes, could not go on",
    }
    assert list(failed) == ["donor-1", "borrower-1"], "first what failed by itself"
    times = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("cells/*/times.json")}
    assert set(times) == set(told) == {cell.name for cell in cells} - {"borrower-1"}
    for seed in (0, 2):
        assert times[f"borrower-{seed}"][0] >= times[f"donor-{seed}"][1]
    if workers == 2:
        assert times["borrower-0"][0] < times["donor-2"][1], "the last lender is still at work"


def test_a_costly_cell_has_fewer_seeds_and_its_borrowers_no_more_than_it(tmp_path: Path) -> None:
    raw = copy.deepcopy(LENDING)
    for label in raw["cells"]:
        raw["cells"][label]["max_seeds"] = 2
    names = [cell.name for cell in cells_of(parse_study(raw), tmp_path)]
    assert names == ["borrower-0", "borrower-1", "donor-0", "donor-1"]
    raw["cells"]["borrower"].pop("max_seeds")
    with pytest.raises(InputError, match=r"cells.borrower.max_seeds: at most 2 are allowed, as many as donor has"):
        parse_study(raw)
    raw["cells"]["borrower"]["model"] = {"cell": "nobody"}
    with pytest.raises(InputError, match=r"cells.borrower.model.cell: 'nobody' is not one of donor"):
        parse_study(raw)
