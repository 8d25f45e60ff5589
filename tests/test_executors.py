"""A study on a Ray cluster ends as it does in processes, also when a node is killed in the middle."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from light_work import maps_on_a_node_that_dies
from mnemoscope.config import load_study, parse_study
from mnemoscope.runs.errors import InputError
from mnemoscope.study.cells import cells_of
from mnemoscope.study.executors import _to_cluster, run_cells
from mnemoscope.study.run import run_study

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """The head of a cluster, which runs nothing itself."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or the other tests would leave them nothing
        patch.delenv("GOMP_SPINCOUNT", raising=False)  # which this process has: workers are to set it themselves
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield made
        ray.shutdown()
        made.shutdown()


def test_a_stage_on_a_cluster_ends_in_the_same_bytes(
    cluster: Any, mini_study_file: Path, mini_run: Path, tmp_path: Path
) -> None:
    """What is finished is not run again; threads that wait on a node sleep soon."""
    node = cluster.add_node(num_cpus=2)
    run = shutil.copytree(mini_run, tmp_path / "run")
    cell, told = run / "cells" / "addition-0", list[tuple[Any, ...]]()
    table, before = cell / "records" / "samples.parquet", (cell / "records" / "samples.parquet").read_bytes()
    (cell / "stages" / "samples.json").unlink()
    table.unlink()
    run_study(load_study(str(mini_study_file)), run, lambda *n: told.append(n), executor="ray", address=cluster.address)
    assert table.read_bytes() == before
    assert ("addition-0", "steering", 1, 1, "done before") in told
    ray.init(address=cluster.address, log_to_driver=False)
    assert _to_cluster(1, 0, pickle.dumps(os.getenv))("GOMP_SPINCOUNT")() == "1000"
    ray.shutdown()
    cluster.remove_node(node)


@pytest.mark.faults
def test_a_node_that_dies_costs_no_cell(cluster: Any, tmp_path: Path) -> None:
    nodes, failed, told = [cluster.add_node(num_cpus=2) for _ in range(2)], list[Any](), set[str]()
    cells = cells_of(parse_study({"study": "two", "seeds": 2, "cells": {"one": {"task": "addition"}}}), tmp_path)

    def work() -> None:
        try:
            tell, where = (lambda *news: told.add(news[0])), cluster.address
            failed.append(run_cells(cells, maps_on_a_node_that_dies, tell, executor="ray", address=where))
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + 300
    while not all(list(cell.folder.glob("run-*")) for cell in cells):
        assert thread.is_alive(), failed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.remove_node(nodes[0], allow_graceful=False)
    (tmp_path / "cells" / "over").touch()
    thread.join(300)
    assert failed == [{}]
    assert sorted(len(list(cell.folder.glob("run-*"))) for cell in cells) == [1, 2], "each node had a cell to lose"
    assert {(cell.folder / "squares.json").read_text() for cell in cells} == {"[1, 4, 9]"}
    assert told == {cell.name for cell in cells}


@pytest.mark.parametrize(
    ("executor", "address", "message"),
    [
        ("slurm", None, "executor: 'slurm' is not one of local, ray"),
        ("local", "127.0.0.1:1", "address: only the executor 'ray' goes to one"),
        ("ray", "127.0.0.1:1", "address: no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_bad_executors_are_refused(executor: str, address: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_cells([], lambda *_: None, lambda *_: None, 1, executor, address)
