"""Arguments and options that several commands take, in the groups of the help; checked before anything is opened."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

import typer

from mnemoscope.runs.errors import InputError

_A_MODEL = "Folder or hub id of a causal model, or smollm2, or gemma3-270m."
_CODE = "package.module:Class: import and run this task of yours; run folders cannot request it. May be repeated."
_TASK = "A task, see `mnemoscope tasks`, or a file of your own: JSONL, CSV, Parquet or JSON."
_SOURCE = "A run, a cell of one, or the file of a vector or a detector."
_MAYBE = f"{_SOURCE} Default: what ships for smollm2."


def checked(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A callback that checks every value given for an option, so that a mistake costs no import of torch."""

    def callback(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            check(one)
        return value

    return callback


def by(place: str) -> Callable[[Any], Any]:
    """A callback that calls the function at a place, which is imported only then."""
    return checked(lambda value: resolve_name(place)(value))


def named_parts(layout: str | None) -> dict[str, str] | None:
    """The paths in ``--layout`` by name."""
    return dict(part.partition("=")[::2] for part in layout.split(",")) if layout else None


def _layout(given: str) -> None:
    resolve_name("mnemoscope.config:parse_model")({"folder": ".", "layout": named_parts(given)})


def _source(path: Path) -> None:
    alone = (path, *(path / name for name in ("reader.safetensors", "adapter_model.safetensors")))
    if not any(one.is_file() and one.with_suffix(".json").is_file() for one in alone):
        resolve_name("mnemoscope.runs.digests:chosen_cells")(path)


def _out(folder: Path) -> None:
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if folder == Path() or not above.is_dir():
        raise InputError(f"out: {above} is {'no name' if above.is_dir() else 'a file'}; name a folder for the run")


def _threads(number: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(number)  # torch reads it when it is imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(number)


def _prompt(text: str) -> None:
    if not text:
        raise InputError("prompt: '' is empty; give each prompt as one argument, in quotes")


_opening = partial(typer.Option, rich_help_panel="How the model is opened")
_formatting = partial(typer.Option, rich_help_panel="How prompts are formatted")
of_model, of_run = by("mnemoscope.models:check_named"), by("mnemoscope.runs.digests:check_run")
of_source, of_out, of_toward = checked(_source), checked(_out), by("mnemoscope.runs.toward:Toward.of")

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_A_MODEL, callback=of_model)]
MaybeModel = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_A_MODEL, callback=of_model)]
Prompts = Annotated[
    list[str], typer.Argument(metavar="PROMPT...", help="To answer or read.", callback=checked(_prompt))
]
Source = Annotated[Path, typer.Option("--from", help=_SOURCE, callback=of_source)]
MaybeSource = Annotated[Path | None, typer.Option("--from", help=_MAYBE, callback=of_source)]
Task = Annotated[str, typer.Option(help=_TASK, callback=by("mnemoscope.tasks:described_task"))]
TaskOptions = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an option of the task, as hops=2.")]
AllowCode = Annotated[list[str] | None, typer.Option(help=_CODE)]
_THREADS = "Processors to use; default: all there are."
_DEVICE = "Device: cuda or auto (needs accelerate); default: the CPU."
_PARTS = "blocks=..,attention=..,mlp=..,down=..: paths of its parts."
_FORCE = "Accept what was fitted on another model of the same shape."
Threads = Annotated[int | None, _opening(min=1, help=_THREADS, callback=checked(_threads))]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


@dataclass(frozen=True)
class How:
    """Options that commands share."""

    chat: Annotated[bool, _formatting("--chat", help="By the chat template of the tokenizer.")] = False
    reply: Annotated[str, _formatting(help="With --chat: how the reply begins; the model continues it.")] = ""
    dtype: Annotated[Literal["float32", "bfloat16", "float16", "auto"], _opening(help="Of the weights.")] = "float32"
    device_map: Annotated[str | None, _opening(help=_DEVICE)] = None
    threads: Threads = None
    layout: Annotated[str | None, _opening(help=_PARTS, callback=checked(_layout))] = None
    force: Annotated[bool, _opening("--force", help=_FORCE)] = False
    as_json: AsJson = False


def taking(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the fields of ``How``, but for some, as options behind its own, which gets a ``How`` first."""
    options = [one.name for one in fields(How) if one.name not in left_out]

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def taken(**given: Any) -> None:
            command(How(**{name: given.pop(name) for name in options}), **given)

        of_both = (inspect.signature(one, eval_str=True).parameters for one in (command, How))
        (_, *own), shared = (list(parameters.values()) for parameters in of_both)
        every = [*own, *(one for one in shared if one.name in options)]
        taken.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        taken.__annotations__ = {one.name: one.annotation for one in every}
        return taken

    return with_options
