"""The application, and what its commands share. Whatever a user can mend becomes one line on stderr and an exit code.

Exit codes: 2 for input, files and disks; 1 for a run that cannot go on; 130 where it was stopped (Ctrl-C).
"""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import mnemoscope as ms
from mnemoscope.cli.given import How, named_parts
from mnemoscope.runs.errors import STOPPED

FULL = "disk: no space is left; finished stages are kept, so make room and run the command again"
MEMORY = "memory: there is not enough for this; use fewer workers, shorter prompts or a smaller model"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Of click, which some versions of typer hold a copy of.
_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Commands(TyperGroup):
    """Reports every error that a user can mend in one line, wrong options included."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command from the arguments of the process."""
        try:
            for argument in (args and args[0]) or extra.get("args") or sys.argv[1:]:
                argument.encode()  # bytes that are no text would reach tokenizers and files as halves of characters
            code = super().main(*args, **extra | {"standalone_mode": False})
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message())  # type: ignore[attr-defined]
                sys.exit(2)
            line, code = told(error)
            if line is None:
                raise
            end(line, code)
        if code == 130:  # what typer makes of a KeyboardInterrupt
            end(STOPPED, code)
        sys.exit(code if isinstance(code, int) else 0)


def end(line: str, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    text = " ".join(f"error: {line}".split()).encode(errors="backslashreplace").decode()
    print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def told(error: BaseException) -> tuple[str | None, int]:
    """The line and the exit code of an error; no line for what only we can mend."""
    if isinstance(error, _USAGE):
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context else ""
        return error.format_message().rstrip(".") + where, 2
    if isinstance(error, ms.InputError | ms.StudyError):
        return str(error), 2 if isinstance(error, ms.InputError) else 1
    # Libraries wrap the system's error in their own, with its text.
    if getattr(error, "errno", None) in _NO_SPACE or any(os.strerror(number) in str(error) for number in _NO_SPACE):
        return FULL, 2
    if isinstance(error, OSError) and error.errno is not None and error.errno != errno.EPIPE:
        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{'path: ' + where if where else 'system'}: {error.strerror}", 2
    if isinstance(error, MemoryError):
        return MEMORY, 1
    if isinstance(error, RecursionError):
        return "input: nested too deeply", 2
    if isinstance(error, UnicodeError):
        text = repr(getattr(error, "object", ""))
        return f"text: {text if len(text) <= 80 else text[:77] + '...'} is no text in UTF-8", 2
    return None, 1


app = typer.Typer(cls=_Commands, name="mnemoscope", no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mnemoscope {version('mnemoscope')}")
        raise typer.Exit


@app.callback()
def _whole(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")] = False,
) -> None:
    """Is a language model remembering or thinking? Measure it, see which neurons separate the two, and steer it."""


def say(as_json: bool, text: object, **facts: Any) -> None:
    """Print facts as one line of JSON, undefined numbers as null, or a text."""
    from mnemoscope.runs.files import plain

    texts = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in facts.items()}
    typer.echo(json.dumps(plain(texts), allow_nan=False) if as_json else text)


def formatted(how: How) -> Any:
    """The format of prompts, by the options of the command line; InputError for a reply begun without a chat."""
    if how.reply and not how.chat:
        why = "is a part of a chat; add --chat, or write it at the end of the prompt"
        raise ms.InputError(f"reply: {how.reply!r} {why}")
    return ms.Prompting(how.chat, reply=how.reply)


def options(given: list[str] | None, name: str = "--option") -> dict[str, Any]:
    """Options of a task, from ``name=value``; values are YAML."""
    from mnemoscope.runs.yaml import parse_yaml

    pairs = [o.partition("=") for o in given or []]
    if any(not equals for _, equals, _ in pairs):
        raise ms.InputError(f"{name}: {given!r} is not of the form name=value")
    return {field: parse_yaml(value, f"{name} {field}") for field, _, value in pairs}


def weights_note(model: str) -> str | None:
    """Note on a packaged model's weights, shown beside every number."""
    from mnemoscope.models import PACKAGED, QUANTIZED

    return QUANTIZED if model in PACKAGED else None


def open_model(model: str, how: How) -> tuple[Any, Any]:
    """Model and tokenizer, by the options of the command line."""
    return ms.load_model(model, **opening(model, how))


def opening(model: str, how: How) -> dict[str, Any]:
    """How a model is opened, as ``load_model`` takes it."""
    from mnemoscope.config import parse_model
    from mnemoscope.runs.processes import quiet_library

    quiet_library()
    given = {"dtype": how.dtype, "device_map": how.device_map, "layout": named_parts(how.layout)}
    shape = parse_model({"folder": model, **given})
    if weights := weights_note(model):
        typer.echo(f"{model}: weights are {weights}", err=True)
    return {name: getattr(shape, name) for name in given}
