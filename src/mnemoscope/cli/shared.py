"""What the commands share: options in the groups of the help, results, progress, and errors of one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mnemoscope.cli.ending import STOPPED, end, told
from mnemoscope.runs.telling import Progress, shown

_opening = partial(typer.Option, rich_help_panel="How the model is opened")
_formatting = partial(typer.Option, rich_help_panel="How prompts are formatted")
_A_MODEL = "Folder or hub id of a causal model, or smollm2, or gemma3-270m."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_A_MODEL)]
MaybeModel = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_A_MODEL)]
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
    """Reports every error that a user can mend in one line, wrong options included."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command from the arguments of the process."""
        try:
            for argument in (args and args[0]) or extra.get("args") or sys.argv[1:]:
                argument.encode()  # bytes that are no text would reach tokenizers and files as halves of characters
            code = super().main(*args, **extra | {"standalone_mode": False})
        except _USAGE as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message())
                sys.exit(2)
            end(_wrong_usage(error), 2)
        except Exception as error:
            line, code = told(error)
            if line is None:
                raise
            end(line, code)
        if code == 130:  # a KeyboardInterrupt
            end(STOPPED, code)
        sys.exit(code if isinstance(code, int) else 0)


# Of click, which some versions of typer hold a copy of.
_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _wrong_usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context else ""
    return error.format_message().rstrip(".") + where


app = typer.Typer(
    cls=_Commands,
    name="mnemoscope",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


def named_parts(layout: str | None) -> dict[str, str] | None:
    """The paths in ``--layout`` by name."""
    return dict(part.partition("=")[::2] for part in layout.split(",")) if layout else None


def options(given: list[str] | None) -> dict[str, Any]:
    """Options of a task, from ``name=value``; values are YAML."""
    from mnemoscope.runs.errors import InputError
    from mnemoscope.runs.yaml import parse_yaml

    pairs = [o.partition("=") for o in given or []]
    if any(not equals for _, equals, _ in pairs):
        raise InputError(f"--option: {given!r} is not of the form name=value")
    return {name: parse_yaml(value, f"--option {name}") for name, _, value in pairs}


def say(facts: dict[str, Any], as_json: bool, field: str) -> None:
    """Print facts as JSON, or one of them."""
    from mnemoscope.runs.files import dumped

    typer.echo(dumped(facts) if as_json else facts[field])


@contextmanager
def progress(quiet: bool, notes: Sequence[str] = (), shares: Mapping[str, float] | None = None) -> Iterator[Progress]:
    """Show notes once work begins, as all arguments are checked then, and its progress unless ``quiet``.

    ``shares``: of the whole time, by stage, of a run with one cell: then it is told how much is left.
    """
    waiting = list(notes)

    def begun(*what: Any) -> None:
        while waiting:
            typer.echo(waiting.pop(0), err=True)
        tell(*what)

    with shown(not quiet, shares) as tell:
        yield begun


def weights_note(model: str) -> str | None:
    """Note on a packaged model's weights, shown beside every number."""
    from mnemoscope.models import PACKAGED, QUANTIZED

    return QUANTIZED if model in PACKAGED else None


def open_model(model: str, dtype: str, layout: str | None, device_map: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer, by the options of the command line."""
    from mnemoscope.config import parse_model
    from mnemoscope.models import load_model
    from mnemoscope.runs.processes import quiet_library

    quiet_library()
    shape = parse_model({"folder": model, "dtype": dtype, "device_map": device_map, "layout": named_parts(layout)})
    if weights := weights_note(model):
        typer.echo(f"{model}: weights are {weights}", err=True)
    return load_model(model, dtype=shape.dtype, device_map=shape.device_map, layout=shape.layout)
