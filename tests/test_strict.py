"""Strict YAML and JSON: one meaning for each value, limits, and types that are checked with the field named."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import bounded_table, checked, dump_yaml, parse_json, parse_yaml
from mnemoscope.tasks.tables import read_rows
from mnemoscope.watch.curve import Curve


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("True", True),
        ("1:30", "1:30"),
        ("1e-3", 0.001),
        ("1_000", "1_000"),
        ("0o17", 15),
        ("0x1F", 31),
        ("010", 10),
        ("-.inf", -math.inf),
        ("2026-11-27", "2026-11-27"),
        ("~", None),
        ("", None),
        ("[&a 1, *a]", [1, 1]),
        ("{<<: {a: 1, b: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)
def test_yaml_has_the_values_of_its_core_schema(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value


@pytest.mark.parametrize("value", [*"~ =", "1e5", "0o17", "no", "1:30", "2024-01-01", "<<", ".nan", "1.", "", "true"])
def test_texts_come_back_as_texts(value: str) -> None:
    assert parse_yaml(dump_yaml({"a": value, value: [value]}), "here") == {"a": value, value: [value]}


def test_what_the_package_brings_is_read_as_before() -> None:
    package = files("mnemoscope")
    texts = [path.read_text() for path in (package / "studies").iterdir() if path.name.endswith(".yaml")]
    texts += [(package / "report" / name).read_text() for name in ("words.yaml", "records.yaml")]
    for text in texts:
        assert parse_yaml(text, "here") == yaml.safe_load(text)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "here, line 2: not YAML (key 'a' twice)"),
        ("a: &a [*a]", "here, line 1: not YAML (an alias inside what it stands for)"),
        ("[" * 100, "here, line 1: not YAML (nested more than 64 deep)"),
        (BOMB, "here, line 14: not YAML (more than 50000 values, with aliases written out)"),
        ("!!int x", "not YAML that can be read (invalid literal"),
        ("a: " + "9" * 5000, "not YAML that can be read (Exceeds the limit"),
        ('"\\ud800"', "half of a character"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_yaml(text, "here")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "here: not JSON that can be read (key 'a' is there twice)"),
        ('"\\ud800"', "half of a character"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
        ('{"a":\n}', "here: not JSON (Expecting value at line 2, column 1)"),
    ],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_json(text, "here")
    assert message in str(error.value)
    assert parse_json('"\\ud83d\\ude00"', "here") == "\N{GRINNING FACE}"


class Inner(TypedDict):
    name: Literal["a", "b"]
    rate: float | None


class Outer(TypedDict):
    seed: int
    inner: NotRequired[list[Inner]]
    by_name: NotRequired[dict[str, bool]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "here: seed is missing; a whole number is wanted"),
        ({"seed": True}, "here: seed is True; a whole number is wanted"),
        ([], "here is []; an object is wanted"),
        ({"seed": 1, "inner": {}}, "here: inner is {}; a list is wanted"),
        (
            {"seed": 1, "inner": [{"name": "a", "rate": 1}, {"name": "c", "rate": 1}]},
            "here: inner.1.name is 'c'; one of",
        ),
        ({"seed": 1, "inner": [{"name": "a", "rate": "1"}]}, "here: inner.0.rate is '1'; a number or null is wanted"),
        ({"seed": 1, "by_name": {"x": 1}}, "here: by_name.x is 1; true or false is wanted"),
    ],
)
def test_a_field_of_another_type_is_named(value: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        checked(value, Outer, "here")
    assert str(error.value).startswith(message)
    good = {"seed": 1, "inner": [{"name": "a", "rate": None}], "by_name": {"x": True}, "of a later version": 1}
    assert checked(good, Outer, "here") is good


def test_a_small_file_that_stands_for_a_billion_cells_is_not_read(tmp_path: Path) -> None:
    path, batch = tmp_path / "bomb.parquet", pa.table({"q": pa.array(np.zeros(2**20, np.int8))})
    with parquet.ParquetWriter(path, batch.schema, use_dictionary=True, compression="zstd") as writer:
        for _ in range(257):
            writer.write_table(batch)
    assert path.stat().st_size < 2**21
    for read in (lambda: bounded_table(path), lambda: read_rows(str(path), ["q"]), lambda: Curve.open(path)):
        with pytest.raises(InputError, match="rows of 1 columns; at most 268435456 cells are read"):
            read()
