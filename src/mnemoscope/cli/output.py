"""The command line, and the output of its commands: results, progress, and errors of one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

app = typer.Typer(
    name="mnemoscope",
    help="Is a language model remembering or thinking? Measure it, see which neurons separate the two, and steer it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def say(facts: dict[str, Any], as_json: bool, field: str) -> None:
    """Print facts as JSON, or one of them."""
    from mnemoscope.files import dumped

    typer.echo(dumped(facts) if as_json else facts[field])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors that a user can mend as one line on stderr: exit 2 for input, 1 for a run that cannot go on."""
    from mnemoscope.errors import InputError, StudyError

    try:
        yield
    except (InputError, StudyError) as error:
        _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to go on", 130)
    except Exception as error:
        # Libraries wrap the system's error in their own, with its text.
        if os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error):
            _fail("disk: no space is left; finished stages are kept, run the same command again after making room", 2)
        if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError, FileNotFoundError)):
            _fail(f"path: {error.filename}: {error.strerror}", 2)
        raise


def _fail(message: str, code: int) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(code)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, str, float, float, str], None]]:
    """Show a progress bar per cell on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield bars
    else:
        yield _Lines()


class _Lines:
    """Prints one line on stderr for each tenth of a stage."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], int] = {}

    def __call__(self, cell: str, stage: str, done: float, total: float, note: str) -> None:
        tenth = int(10 * done / max(total, 1))
        if self.seen.get((cell, stage)) != tenth:  # a further attempt starts again at 0
            self.seen[cell, stage] = tenth
            typer.echo(f"{cell}  {stage:<10} {min(10 * tenth, 100):3d} %  {note}", err=True)


@contextmanager
def _bars() -> Iterator[Callable[[str, str, float, float, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def show(cell: str, stage: str, done: float, total: float, note: str) -> None:
            if cell not in bars:
                bars[cell] = progress.add_task(cell, total=1.0, note="")
            progress.update(bars[cell], description=f"{cell} {stage}", completed=done / max(total, 1e-9), note=note)

        yield show
