"""Rows of the files that people have: JSONL, CSV, Parquet, and data sets of the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import bounded_table, parse_json, read_bytes, read_text

Row = Mapping[str, Any]
ENDINGS = (".jsonl", ".csv", ".parquet")


def read_rows(source: str, fields: Sequence[str], part: str = "train", option: str = "file") -> list[tuple[str, Row]]:
    """Rows of a file or data set that have all ``fields``, each with the words that name it in an error message.

    Args:
        source: a file that ends in one of ``ENDINGS``, or an id of the ``datasets`` library, where it is installed.
        part: split of a data set.
        option: that names the source.

    Raises InputError where it cannot be read, or a row lacks a field.
    """
    path, where, rows = Path(source), f"{option}: {source}", list[tuple[str, Row]]()
    try:
        for place, row in _rows_of_file(path, where) if path.suffix in ENDINGS else _rows_of_data_set(source, part):
            if not isinstance(row, Mapping):
                raise InputError(f"{where}, {place}: {type(row).__name__} where an object is wanted")
            for field in fields:
                if field not in row:
                    there = ", ".join(map(str, row)) or "none"
                    raise InputError(f"{where}, {place}: there is no field {field!r}; there are {there}")
            rows.append((f"{where}, {place}", row))
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:  # of pandas, Arrow and datasets
        raise InputError(f"{where} cannot be read ({str(error).splitlines()[0]})") from error
    if not rows:
        raise InputError(f"{where} has no row")
    return rows


def _rows_of_file(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path, where.partition(":")[0], encoding="utf-8-sig").split("\n"), 1)
        yield from ((f"line {n}", parse_json(line, f"{where}, line {n}")) for n, line in lines if line.strip())
        return
    if path.suffix == ".csv":
        import pandas as pd

        text = read_text(path, where.partition(":")[0], encoding="utf-8-sig")
        # Without a header, for pandas renames what is twice in it; a row with more fields than the first is an error.
        names, *found = pd.read_csv(StringIO(text), header=None, dtype=str, na_filter=False).to_numpy().tolist()
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{where}, line 1: {twice!r} names two columns; a name stands for one")
        rows = [dict(zip(names, row, strict=True)) for row in found]
    else:
        from pyarrow import parquet

        rows = parquet.read_table(bounded_table(path, read_bytes(path))).to_pylist()
    yield from ((f"row {n}", row) for n, row in enumerate(rows, 1))


def _rows_of_data_set(source: str, part: str) -> Iterator[tuple[str, Any]]:
    allowed = f"file: {source!r} is not a file that ends in {', '.join(ENDINGS)}"
    if Path(source).exists():
        raise InputError(allowed)
    if find_spec("datasets") is None:
        raise InputError(f"{allowed}; as a data set it needs datasets: pip install datasets")
    from datasets import load_dataset

    try:
        yield from ((f"row {n}", row) for n, row in enumerate(load_dataset(source, split=part), 1))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{allowed}; as a data set it cannot be read ({str(error).splitlines()[0]})") from error


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


def names_of(where: str, row: Row, *fields: str) -> list[str]:
    """The first text of each field, for the name of an item; InputError where one has the sign between its parts."""
    found = [texts_of(where, row, field)[0] for field in fields]
    for field, text in zip(fields, found, strict=True):
        if "|" in text:
            raise InputError(f"{where}: {field} is {text!r}; | is not allowed in it")
    return found


def check_apart(where: str, **answers: str) -> None:
    """Raises InputError where one of two answers begins the other, so that no first token decides between them."""
    (first, one), (second, other) = answers.items()
    if one.startswith(other) or other.startswith(one):
        raise InputError(f"{where}: {first} is {one!r} and {second} {other!r}; neither may begin the other")
