"""Strict YAML and JSON: one meaning for each value, limits, and types that are checked with the field named."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
import pandas as pd
import pytest
import yaml
from typing_extensions import TypedDict

from mnemoscope.runs import strict
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import bounded_table, checked, parse_json
from mnemoscope.runs.yaml import dump_yaml, parse_yaml
from mnemoscope.tasks.tables import read_rows
from mnemoscope.watch.curve import Curve

VALUES = {"no": "no", "yes": "yes", "True": True, "1:30": "1:30", "1e-3": 0.001, "0o17": 15, "0x1F": 31, "010": 10}
VALUES |= {"-.inf": -math.inf, "2026-11-27": "2026-11-27", "~": None, "": None, "[&a 1, *a]": [1, 1]}
VALUES |= {"{<<: {a: 1, b: 1}, b: 2}": {"a": 1, "b": 2}}


def test_yaml_has_the_values_of_its_core_schema() -> None:
    assert {text: parse_yaml(text, "here") for text in VALUES} == VALUES


TEXTS = [
    *"~ =y",
    "1e5",
    "0o17",
    "no",
    "On",
    "1:30",
    "2024-01-01",
    "<<",
    ".nan",
    "1.",
    "",
    "true",
    "0-1",
    "a\x85",
    "é: #",
]


@pytest.mark.parametrize("value", [*TEXTS, 1e-5, 1e300, -math.inf, 10**30, None, [], {}])
def test_what_is_written_comes_back_also_by_version_1_1(value: Any) -> None:
    written = {"a": value, str(value): [value, {"b": value}]}
    assert parse_yaml(dump_yaml(written), "here") == yaml.safe_load(dump_yaml(written)) == written


def test_what_the_package_brings_is_read_as_by_another_reader() -> None:
    package = files("mnemoscope")
    texts = [path.read_text() for path in (package / "config" / "studies").iterdir()]
    texts += [(package / "report" / name).read_text() for name in ("words.yaml", "records.yaml")]
    assert len(texts) > 5
    for text in texts:
        assert parse_yaml(text, "here") == yaml.safe_load(text)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", 'here, line 2: not YAML (found duplicate key "a"'),
        ("a: &a [*a]", "here, line 1: not YAML (an alias inside what it stands for"),
        ("[" * 65 + "]" * 65, "here: not YAML that can be read (nested more than 64 deep)"),
        (BOMB, "here, line 15: not YAML (more than 50000 values, with aliases written out)"),
        (MERGES, "not YAML (more than 50000 values, with aliases written out)"),
        ("!!int x", "not YAML that can be read (invalid literal"),
        ("!!python/object/apply:os.system [touch pwned]", "could not determine a constructor"),
        ("a: " + "9" * 5000, "not YAML that can be read (Exceeds the limit"),
        ('"\\ud800"', "surrogates not allowed"),
        (" " * 2**20 + "1", "1048577 characters; at most 1048576 are read"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_yaml(text, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "here: not JSON that can be read (key 'a' is there twice)"),
        ('"\\ud800"', "surrogates not allowed"),
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
        ({}, "here: seed: Field required"),
        ({"seed": True}, "here: seed: Input should be a valid integer (got True)"),
        ([], "here: Input should be an object (got [])"),
        ({"seed": 1, "inner": {}}, "here: inner: Input should be a valid array (got {})"),
        ({"seed": 1, "inner": [{"name": "c", "rate": 1}]}, "here: inner.0.name: Input should be 'a' or 'b' (got 'c')"),
        ({"seed": 1, "inner": [{"name": "a", "rate": "1"}]}, "here: inner.0.rate: Input should be a valid number"),
        ({"seed": 1, "by_name": {"x": 1}}, "here: by_name.x: Input should be a valid boolean (got 1)"),
        ({"seed": 1, "by_name": object()}, "cannot be stored"),
    ],
)
def test_a_field_of_another_type_is_named(value: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        checked(value, Outer, "here")
    assert message in str(error.value)
    good = {"seed": 1, "inner": [{"name": "a", "rate": None}], "by_name": {"x": True}, "of a later version": 1}
    assert checked(good, Outer, "here") is good


def test_a_small_file_that_stands_for_a_billion_cells_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.parquet"
    pd.DataFrame({"q": np.zeros(2**20, np.int8)}).to_parquet(path)
    assert path.stat().st_size < 2**20 / 100
    monkeypatch.setattr(strict, "MOST_CELLS", 2**20 - 1)
    for read in (lambda: bounded_table(path), lambda: read_rows(str(path), ["q"], print), lambda: Curve.open(path)):
        with pytest.raises(InputError, match="rows of 1 columns; at most 1048575 cells are read"):
            read()
