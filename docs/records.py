"""Print docs/RECORDS.md, what a run folder holds: ``python docs/records.py > docs/RECORDS.md``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mnemoscope.report.records import declared_tables
from mnemoscope.report.schema import Result, Results
from mnemoscope.statistics import Estimate

HEAD = Path(__file__).with_name("records.head.md").read_text()


def main() -> None:
    """Print the page."""
    print(HEAD)
    for name, table in declared_tables().items():
        when = f" ({table['if']})" if "if" in table else ""
        print(f"## records/{name}.parquet: {table['about']}{when}\n\n| column | meaning |\n|---|---|")
        for columns, meaning in table["columns"].items():
            print(f"| {columns} | {escaped(str(meaning))} |")
        print(f"\n{table['note']}\n" if "note" in table else "")
    print("## results.json\n\nR is `{estimate, low, high, n}`: a number with its 95 % interval and what it counts.\n")
    for model in dict.fromkeys(models_in(Results)):
        print(f"### {model.__name__}\n\n{inspect.getdoc(model)}\n\n| key | holds | |\n|---|---|---|")
        for key, kind, meaning in keys_of(model):
            print(f"| `{key}` | {kind} | {escaped(meaning)} |")
        print()


def escaped(text: str) -> str:
    """Text that fits a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ").strip()


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
        yield field.alias or name, shown(field.annotation), field.description or ""
    for name, computed in model.model_computed_fields.items():
        yield name, shown(computed.return_type), computed.description or ""


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


if __name__ == "__main__":
    main()
