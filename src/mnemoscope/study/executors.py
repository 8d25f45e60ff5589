"""Run the cells of a study and the parts of a cell in parallel, in processes of this machine or on a Ray cluster.

Parts are mapped by a function with the interface of the built-in ``map`` (``processes.Map``), whose results keep the
order of the items, so that they do not depend on the number of processes.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import chain, islice
from multiprocessing import get_context
from threading import Event, Thread
from typing import Any

from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.runs.processes import LostError, Map, pool_of, settle
from mnemoscope.runs.telling import Progress
from mnemoscope.study.cells import Cell

Run = Callable[[Cell, Progress], None]
Ended = Future[str | None]  # why a cell could not go on, or None
Submit = Callable[[Cell, int], Ended]  # the number: cells at work at that time, this one included
Send = Callable[[Any], Callable[[], Any]]  # submits an item, and returns what waits for its result

EXECUTORS = ("local", "ray")
RETRIES = 3  # of a task whose worker is lost; finished stages of a cell are skipped
AHEAD = 4  # items of a stream held at a time, by process


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
    if executor not in EXECUTORS:
        raise InputError(f"executor: {executor!r} is not one of {', '.join(EXECUTORS)}")
    if executor == "local" and address:
        raise InputError("address: only the executor 'ray' goes to one")
    submitting: AbstractContextManager[Submit] = nullcontext(partial(_in_this_process, workers, run, progress))
    if executor == "ray":
        submitting = _on_cluster(address, cells, run, progress)
    elif min(workers, len(cells)) > 1:
        submitting = _in_pool(workers, len(cells), run, progress)
    names, failed = {cell.name for cell in cells}, dict[str, str]()
    with submitting as submit:
        ready, running = [cell for cell in cells if cell.lender not in names], dict[Ended, Cell]()
        while ready or running:
            beside = len(ready) + len(running)
            running |= {submit(cell, beside): cell for cell in ready}
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            ready = []
            for future in [future for future in running if future in done]:
                cell = running.pop(future)
                why = f"{cell.name}: {lost}" if (lost := _lost(future)) else future.result()
                borrowers = [other for other in cells if other.lender == cell.name]
                if why is None:
                    ready += borrowers
                else:
                    lender = f"{cell.name}, whose model it takes, could not go on"
                    failed |= {cell.name: why} | {other.name: f"{other.name}: {lender}" for other in borrowers}
    ordered = sorted(cells, key=lambda cell: cell.lender in failed)  # first what failed by itself
    return {cell.name: failed[cell.name] for cell in ordered if cell.name in failed}


def _lost(future: Ended) -> LostError | None:
    error = future.exception()
    return error if isinstance(error, LostError) else None


@contextmanager
def in_processes(workers: int, threads: int | None = None) -> Iterator[Map]:
    """A ``map`` over processes of this machine, started for two items or more.

    ``threads`` of torch in each; None where they need no torch, which takes seconds to import.
    """
    with ExitStack() as stack:
        start = cache(lambda: stack.enter_context(pool_of(workers, threads)))
        yield partial(_mapped, workers, lambda function: lambda item: start().submit(_call, function, item).result)


def _mapped(
    places: int, sender: Callable[[bytes], Send], function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """``map`` in other processes; the function is sent once, pickled, and keeps there what it opens."""
    # A stream may be longer than memory, a list is in it.
    most = len(items) if isinstance(items, Sized) else AHEAD * places
    left = iter(items)
    first = list(islice(left, 2))
    if places == 1 or len(first) < 2:
        yield from map(function, chain(first, left))
        return
    send, waiting = sender(pickle.dumps(function)), deque[Callable[[], Any]]()
    for item in chain(first, left):
        waiting.append(send(item))
        if len(waiting) >= most:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _to_cluster(threads: int, gpus: int, function: bytes) -> Send:
    """Items become tasks of a Ray cluster, each run again where its worker is lost."""
    import ray

    task = ray.remote(_call_on_node).options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)
    known, folder = ray.put(function), os.getcwd()
    return lambda item: partial(ray.get, task.remote(known, folder, threads, item))


@lru_cache(maxsize=1)
def _unpickled(function: bytes) -> Callable[[Any], Any]:
    return pickle.loads(function)


def _call(function: bytes, item: Any) -> Any:
    return _unpickled(function)(item)


def _call_on_node(function: bytes, folder: str, threads: int, item: Any) -> Any:
    os.chdir(folder)
    settle(threads)
    return _call(function, item)


def _run(run: Run, cell: Cell, progress: Progress, workers: int) -> str | None:
    """Run a cell with processes for its parts; returns its error, or None."""
    try:
        with in_processes(possible_workers(cell, workers), cell.threads) as parallel:
            run(replace(cell, map=parallel) if workers > 1 else cell, progress)
    except StudyError as error:
        return f"{cell.name}: {error}" if isinstance(error, LostError) else str(error)
    return None


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


def _in_this_process(workers: int, run: Run, progress: Progress, cell: Cell, beside: int) -> Ended:
    """Cells one after the other, each with all processes for its parts."""
    future: Ended = Future()
    future.set_result(_run(run, cell, progress, workers))
    return future


@contextmanager
def _in_pool(workers: int, cells: int, run: Run, progress: Progress) -> Iterator[Submit]:
    """Cells in parallel processes; idle processes take parts of cells."""
    with ExitStack() as listening:

        def begin() -> Callable[[], None]:  # a killed process may have locked the queue of its pool
            news = get_context("spawn").SimpleQueue()
            listening.enter_context(_listening(news, progress))
            return partial(_report_to, news)

        with pool_of(min(workers, cells), begin=begin) as pool:
            yield lambda cell, beside: pool.submit(_run_in_worker, run, cell, max(1, workers // beside))


_news: Any = None  # queue of this worker process


def _report_to(news: Any) -> None:
    global _news
    _news = news


def _run_in_worker(run: Run, cell: Cell, workers: int) -> str | None:
    return _run(run, cell, _seldom(_news.put), workers)


def _run_on_node(run: Run, cell: Cell, news: Any, folder: str) -> str | None:
    os.chdir(folder)
    # A task that waits for a message would release its processors.
    return _run(run, cell, _seldom(news.put_nowait.remote), 1)


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
        task = ray.remote(_run_on_node)

        def submit(cell: Cell, beside: int) -> Ended:
            places = processors // (cell.threads * beside)
            if _gpus(cell):  # a cell that waits for its parts releases its processors, but not its GPU
                places = min(places, graphics // beside - 1)
            if places > 1:
                cell = replace(cell, map=partial(_mapped, places, partial(_to_cluster, cell.threads, _gpus(cell))))
            options = {"num_cpus": cell.threads, "num_gpus": _gpus(cell), "max_retries": RETRIES, "name": cell.name}
            return _result(ray, cell, task.options(**options).remote(run, cell, news.actor, os.getcwd()))

        with _listening(news, progress):
            yield submit
        news.shutdown()


def _result(ray: Any, cell: Cell, task: Any) -> Ended:
    """The result of a task, or its own error in place of Ray's."""
    future: Ended = Future()

    def ended(done: Future[str | None]) -> None:
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        elif isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error.cause, ray.exceptions.RayError):
            future.set_exception(error.cause)
        else:
            future.set_result(f"{cell.name}: its worker was lost again and again ({type(error).__name__})")

    task.future().add_done_callback(ended)
    return future


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster, or to one of this machine alone that ends with the context."""
    try:
        import ray
    except ImportError as error:
        raise InputError("executor: 'ray' is not installed: pip install 'mnemoscope[ray]'") from error
    host, _, port = (address or "").rpartition(":")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if host and port.isdigit() and "//" not in host:  # without a listener Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        alone = {} if address else {"include_dashboard": False}
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **alone)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"address: no Ray cluster answers at {address or 'this machine'} ({reason[0]})") from error
    try:
        yield ray
    finally:
        ray.shutdown()
