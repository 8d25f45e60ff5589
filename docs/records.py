"""The page of what a run folder holds: ``python docs/pages.py RECORDS``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

from printing import head, lines_of, table
from pydantic import BaseModel

from mnemoscope.report.records import declared_tables
from mnemoscope.report.schema import Result, Results
from mnemoscope.statistics import Estimate


def page() -> str:
    """The page."""
    return "\n".join(parts())


def parts() -> Iterator[str]:
    """Tables, then the keys of the results."""
    yield head("records")
    for name, declared in declared_tables().items():
        when = f" ({declared['if']})" if "if" in declared else ""
        yield f"## records/{name}.parquet: {declared['about']}{when}\n"
        yield lines_of(table(("column", "meaning"), ((key, tidy(text)) for key, text in declared["columns"].items())))
        yield f"\n{declared['note']}\n" if "note" in declared else ""
    yield "## results.json\n\nR is `{estimate, low, high, n}`: a number with its 95 % interval and what it counts.\n"
    for model in dict.fromkeys(models_in(Results)):
        yield f"### {model.__name__}\n\n{inspect.getdoc(model)}\n"
        yield lines_of(table(("key", "holds", ""), keys_of(model)))
        yield ""


def tidy(text: object) -> str:
    """Text that fits a cell of a table."""
    return str(text).replace("\n", " ").strip()


def models_in(annotation: Any) -> Iterator[type[Result]]:
    """A model, and all that are in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            if annotation not in typing.get_args(field.annotation):
                yield from models_in(field.annotation)
    else:
        for part in typing.get_args(annotation):
            yield from models_in(part)


def keys_of(model: type[Result]) -> Iterator[tuple[str, str, str]]:
    """(key, what it holds, its meaning) of every field."""
    for name, field in model.model_fields.items():
        yield f"`{field.alias or name}`", shown(field.annotation), tidy(field.description or "")
    for name, computed in model.model_computed_fields.items():
        yield f"`{name}`", shown(computed.return_type), tidy(computed.description or "")


def shown(annotation: Any) -> str:
    """A type, as a reader of JSON thinks of it."""
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Estimate:
        return "R"
    if kind is dict:
        return f"{{{shown(parts[0])}: {shown(parts[1])}}}"
    if kind is list:
        return f"[{shown(parts[0])}]"
    if kind is typing.Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if parts:
        optional = "; may lack" if type(None) in parts else ""
        return " or ".join(shown(part) for part in parts if part is not type(None)) + optional
    return str(annotation.__name__)
