"""A study on a Ray cluster of two nodes ends as it does in one process, also when a node is killed in the middle."""

from __future__ import annotations

import json
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

from mnemoscope.config import load_study
from mnemoscope.runs.errors import InputError
from mnemoscope.study.executors import _to_cluster
from mnemoscope.study.run import run_study
from test_study import check_results

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
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


@pytest.fixture
def cluster(head: Any) -> Iterator[Any]:
    """The head, to which a test adds nodes; those that it leaves are removed."""
    yield head
    ray.shutdown()
    for node in [node for node in head.list_all_nodes() if node is not head.head_node]:
        head.remove_node(node)


@pytest.mark.faults
def test_a_node_that_dies_costs_no_cell_and_no_finished_stage(
    cluster: Any, mini_study_file: Path, two_seeds: Path, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    run, errors = tmp_path / "ray", []
    config = load_study(str(mini_study_file), seeds=2)

    def study() -> None:
        try:
            run_study(config, run, executor="ray", address=cluster.address)
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=study, daemon=True)
    thread.start()
    stages = [run / "cells" / f"addition-{seed}" / "stages" for seed in range(2)]
    deadline = time.monotonic() + 400
    while not all((folder / "train.json").exists() for folder in stages):
        assert thread.is_alive(), errors
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stamps = [(folder / "train.json").stat().st_mtime_ns for folder in stages]
    assert not any((folder / "samples.json").exists() for folder in stages), "each node has a cell to lose"
    cluster.remove_node(nodes[0], allow_graceful=False)
    thread.join(400)
    assert not thread.is_alive()
    assert not errors
    assert stamps == [(folder / "train.json").stat().st_mtime_ns for folder in stages], "finished is not redone"
    check_results(run, two_seeds)
    for seed in range(2):
        file = Path("cells") / f"addition-{seed}" / "records" / "steering.parquet"
        assert (run / file).read_bytes() == (two_seeds / file).read_bytes()
    assert json.loads((run / "failed.json").read_text()) == {}


def test_a_cell_takes_the_processors_that_are_left(
    cluster: Any, mini_study_file: Path, mini_run: Path, tmp_path: Path
) -> None:
    """Parts of its steering run side by side and give the same bytes; threads that wait there sleep soon."""
    cluster.add_node(num_cpus=2)
    run = tmp_path / "run"
    shutil.copytree(mini_run, run)
    cell = run / "cells" / "addition-0"
    names = ("chosen.json", "steering.parquet", "sweep.parquet")
    before = {name: (cell / "records" / name).read_bytes() for name in names}
    for name in (*names, "../stages/steering.json", "../stages/pairs.json"):  # mining keeps states for what follows
        (cell / "records" / name).unlink()
    run_study(load_study(str(mini_study_file)), run, executor="ray", address=cluster.address)
    assert {name: (cell / "records" / name).read_bytes() for name in names} == before
    ray.init(address=cluster.address, log_to_driver=False)
    assert _to_cluster(1, 0, pickle.dumps(os.getenv))("GOMP_SPINCOUNT")() == "1000"


@pytest.mark.parametrize(
    ("executor", "address", "message"),
    [
        ("slurm", None, "executor: 'slurm' is not one of local, ray"),
        ("local", "127.0.0.1:1", "address: only the executor 'ray' goes to one"),
        ("ray", "127.0.0.1:1", "address: no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_bad_executors_are_refused(
    mini_study_file: Path, tmp_path: Path, executor: str, address: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_study(load_study(str(mini_study_file)), tmp_path / "run", executor=executor, address=address)
