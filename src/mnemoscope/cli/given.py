"""Arguments and options that several commands take, in the groups of the help."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

_opening = partial(typer.Option, rich_help_panel="How the model is opened")
_formatting = partial(typer.Option, rich_help_panel="How prompts are formatted")
_A_MODEL = "Folder or hub id of a causal model, or smollm2, or gemma3-270m."
_CODE = "package.module:Class of a task of yours: its code is run. May be repeated; no file allows one."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_A_MODEL)]
MaybeModel = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_A_MODEL)]
Prompts = Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts to answer or to read.")]
Source = Annotated[Path, typer.Option("--from", help="A run, a cell of one, or the file of a vector or a detector.")]
Task = Annotated[str, typer.Option(help="A task, see `mnemoscope tasks`, or a JSONL file of your own.")]
TaskOptions = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an option of the task, as hops=2.")]
AllowCode = Annotated[list[str] | None, typer.Option(help=_CODE)]
Dtype = Annotated[str, _opening(help="float32, bfloat16, float16 or auto.")]
DeviceMap = Annotated[str | None, _opening(help="Device: cuda or auto (needs accelerate); default: the CPU.")]
Parts = Annotated[str | None, _opening(help="blocks=..,attention=..,mlp=..,down=..: paths of its parts.")]
Force = Annotated[bool, _opening("--force", help="Accept what was fitted on another model of the same shape.")]
AsChat = Annotated[bool, _formatting("--chat", help="By the chat template of the tokenizer.")]
Reply = Annotated[str, _formatting(help="With --chat: how the reply begins; the model continues it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
