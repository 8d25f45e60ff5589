"""What several commands take, and what it means."""

from __future__ import annotations

from typing import Annotated, Any

import typer

AsChat = Annotated[bool, typer.Option("--chat", help="Put prompts by the chat template of the tokenizer.")]
Reply = Annotated[str, typer.Option(help="With --chat: how the reply begins; the model goes on from there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="Where it goes: cuda or auto (needs accelerate); default: the CPU.")
]
Given = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an option of the task, as hops=2.")]
Parts = Annotated[str | None, typer.Option(help="blocks=..,attention=..,mlp=..,down=..: parts of a model.")]


def named_parts(layout: str | None) -> dict[str, str] | None:
    return dict(part.partition("=")[::2] for part in layout.split(",")) if layout else None


def options(given: list[str] | None) -> dict[str, Any]:
    """Options of a task, from ``name=value`` each; values are YAML."""
    import yaml

    from mnemoscope.errors import InputError

    pairs = [o.partition("=") for o in given or []]
    if any(not equals for _, equals, _ in pairs):
        raise InputError(f"--option: {given!r} is not of the form name=value")
    return {name: yaml.safe_load(value) for name, _, value in pairs}
