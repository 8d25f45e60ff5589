"""Where the cells of a study run: in this process, in processes beside each other, or on a Ray cluster.

An executor runs cells, each after the one whose model it takes, and says, by name, why some could not go on.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from threading import Thread
from typing import Any

from mnemoscope.cells import Cell
from mnemoscope.errors import InputError, StudyError
from mnemoscope.processes import die_with, pool_of

# (cell, stage, done, total, note): what a running cell tells.
Progress = Callable[[str, str, float, float, str], None]
Run = Callable[[Cell, Progress], None]
Execute = Callable[[Sequence[Cell], Run, Progress], dict[str, str]]

EXECUTORS = ("local", "ray")
RETRIES = 3  # of a cell whose worker is lost; its finished stages are not run again


@contextmanager
def by_name(name: str, workers: int, address: str | None = None) -> Iterator[Execute]:
    """An executor, for as long as it is needed.

    Args:
        workers: cells at a time; a cluster takes as many as it has processors for.
        address: of a Ray cluster.

    Raises:
        InputError: there is no such executor, Ray is not installed, or the cluster cannot be reached.
    """
    if name not in EXECUTORS:
        raise InputError(f"executor: {name!r} is not one of {', '.join(EXECUTORS)}")
    if name == "ray":
        with _cluster(address) as ray:
            yield partial(_on_cluster, ray)
    elif address:
        raise InputError("address: only the executor 'ray' goes to one")
    else:
        yield _one_by_one if workers == 1 else partial(_side_by_side, workers)


class _Order:
    """Which cells may begin, and why some never will.

    Attributes:
        first: those that wait for nobody.
        failed: by name, why a cell could not go on.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        names = {cell.name for cell in cells}
        self.first = [cell for cell in cells if cell.lender not in names]
        self.failed: dict[str, str] = {}
        self._borrowers = [cell for cell in cells if cell.lender in names]

    def after(self, cell: Cell, why: str | None = None) -> list[Cell]:
        """The cells that may begin now that this one has ended, and ``why`` if it could not go on.

        Those borrow a model themselves and lend none.
        """
        borrowers = [other for other in self._borrowers if other.lender == cell.name]
        if why is None:
            return borrowers
        self.failed[cell.name] = why
        for other in borrowers:
            self.failed[other.name] = f"{other.name}: {cell.name}, whose model it takes, could not go on"
        return []


def _one_by_one(cells: Sequence[Cell], run: Run, progress: Progress) -> dict[str, str]:
    order = _Order(cells)
    waiting = deque(order.first)
    while waiting:
        cell, why = waiting.popleft(), None
        try:
            run(cell, progress)
        except StudyError as error:
            why = str(error)
        waiting += order.after(cell, why)
    return order.failed


def _side_by_side(workers: int, cells: Sequence[Cell], run: Run, progress: Progress) -> dict[str, str]:
    if len(cells) == 1:
        return _one_by_one(cells, run, progress)
    context = get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(die_with, (os.getpid(),))
    with manager:
        messages = manager.Queue()
        listener = Thread(target=_listen, args=(messages, progress), daemon=True)
        listener.start()
        many, order = min(workers, len(cells)), _Order(cells)
        with pool_of(many) as pool:
            running = {pool.submit(_run_there, run, cell, messages): cell for cell in order.first}
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    cell, why = running.pop(future), None
                    try:
                        future.result()
                    except StudyError as error:
                        why = str(error)
                    # Behind all that wait already, so that nobody is idle while a lender is at work.
                    running |= {
                        pool.submit(_run_there, run, next_one, messages): next_one
                        for next_one in order.after(cell, why)
                    }
        messages.put(None)
        listener.join()
    return order.failed


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster, or to one of this machine alone that ends with the study."""
    try:
        import ray
    except ImportError as error:
        raise InputError("executor: 'ray' is not installed: pip install 'mnemoscope[ray]'") from error
    _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    alone = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **alone)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"address: no Ray cluster answers at {address or 'this machine'} ({reason[0]})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str | None) -> None:
    """Raises InputError where nobody listens at an address of the form host:port, which Ray would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "//" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise InputError(f"address: no Ray cluster answers at {address} ({error.strerror or error})") from error


