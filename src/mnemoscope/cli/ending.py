"""How a command ends: whatever a user can mend becomes one line on stderr and an exit code.

Exit codes: 2 for input, files and disks; 1 for a run that cannot go on; 130 where it was stopped (Ctrl-C). Nothing
heavy is imported here, so that a command can be stopped while the rest is.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOPPED = "stopped; run the same command again to go on"
FULL = "disk: no space is left; finished stages are kept, so make room and run the command again"
_stopped = False  # whether Ctrl-C was pressed
_ENDED = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def one_line() -> Iterator[None]:
    """End the process with one line for every error of ``told``, and where it is stopped, whatever it was doing."""

    def stop(*_: Any) -> None:
        global _stopped
        _stopped = True
        sys.unraisablehook = lambda _: None  # where Python cannot raise, as in a destructor, it would print instead
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    except BaseException as error:
        if not (_stopped or isinstance(error, KeyboardInterrupt)):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not (isinstance(error, SystemExit) and error.code == 130):  # told already
            show(STOPPED)
        os._exit(130)  # threads and exit handlers of libraries would wait, or print


def end(line: str, code: int) -> NoReturn:
    """Print one line and exit."""
    if _stopped:  # an import that is stopped may raise an error of its own
        line, code = STOPPED, 130
    show(line)
    sys.exit(code)


def show(line: str) -> None:
    """Print one line on stderr."""
    text = " ".join(f"error: {line}".split()).encode(errors="backslashreplace").decode()
    print(text, file=sys.stderr, flush=True)


def told(error: BaseException) -> tuple[str | None, int]:
    """The line and the exit code of an error; no line for what only we can mend."""
    from mnemoscope.runs.errors import InputError, StudyError

    if isinstance(error, InputError | StudyError):
        return str(error), 2 if isinstance(error, InputError) else 1
    if (isinstance(error, OSError) and error.errno in _ENDED) or _names_a_full_disk(error):
        return FULL, 2
    if isinstance(error, OSError) and error.errno is not None and error.errno != errno.EPIPE:
        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{'path: ' + where if where else 'system'}: {error.strerror}", 2
    if isinstance(error, MemoryError):
        return "memory: there is not enough for this; use fewer workers, shorter prompts or a smaller model", 1
    if isinstance(error, RecursionError):
        return "input: nested too deeply", 2
    if isinstance(error, UnicodeError):
        text = repr(getattr(error, "object", ""))
        return f"text: {text if len(text) <= 80 else text[:77] + '...'} is no text in UTF-8", 2
    return None, 1


def _names_a_full_disk(error: BaseException) -> bool:
    """Libraries wrap the system's error in their own, with its text."""
    return any(os.strerror(number) in str(error) for number in _ENDED)
