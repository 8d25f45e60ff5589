"""Rows of the files that people have: JSONL, CSV, Parquet, JSON, and data sets of the ``datasets`` library."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.runs.strict import bounded_table, parse_json, read_bytes, read_text

Row = Mapping[str, Any]
Made = TypeVar("Made")
ENDINGS = (".jsonl", ".csv", ".parquet", ".json")
SHOWN, LONGEST = 3, 500  # faults of a file, and rows that have one, at most; characters of each


def is_file_of_rows(name: str) -> bool:
    """Whether a name ends as a file of rows does, in upper or lower case."""
    return Path(name).suffix.lower() in ENDINGS


def columns_of(source: str) -> list[str]:
    """The fields of a file's first row; [] where that cannot be read, as reading all of it will say."""
    try:
        place, raw = next(_rows_of_file(Path(source), "file"), ("", None))
        return list(parse_json(raw, place) if isinstance(raw, str) else raw or ())
    except (OSError, ValueError, TypeError, RuntimeError):
        return []


def read_rows(
    source: str, fields: Sequence[str], read: Callable[[str, Row], Made], part: str = "train", option: str = "file"
) -> list[Made]:
    """What ``read`` makes of the rows of a file or data set.

    Args:
        source: a file that ends in one of ``ENDINGS``, or an id of the ``datasets`` library, where it is installed.
        fields: that every row must have.
        read: is called with the words that name a row in an error message, and the row.
        part: split of a data set.
        option: that names the source.

    Raises InputError where it cannot be read, a row lacks a field, or ``read`` does: all such rows are named at once.
    """
    path, where, found = Path(source), f"{option}: {source}", list[Made]()
    faults, places = defaultdict[str, list[str]](list), 0
    try:
        for place, raw in _rows_of_file(path, where) if is_file_of_rows(source) else _rows_of_data_set(source, part):
            here, places = f"{where}, {place}", places + 1
            try:
                row = parse_json(raw, here) if path.suffix.lower() == ".jsonl" else raw
                if not isinstance(row, Mapping):
                    raise InputError(f"{here}: {type(row).__name__} where an object is wanted")
                for field in (field for field in fields if field not in row):
                    there = ", ".join(map(str, row)) or "none"
                    raise InputError(f"{here}: there is no field {field!r}; there are {there}")
                found.append(read(here, row))
            except InputError as error:
                faults[f"{str(error).removeprefix(f'{here}: '):.{LONGEST}}"].append(place)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:  # of pandas, Arrow and datasets
        raise InputError(f"{where} cannot be read ({str(error).splitlines()[0]})") from error
    if not places:
        raise InputError(f"{where} has no row")
    if faults:
        more = {why: f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "" for why, rows in faults.items()}
        shown = [f"{', '.join(rows[:SHOWN])}{more[why]}: {why}" for why, rows in faults.items()][:SHOWN]
        count = sum(map(len, faults.values()))
        raise InputError(f"{where}, {'; '.join(shown)}{f'; in all {count} of {places}' if count > 1 else ''}")
    return found


def _rows_of_file(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file by their places; those of JSONL as text."""
    ending, rows = path.suffix.lower(), list[Any]()
    if ending == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(bounded_table(path, read_bytes(path))).to_pylist()
    else:
        text = read_text(path, where.partition(":")[0], encoding="utf-8-sig")
    if ending == ".jsonl":
        yield from ((f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    elif ending == ".json":
        rows = parse_json(text, where)
        if not isinstance(rows, list):
            raise InputError(
                f"{where} holds {type(rows).__name__}; a list of objects is wanted, or one a line in .jsonl"
            )
    elif ending == ".csv":
        import pandas as pd

        # Without a header, for pandas renames what is twice in it; a row with more fields than the first is an error.
        names, *found = pd.read_csv(StringIO(text), header=None, dtype=str, na_filter=False).to_numpy().tolist()
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{where}, line 1: {twice!r} names two columns; a name stands for one")
        rows = [dict(zip(names, row, strict=True)) for row in found]
    yield from ((f"row {n}", row) for n, row in enumerate(rows, 1))


def _rows_of_data_set(source: str, part: str) -> Iterator[tuple[str, Any]]:
    allowed = f"file: {source!r} is not a file that ends in {', '.join(ENDINGS)}"
    if Path(source).exists():
        raise InputError(allowed)
    if find_spec("datasets") is None:
        raise InputError(f"{allowed}; as a data set it needs datasets: pip install datasets")
    from datasets import load_dataset

    with refusing(f"{allowed}; as a data set it cannot be read"):
        yield from ((f"row {n}", row) for n, row in enumerate(load_dataset(source, split=part), 1))


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