def _on_cluster(ray: Any, cells: Sequence[Cell], run: Run, progress: Progress) -> dict[str, str]:
    """Each cell is a task that is tried again where its worker or its whole node is lost."""
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    for cell in cells:
        if cell.threads > largest:
            raise InputError(f"threads: {cell.threads}; the largest node of the cluster has {largest:g} processors")
    graphics = int(ray.cluster_resources().get("GPU", 0))
    if any(map(_gpus, cells)) and not graphics:
        raise InputError("model.device_map: no node of the cluster has a graphics processor (as Ray counts them)")
    # News are kept where the study was started: with them on a node that dies, every cell would fail.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    there, order = ray.remote(_run_on_node), _Order(cells)
    waiting: dict[Any, Cell] = {}

    def begin(some: Sequence[Cell]) -> None:
        beside = len(waiting) + len(some)
        for cell in some:
            task = there.options(num_cpus=cell.threads, num_gpus=_gpus(cell), max_retries=RETRIES, name=cell.name)
            placed = _with_places(ray, cell, beside, graphics)
            waiting[task.remote(run, placed, messages.actor, os.getcwd())] = cell

    begin(order.first)
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=0.2)
        for news in messages.get_nowait_batch(messages.qsize()):
            progress(*news)
        for task in done:
            cell, why = waiting.pop(task), None
            try:
                ray.get(task)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, StudyError):
                    raise error.cause from error
                why = str(error.cause)
            except ray.exceptions.RayError as error:
                why = f"{cell.name}: its worker was lost again and again ({type(error).__name__})"
            begin(order.after(cell, why))
    messages.shutdown()
    return order.failed


def _with_places(ray: Any, cell: Cell, beside: int, graphics: int) -> Cell:
    """The cell, which takes several places where there are more than the ``beside`` cells that are at work."""
    places = int(ray.cluster_resources().get("CPU", 1)) // (cell.threads * beside)
    if _gpus(cell):  # a cell that waits for its parts gives away its processors, but not what else it has
        places = min(places, graphics // beside - 1)
    return replace(cell, spread=_Spreading(places, cell.threads, _gpus(cell))) if places > 1 else cell


def _gpus(cell: Cell) -> int:
    """How many of a node's graphics processors a cell takes."""
    return int(cell.config.model.device_map not in (None, "cpu"))


def _run_on_node(run: Run, cell: Cell, messages: Any, folder: str) -> None:
    """Run a cell where the cluster puts it, in the folder in which the study was started."""
    os.chdir(folder)
    told = 0.0

    def tell(*news: Any) -> None:
        # Nobody waits for a message: whoever waits gives its processors away meanwhile.
        nonlocal told
        if time.monotonic() - told > 0.2 or news[2] >= news[3]:
            told = time.monotonic()
            messages.put_nowait.remote(news)

    run(cell, tell)


@dataclass(frozen=True)
class _Spreading:
    """Parts of a list as tasks of the cluster, each tried again where its worker is lost."""

    places: int
    threads: int
    gpus: int

    def __call__(self, function: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
        import ray

        parts = [items[place :: self.places] for place in range(min(self.places, len(items)))]
        task = ray.remote(_call).options(num_cpus=self.threads, num_gpus=self.gpus, max_retries=RETRIES)
        tasks = [task.remote(function, self.threads, part, os.getcwd()) for part in parts]
        found: list[Any] = [None] * len(items)
        for place, part in enumerate(ray.get(tasks)):
            found[place :: self.places] = part
        return found


def _call(function: Callable[[list[Any]], list[Any]], threads: int, part: list[Any], folder: str) -> list[Any]:
    from mnemoscope.processes import settle

    os.chdir(folder)
    settle(threads)
    return function(part)


def _run_there(run: Run, cell: Cell, messages: Any) -> None:
    run(cell, lambda *news: messages.put(news))


def _listen(messages: Any, progress: Progress) -> None:
    try:
        while (news := messages.get()) is not None:
            progress(*news)
    except (EOFError, OSError):
        return  # the study ended before its last message
