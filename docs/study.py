"""The page of every field of a study and every option of a task: ``python docs/pages.py STUDY``."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mnemoscope.config import StudyConfig, built_in_studies
from mnemoscope.tasks.registry import TASKS, task_class

HEAD = """# Fields of a study

A study is a YAML file: `mnemoscope run FILE.yaml`. What is left out has the default below; a field that does not exist
is refused with its name. `RUN/study.yaml` holds all of them as they were in that run: copy it, change `study` and what
you like, and run it into another folder. `--set a.b=c` replaces one. With the package come {studies}.

`docs/study.py` prints this page from the descriptions in the code.
"""
# What stands in a path for a name of the user's.
PLACES = {"cells": "NAME", "grids": "SITE"}


def page() -> str:
    """The page."""
    return "\n".join(parts())


def parts() -> Iterator[str]:
    """The study's sections, then the options of each task."""
    yield HEAD.format(studies=", ".join(f"`{name}`" for name in built_in_studies()))
    for path, model in sections("", StudyConfig):
        yield f"## {f'`{path}`' if path else 'The study'}\n\n{inspect.getdoc(model)}\n"
        yield "| field | default | meaning |\n|---|---|---|"
        for name, field in model.model_fields.items():
            yield f"| `{name}` | {default_of(field)} | {meaning_of(name, field)} |"
        yield ""
    yield "# Options of the tasks\n\n`options` of a cell, `--option NAME=VALUE` of `mnemoscope data` and `fit`.\n"
    for name, maker in {name: task_class(name) for name in TASKS}.items():
        yield f"## `{name}`\n\n{task_of(maker)}\n"


def sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and all that are in it, each with its path."""
    yield path, model
    for name, field in model.model_fields.items():
        inside = model_in(field.annotation)
        if inside:
            place = f".{PLACES[name]}" if name in PLACES else ""
            yield from sections(f"{path}.{name}{place}".lstrip("."), inside)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The one kind of model that an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := model_in(part))), None)


def default_of(field: Any) -> str:
    """The default as YAML would have it."""
    if field.default is PydanticUndefined:
        return "required"
    if model_in(field.annotation):
        return "none" if field.default is None else "see there"
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


def meaning_of(name: str, field: Any) -> str:
    """A field's description; a part of a study has a section instead."""
    inside = model_in(field.annotation)
    text = field.description or (inspect.getdoc(inside) or "").splitlines()[0] if inside else field.description
    return str(text or name).replace("|", "\\|").replace("\n", " ")


def task_of(maker: Any) -> str:
    """What a task is, and its options with their defaults."""
    said: dict[str, str] = {}
    for one in reversed(getattr(maker, "__mro__", (maker,))):
        said |= described(inspect.getdoc(one) or "")
    first = (inspect.getdoc(maker) or "").partition("\n\n")[0]
    rows = [f"{first}\n", "| option | default | meaning |", "|---|---|---|"]
    for name, parameter in inspect.signature(maker).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else f"`{json.dumps(parameter.default)}`"
        rows.append(f"| `{name}` | {default} | {said.get(name, '')} |")
    return "\n".join(rows).replace("``", "`")


def described(doc: str) -> dict[str, str]:
    """What a documentation says of each argument."""
    found = {}
    block = doc.partition("Args:\n")[2].partition("\n\n")[0]
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", block, flags=re.MULTILINE):
        found |= {name: " ".join(text.split()) for name in names.split(", ")}
    return found
