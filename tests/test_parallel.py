"""Cells and parts of cells in parallel: the same results for any number of processes, which end with their parent."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from light_work import Counting, dies, dies_at_first, fails, killed_cell, notes_when
from mnemoscope.config import load_study, parse_study
from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.runs.processes import LostError, pool_of
from mnemoscope.study.cells import Cell, cells_of
from mnemoscope.study.executors import AHEAD, in_processes, run_cells
from mnemoscope.study.stages import STAGES

pytestmark = pytest.mark.slow  # new processes


def test_results_come_in_order_from_several_processes_that_keep_what_they_opened() -> None:
    with in_processes(2) as parallel:
        found = list(parallel(Counting(), list(range(60))))
        again = list(parallel(Counting(), [7, 8]))
    assert [square for square, *_ in found] == [n**2 for n in range(60)]
    processes = {process for _, process, _ in found}
    assert len(processes) == 2
    assert os.getpid() not in processes
    most = {process: max(calls for _, p, calls in found if p == process) for process in processes}
    assert sum(most.values()) == 60, "one object in each process was called for all items there"
    assert {process for _, process, _ in again} <= processes, "the processes are kept"


def test_a_stream_is_drawn_as_it_is_needed() -> None:
    drawn = 0

    def numbers() -> Iterator[int]:
        nonlocal drawn
        for number in range(1000):
            drawn += 1
            yield number

    with in_processes(2) as parallel:
        for (square, *_), number in zip(parallel(Counting(), numbers()), range(30), strict=False):
            assert square == number**2
            assert drawn <= number + 1 + AHEAD * 2


def test_a_single_item_starts_no_process() -> None:
    with in_processes(2) as parallel:
        assert [process for _, process, _ in parallel(Counting(), iter([3]))] == [os.getpid()]


@pytest.mark.faults
def test_an_error_of_an_item_is_raised_and_a_killed_process_is_reported() -> None:
    with pytest.raises(StudyError, match="1 cannot be done"), in_processes(2) as parallel:
        list(parallel(fails, [1, 2]))
    killed = "its process was killed 3 times, most likely for lack of memory"
    with pytest.raises(LostError, match=killed), in_processes(2) as parallel:
        list(parallel(dies, [1, 2]))


@pytest.mark.faults
def test_a_killed_process_costs_the_other_items_nothing(tmp_path: Path) -> None:
    with in_processes(2) as parallel:
        assert list(parallel(partial(dies_at_first, tmp_path), range(5))) == [0, 1, 2, 3, 4]
    with pool_of(4) as pool:
        futures = [pool.submit(dies_at_first, tmp_path, number) for number in (5, 10, 11, 12, 13, 14)]
        assert [future.result() for future in futures[1:]] == [10, 11, 12, 13, 14]
        with pytest.raises(LostError):
            futures[0].result()
    assert len(list(tmp_path.glob("5-*"))) == 3


@pytest.mark.faults
def test_a_cell_whose_process_is_killed_runs_again_and_is_given_up_in_one_line(tmp_path: Path) -> None:
    config = load_study("quickstart").cells["addition"]
    cells = [Cell(str(number), "addition", number, config, 1, tmp_path) for number in (3, 4, 5, 6)]
    failed = run_cells(cells, partial(killed_cell, tmp_path), lambda *_: None, workers=2)
    assert list(failed) == ["5"]
    assert failed["5"].startswith("5: its process was killed 3 times, most likely for lack of memory")
    assert "\n" not in failed["5"]


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


def test_a_script_without_a_guard_is_not_run_again_by_its_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from math import sqrt\nfrom mnemoscope.study.executors import in_processes\nprint('begun')\n"
        "with in_processes(2) as parallel:\n    print(list(parallel(sqrt, [4.0, 9.0])))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["begun", "[2.0, 3.0]", ""]


def test_mining_gives_the_same_bytes_in_parallel(mini_run: Path, tmp_path: Path) -> None:
    """Many small batches, whose sums of float64 would differ in another order."""
    (cell,) = cells_of(load_study(str(mini_run / "study.yaml")), mini_run)
    pairs = cell.config.pairs.model_copy(update={"batch_size": 2, "rephrasings": 2})
    model = cell.config.model.model_copy(update={"folder": str(cell.model_folder)})
    cell = replace(cell, config=cell.config.model_copy(update={"pairs": pairs, "model": model}))
    found = []
    for workers in (1, 2):
        with in_processes(workers, cell.threads) as parallel:
            mined = replace(cell, folder=tmp_path / f"{workers}", map=parallel)
            found.append([path.read_bytes() for path in STAGES["pairs"](mined, lambda *_: None)])
    assert found[0] == found[1]
    assert len(pd.read_parquet(tmp_path / "2" / "records" / "pairs.parquet")) > 5 * 32


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


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to see who is left")
def test_a_killed_run_leaves_no_process_behind(mini_study_file: Path, tmp_path: Path) -> None:
    mark = f"MNEMOSCOPE_TEST={tmp_path}"

    def alive() -> set[str]:
        found = set()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in entry.read_bytes():
                    found.add(entry.parent.name)
        return found

    command = [sys.executable, "-m", "mnemoscope", "run", str(mini_study_file), "--seeds", "2", "--workers", "2"]
    environment = {**os.environ, "MNEMOSCOPE_TEST": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(alive()) < 4 and time.monotonic() < deadline:  # the run, a tracker, two workers
        time.sleep(0.1)
    assert len(alive()) >= 4
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive()
