"""The lock of a run's folder: one run at a time works in it, and one that is refused leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mnemoscope.runs.digests import check_closed
from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.runs.files import check_replaceable, delete, making


@contextmanager
def locked(folder: Path, worth: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of a closed folder of a run, which is made if missing; InputError where another run has it.

    Where the context raises before the folder holds anything ``worth`` keeping, what it changed there goes. Kept is
    what a StudyError leaves, which reports on what was done, and whatever a user stops.
    """
    path = folder / ".lock"
    with making(folder):
        check_replaceable(path)
        check_closed(folder)
        known, lock = path.exists(), FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise InputError(f"out: {folder} is in use by another run") from error
        kept = worth()
        before = {} if kept else _content(folder, None if known else path)
        try:
            yield
        except Exception as error:
            if not (kept or isinstance(error, StudyError) or worth()):
                _restore(folder, before)
            raise
        finally:
            if list(folder.iterdir()) == [path]:
                path.unlink()
            lock.release()


def _content(folder: Path, new: Path | None = None) -> dict[Path, bytes]:
    """What is in a folder, and in folders in it, but for what is ``new``; files with their bytes."""
    there = {*folder.glob("*"), *folder.glob("*/*")} - {new}
    return {path: path.read_bytes() if path.is_file() else b"" for path in there}


def _restore(folder: Path, before: dict[Path, bytes]) -> None:
    now = _content(folder)
    for path in sorted(set(now) - set(before), reverse=True):  # what is in a folder before it
        delete(path)
    for path, content in before.items():
        if now.get(path, content) != content:
            path.write_bytes(content)
