"""Rows of the files that people have: JSONL, JSON, CSV, Parquet, and data sets of the ``datasets`` library."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import bounded_table, parse_json, read_bytes, read_text

Row = Mapping[str, Any]
ENDINGS = (".jsonl", ".csv", ".parquet")


def read_rows(source: str, fields: Sequence[str], part: str = "train") -> list[tuple[str, Row]]:
    """Rows of a file or data set that have all ``fields``, each with the words that name it in an error message.

    Args:
        source: a file that ends in one of ``ENDINGS``, or an id of the ``datasets`` library, where it is installed.
        part: split of a data set.

    Raises InputError where it cannot be read, or a row lacks a field.
    """
    path = Path(source)
    rows = _rows_of_file(path) if path.suffix in ENDINGS else _rows_of_data_set(source, part)
    checked = []
    for number, row in rows:
        where = f"file: {source}, {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: {type(row).__name__} where an object is wanted")
        for field in fields:
            if field not in row:
                raise InputError(
                    f"{where}: there is no field {field!r}; there are {', '.join(map(str, row)) or 'none'}"
                )
        checked.append((where, row))
    if not checked:
        raise InputError(f"file: {source} has no row")
    return checked


def _rows_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(bounded_table(path, read_bytes(path))).to_pylist()
            yield from ((f"row {n}", row) for n, row in enumerate(rows, 1))
        elif path.suffix == ".csv":
            yield from ((f"row {n}", row) for n, row in enumerate(csv_rows(path, "file"), 1))
        else:
            lines = enumerate(read_text(path).split("\n"), 1)
            yield from ((f"line {n}", parse_json(line, f"file: {path}, line {n}")) for n, line in lines if line.strip())
    except InputError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # Arrow's errors are of these kinds
        raise InputError(f"file: {path} cannot be read ({str(error).splitlines()[0]})") from error


def csv_rows(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file; InputError where a name stands twice in its header, or a row has more fields than names."""
    try:
        table = csv.DictReader(StringIO(read_text(path, what, encoding="utf-8-sig"), newline=""))
        names = list(table.fieldnames or ())
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{what}: {path}, line 1: {twice!r} names two columns; a name stands for one")
        for number, row in enumerate(table, 1):
            if None in row:
                raise InputError(
                    f"{what}: {path}, row {number}: {len(names) + len(row[None])} fields for {len(names)} names; a "
                    "text with a comma stands in double quotes"
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{what}: {path} cannot be read ({error})") from error


def _rows_of_data_set(source: str, part: str) -> Iterator[tuple[str, Any]]:
    allowed = f"a file that ends in {', '.join(ENDINGS)}"
    if Path(source).exists():
        raise InputError(f"file: {source} is not {allowed}")
    if find_spec("datasets") is None:
        raise InputError(f"file: {source!r} is not {allowed}; as a data set it needs datasets: pip install datasets")
    from datasets import load_dataset

    try:
        yield from ((f"row {n}", row) for n, row in enumerate(load_dataset(source, split=part), 1))
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"file: {source!r} is not {allowed}; as a data set it cannot be read ({why})") from error


def texts_of(where: str, row: Row, field: str) -> list[str]:
    """The texts of a field, without spaces around them: a text, or several ways to say one thing.

    Raises InputError where there is none, or something else.
    """
    value = row[field]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(text, str) for text in found):
        raise InputError(f"{where}: {field} is {value!r}; a text or a list of texts is wanted")
    texts = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    if not texts:
        raise InputError(f"{where}: {field} is empty")
    return texts


def check_apart(where: str, **answers: str) -> None:
    """Raises InputError where one of two answers begins the other, so that no first token decides between them."""
    (first, one), (second, other) = answers.items()
    if one.startswith(other) or other.startswith(one):
        raise InputError(f"{where}: {first} is {one!r} and {second} {other!r}; neither may begin the other")
