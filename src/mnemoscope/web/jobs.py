"""Long work behind a request: it tells how far it is, and can be cancelled."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from mnemoscope.bench import CancelledError
from mnemoscope.errors import InputError
from mnemoscope.web.busy import BusyError

KEPT = 64  # jobs that are remembered after their end
RUNNING = 16  # that are worked on or wait for it, at most
WORKERS = 2  # threads; each keeps memory of its own

# (tell how much is done, still wanted?) -> result
Work = Callable[[Callable[[float], None], Callable[[], bool]], Any]


@dataclass
class Job:
    """A piece of work.

    Attributes:
        state: ``running``, ``done``, ``failed`` or ``cancelled``.
        share: of the work that is done, 0 to 1.
        result, error: what came of it.
    """

    name: str
    state: str = "running"
    share: float = 0.0
    result: Any = None
    error: str = ""
    wanted: bool = field(default=True, repr=False)
    future: Future[None] | None = field(default=None, repr=False)


class Jobs:
    """Work in a few threads, in the order in which it came."""

    def __init__(self) -> None:
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="job")
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = Lock()

    def start(self, work: Work) -> Job:
        """Start work.

        Raises:
            BusyError: too much is being worked on already.
        """
        job = Job(secrets.token_urlsafe(12))
        with self._lock:
            if sum(other.state == "running" and other.wanted for other in self._jobs.values()) >= RUNNING:
                raise BusyError(f"job: {RUNNING} are being worked on already; wait for one or cancel it")
            self._jobs[job.name] = job
            for name in [n for n, other in self._jobs.items() if other.state != "running"][:-KEPT]:
                del self._jobs[name]
        job.future = self._workers.submit(self._run, job, work)
        return job

    def _run(self, job: Job, work: Work) -> None:
        def tell(share: float) -> None:
            job.share = share

        try:
            job.result = work(tell, lambda: job.wanted)
            job.share, job.state = 1.0, "done"
        except CancelledError:
            job.state = "cancelled"
        except InputError as error:
            job.error, job.state = str(error), "failed"
        except Exception as error:  # whoever waits for the job is told; the server goes on
            job.error, job.state = f"{type(error).__name__}: {error}", "failed"

    def get(self, name: str) -> Job | None:
        """A job by its name, or None."""
        return self._jobs.get(name)

    def cancel(self, name: str) -> Job | None:
        """Say that a job is not wanted any more; one that has begun ends at its next step."""
        job = self._jobs.get(name)
        if job is not None:
            job.wanted = False
            if job.future and job.future.cancel():
                job.state = "cancelled"
        return job

    def stop(self) -> None:
        """Cancel all of them, and take no more."""
        for job in self._jobs.values():
            job.wanted = False
        self._workers.shutdown(wait=False, cancel_futures=True)
