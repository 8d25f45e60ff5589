"""The one way to read text and JSON: limits (of tables too), no repeated keys, and types, checked by pydantic.

Whatever is wrong with a file is one InputError that names it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from mnemoscope.runs.errors import InputError

Kind = TypeVar("Kind")
MOST_TEXT = 2**30  # bytes of a file of rows
MOST_JSON = 2**28  # of a file of facts; results of a study with many cells are a few MiB
MOST_DECODED = 2**31  # bytes of a table
MOST_CELLS = 2**26  # of a table, rows times columns: a few bytes may stand for any number of equal ones


def read_text(path: Path, what: str = "file", most: int = MOST_TEXT, encoding: str = "utf-8") -> str:
    """The text of a file, with the errors of ``read_bytes``; also where it is no text."""
    try:
        return read_bytes(path, what, most).decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: {path} cannot be read ({error})") from error


def read_bytes(path: Path, what: str = "file", most: int = MOST_TEXT) -> bytes:
    """The bytes of a regular file; InputError names it as ``what`` where it is none, too large, or not readable."""
    try:
        # A pipe would be waited for, a device has no end.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{what}: {path} is no regular file")
            if found.st_size > most:
                raise InputError(f"{what}: {path} has {found.st_size} bytes; at most {most} are read")
            return file.read()
    except OSError as error:
        raise InputError(f"{what}: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what}: {str(path)!r} is no path ({error})") from error


def bounded_table(path: Path, content: bytes | None = None) -> Any:
    """What to read a Parquet file from, itself or its bytes; InputError where it is too large once it is decoded."""
    from pyarrow import parquet

    file = parquet.ParquetFile(path if content is None else BytesIO(content))
    found, held = file.metadata, 0
    if found.num_rows * found.num_columns > MOST_CELLS:
        size = f"{found.num_rows} rows of {found.num_columns} columns"
        raise InputError(f"file: {path} has {size}; at most {MOST_CELLS} cells are read")
    parts = [found.row_group(n).column(c) for n in range(found.num_row_groups) for c in range(found.num_columns)]
    # One value may be all of it.
    if sum(part.num_values * part.total_uncompressed_size for part in parts) > MOST_DECODED:
        widest = max(part.total_uncompressed_size for part in parts)
        for batch in file.iter_batches(max(1, min(2**16, MOST_TEXT // (8 * widest)))):
            held += sum(getattr(column, "dictionary_decode", lambda c=column: c)().nbytes for column in batch.columns)
            if held > MOST_DECODED:
                raise InputError(f"file: {path} has more than {MOST_DECODED} bytes once it is decoded")
    return path if content is None else BytesIO(content)


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """The object in a JSON file, checked to be of a type: a TypedDict (more keys are allowed) or a generic.

    Raises:
        InputError: it cannot be read, or a field is missing or of another type; the file and the field are named.
    """
    return checked(parse_json(read_text(path, most=MOST_JSON), str(path)), kind, str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; InputError where it is none, repeats a key, or holds half a character."""
    try:
        found = json.loads(text, object_pairs_hook=_unrepeated)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair by itself is no character, and cannot be written
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise InputError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{where}: not JSON that can be read ({reason})") from error


def checked(value: Any, kind: Any, where: str) -> Any:
    """A value itself, once it is found to be of a type; see ``validated``."""
    validated(value, kind, where)
    return value


def validated(value: Any, kind: Any, where: str) -> Any:
    """What pydantic makes of a value as JSON, where true is no number, a number no text, and lists stand for tuples.

    Raises:
        InputError: of the first field at fault, its value and what is allowed, behind ``where``.
    """
    try:
        return _adapter(kind).validate_json(to_json(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        shown = repr(first["input"])
        has_said = first["type"] in ("missing", "value_error")
        got = "" if has_said else f" (got {shown if len(shown) <= 80 else shown[:77] + '...'})"
        message = f"{first['msg'].removeprefix('Value error, ')}{got}"
        raise InputError(": ".join(filter(None, (where, field, message)))) from error
    except (PydanticSerializationError, UnicodeError, RecursionError) as error:
        raise InputError(f"{where}: {value!r:.80} cannot be stored ({str(error).splitlines()[0]})") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found
