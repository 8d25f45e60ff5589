"""Run the cells of a study in parallel, in processes of this machine or on a Ray cluster.

Parts of a cell are mapped (``processes.Map``) with results in order, so that they do not depend on the number of
processes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from threading import Event, Thread
from typing import Any

from mnemoscope.runs.errors import InputError, StudyError, check_one_of, refusing
from mnemoscope.runs.processes import KILLED, LostError, Send, call, in_processes, mapped, pool_of, settle
from mnemoscope.runs.telling import Progress
from mnemoscope.study.cells import Cell

Run = Callable[[Cell, Progress], None]
Submit = Callable[[Cell, int], Future[None]]  # the number: cells at work at that time, this one included

EXECUTORS = ("local", "ray")
RETRIES = 3  # of a task of Ray whose worker is lost; finished stages of a cell are skipped


def run_cells(
    cells: Sequence[Cell],
    run: Run,
    progress: Progress,
    workers: int = 1,
    executor: str = "local",
    address: str | None = None,
) -> dict[str, str]:
    """Run cells in parallel, each after the one whose model it borrows; returns the errors of failed cells by name.

    ``workers``, ``executor`` and ``address`` are those of ``run_study``.

    Raises:
        InputError: the executor is unknown or not installed, the cluster cannot be reached or has no node for a cell,
            or a cell's input cannot be used.
    """
    check_one_of("executor", executor, EXECUTORS)
    if executor == "local" and address:
        raise InputError("address: only the executor 'ray' goes to one")
    submitting: AbstractContextManager[Submit] = nullcontext(partial(_in_this_process, workers, run, progress))
    if executor == "ray":
        submitting = _on_cluster(address, cells, run, progress)
    elif min(workers, len(cells)) > 1:
        submitting = _in_pool(workers, len(cells), run, progress)
    names, failed = {cell.name for cell in cells}, dict[str, str]()
    with submitting as submit:
        ready, running = [cell for cell in cells if cell.lender not in names], dict[Future[None], Cell]()
        while ready or running:
            beside = len(ready) + len(running)
            running |= {submit(cell, beside): cell for cell in ready}
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            ready = []
            for future in [future for future in running if future in done]:
                cell = running.pop(future)
                borrowers = [other for other in cells if other.lender == cell.name]
                if (why := _why(cell, future)) is None:
                    ready += borrowers
                else:
                    lender = f"{cell.name}, whose model it takes, could not go on"
                    failed |= {cell.name: why} | {other.name: f"{other.name}: {lender}" for other in borrowers}
    ordered = sorted(cells, key=lambda cell: cell.lender in failed)  # first what failed by itself
    return {cell.name: failed[cell.name] for cell in ordered if cell.name in failed}


def _why(cell: Cell, ended: Future[None]) -> str | None:
    """Why a cell could not go on, or None; raises what is not for the cell alone to say."""
    cause: Any = ended.exception()
    while getattr(cause, "cause", None):  # Ray puts an error of its own around that of a task
        cause = cause.cause
    if isinstance(cause, LostError | BrokenProcessPool) or type(cause).__module__.startswith("ray."):
        return f"{cell.name}: {KILLED}"
    if isinstance(cause, StudyError):
        return str(cause)
    if cause is not None:
        raise cause
    return None


def _run(run: Run, cell: Cell, progress: Progress, workers: int) -> None:
    """Run a cell with processes for its parts."""
    with in_processes(possible_workers(cell, workers), cell.threads) as parallel:
        run(replace(cell, map=parallel) if workers > 1 else cell, progress)


def possible_workers(cell: Cell, workers: int) -> int:
    """Number of these processes that can hold the model of a cell at a time: one on a GPU."""
    if workers == 1 or _gpus(cell):
        return 1
    from mnemoscope.models import models_that_fit

    folder = cell.config.model.folder
    return models_that_fit(folder, workers) if folder else workers


def _gpus(cell: Cell) -> int:
    """GPUs that a cell takes of a node."""
    return int(cell.config.model.device_map not in (None, "cpu"))


def _in_this_process(workers: int, run: Run, progress: Progress, cell: Cell, beside: int) -> Future[None]:
    """Cells one after the other, each with all processes for its parts."""
    future = Future[None]()
    try:
        _run(run, cell, progress, workers)
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


_news: Any = None  # queue of this worker process


def _report_to(news: Any) -> None:
    global _news
    _news = news


@contextmanager
def _in_pool(workers: int, cells: int, run: Run, progress: Progress) -> Iterator[Submit]:
    """Cells in parallel processes; idle processes take parts of cells."""
    news = get_context("spawn").SimpleQueue()
    begin = partial(_report_to, news)
    with _listening(news, progress), pool_of(min(workers, cells), begin=begin) as pool:
        yield lambda cell, beside: pool.submit(_run_in_worker, run, cell, max(1, workers // beside))


def _run_in_worker(run: Run, cell: Cell, workers: int) -> None:
    _run(run, cell, _seldom(_news.put), workers)


def _seldom(put: Callable[[Any], Any]) -> Progress:
    """Progress that is passed on at most five times a second, and at the end of a stage."""
    last = 0.0

    def report(*news: Any) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2 or news[2] >= news[3]:
            last = time.monotonic()
            put(news)

    return report


@contextmanager
def _listening(news: Any, progress: Progress) -> Iterator[None]:
    """Report the progress that other processes put into a queue."""

    def listen() -> None:
        while not (over.wait(0.1) and news.empty()):
            while not news.empty():
                progress(*news.get())

    over, listener = Event(), Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join(timeout=5)  # a killed process may have left half a message


@contextmanager
def _on_cluster(address: str | None, cells: Sequence[Cell], run: Run, progress: Progress) -> Iterator[Submit]:
    """Cells as tasks of a Ray cluster, each run again where its worker or its whole node is lost."""
    with _ray(address) as ray:
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        processors, graphics = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
        largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        for cell in cells:
            if cell.threads > largest:
                raise InputError(f"threads: {cell.threads}; the largest node of the cluster has {largest:g} processors")
            if _gpus(cell) and not graphics:
                raise InputError("model.device_map: no node of the cluster has a graphics processor (as Ray counts)")
        # The queue is pinned to this node: lost with another one, it would end every cell.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

        def submit(cell: Cell, beside: int) -> Future[None]:
            places = processors // (cell.threads * beside)
            if _gpus(cell):  # a cell that waits for its parts releases its processors, but not its GPU
                places = min(places, graphics // beside - 1)
            if places > 1:
                cell = replace(cell, map=partial(mapped, places, partial(_to_cluster, cell.threads, _gpus(cell))))
            task = _task(_run_on_node, cell.threads, _gpus(cell))
            return task.remote(run, cell, news.actor, os.getcwd()).future()

        with _listening(news, progress):
            yield submit
        news.shutdown()


def _task(function: Callable[..., Any], threads: int, gpus: int) -> Any:
    """A task of Ray, run again where its worker is lost."""
    import ray

    return ray.remote(function).options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)


def _run_on_node(run: Run, cell: Cell, news: Any, folder: str) -> None:
    os.chdir(folder)
    # A task that waits for a message would release its processors.
    _run(run, cell, _seldom(news.put_nowait.remote), 1)


def _to_cluster(threads: int, gpus: int, function: bytes) -> Send:
    """Items become tasks of a Ray cluster."""
    import ray

    task, known, folder = _task(_call_on_node, threads, gpus), ray.put(function), os.getcwd()
    return lambda item: partial(ray.get, task.remote(known, folder, threads, item))


def _call_on_node(function: bytes, folder: str, threads: int, item: Any) -> Any:
    os.chdir(folder)
    settle(threads)
    return call(function, item)


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster, or to one of this machine alone that ends with the context."""
    try:
        import ray
    except ImportError as error:
        raise InputError("executor: 'ray' is not installed: pip install 'mnemoscope[ray]'") from error
    host, _, port = (address or "").rpartition(":")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with refusing(f"address: no Ray cluster answers at {address or 'this machine'}"):
        if host and port.isdigit() and "//" not in host:  # without a listener Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        alone = {} if address else {"include_dashboard": False}
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **alone)
    try:
        yield ray
    finally:
        ray.shutdown()
