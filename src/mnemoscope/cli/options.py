"""Options that several commands share, in the groups of the help."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_MODEL, _PROMPTS = "How the model is opened", "How prompts are formatted"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a causal model, or smollm2.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", rich_help_panel=_MODEL)]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Device: cuda or auto (needs accelerate); default: the CPU.", rich_help_panel=_MODEL),
]
Parts = Annotated[
    str | None,
    typer.Option(help="blocks=..,attention=..,mlp=..,down=..: paths of its parts.", rich_help_panel=_MODEL),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Accept what was fitted on another model of the same shape.", rich_help_panel=_MODEL),
]
AsChat = Annotated[
    bool, typer.Option("--chat", help="By the chat template of the tokenizer.", rich_help_panel=_PROMPTS)
]
Reply = Annotated[
    str, typer.Option(help="With --chat: how the reply begins; the model continues it.", rich_help_panel=_PROMPTS)
]
Given = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an option of the task, as hops=2.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


def prompting(chat: bool, reply: str) -> Any:
    """The format of prompts, from ``--chat`` and ``--reply``."""
    from mnemoscope.behaviour import Prompting

    return Prompting(chat, reply=reply)


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
