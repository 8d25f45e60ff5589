"""What the commands share: options in the groups of the help, results, progress, and errors of one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_opening = partial(typer.Option, rich_help_panel="How the model is opened")
_formatting = partial(typer.Option, rich_help_panel="How prompts are formatted")
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a causal model, or smollm2, or gemma3-270m.")
]
Dtype = Annotated[str, _opening(help="float32, bfloat16, float16 or auto.")]
DeviceMap = Annotated[str | None, _opening(help="Device: cuda or auto (needs accelerate); default: the CPU.")]
Parts = Annotated[str | None, _opening(help="blocks=..,attention=..,mlp=..,down=..: paths of its parts.")]
Force = Annotated[bool, _opening("--force", help="Accept what was fitted on another model of the same shape.")]
AsChat = Annotated[bool, _formatting("--chat", help="By the chat template of the tokenizer.")]
Reply = Annotated[str, _formatting(help="With --chat: how the reply begins; the model continues it.")]
Given = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an option of the task, as hops=2.")]
AllowCode = Annotated[
    list[str] | None,
    typer.Option(help="package.module:Class of a task of yours: its code is run. May be repeated; no file allows one."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


class _Commands(TyperGroup):
    """Prints errors that a user can mend as one line on stderr: exit 2 for input, 1 for a run that cannot go on."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        from mnemoscope.errors import InputError, StudyError

        try:
            return super().invoke(ctx)
        except (InputError, StudyError) as error:
            _fail(str(error), 2 if isinstance(error, InputError) else 1)
        except KeyboardInterrupt:
            _fail("stopped; run the same command again to go on", 130)
        except Exception as error:
            # Libraries wrap the system's error in their own, with its text.
            if os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error):
                _fail("disk: no space is left; finished stages are kept, so make room and run the command again", 2)
            if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError, FileNotFoundError)):
                _fail(f"path: {error.filename}: {error.strerror}", 2)
            raise


def _fail(message: str, code: int) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    name="mnemoscope",
    help="Is a language model remembering or thinking? Measure it, see which neurons separate the two, and steer it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def named_parts(layout: str | None) -> dict[str, str] | None:
    """The paths in ``--layout`` by name."""
    return dict(part.partition("=")[::2] for part in layout.split(",")) if layout else None


def options(given: list[str] | None) -> dict[str, Any]:
    """Options of a task, from ``name=value``; values are YAML."""
    import yaml

    from mnemoscope.errors import InputError

    pairs = [o.partition("=") for o in given or []]
    if any(not equals for _, equals, _ in pairs):
        raise InputError(f"--option: {given!r} is not of the form name=value")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def say(facts: dict[str, Any], as_json: bool, field: str) -> None:
    """Print facts as JSON, or one of them."""
    from mnemoscope.files import dumped

    typer.echo(dumped(facts) if as_json else facts[field])


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, str, float, float, str], None]]:
    """Show a progress bar per cell on a terminal, lines elsewhere, nothing when quiet."""
    if quiet or not sys.stderr.isatty():
        yield (lambda *_: None) if quiet else _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True)) as shown:
        bars: dict[str, Any] = {}

        def show(cell: str, stage: str, done: float, total: float, note: str) -> None:
            if cell not in bars:
                bars[cell] = shown.add_task(cell, total=1.0, note="")
            shown.update(bars[cell], description=f"{cell} {stage}", completed=done / max(total, 1e-9), note=note)

        yield show


class _Lines:
    """Prints one line on stderr for each tenth of a stage."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], int] = {}

    def __call__(self, cell: str, stage: str, done: float, total: float, note: str) -> None:
        tenth = int(10 * done / max(total, 1))
        if self.seen.get((cell, stage)) != tenth:  # a further attempt starts again at 0
            self.seen[cell, stage] = tenth
            typer.echo(f"{cell}  {stage:<10} {min(10 * tenth, 100):3d} %  {note}", err=True)
