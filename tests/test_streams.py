"""What is streamed is what a list would hold: texts seen before, examples, rows of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mnemoscope.runs import files
from mnemoscope.runs.files import Seen
from mnemoscope.study.stages.common import table_writer
from mnemoscope.tasks import base as tasks_base
from mnemoscope.tasks import build_task, draw, draws

COLUMNS = {"name": pa.string(), "value": pa.float64()}
GOOD = pd.DataFrame({"name": ["a"], "value": [1.0]})


def test_seen_is_a_set_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FRESH", 7)
    rng = np.random.default_rng(0)
    parts: list[tuple[Seen, set[tuple[str, str]]]] = []
    for _ in range(2):
        ours, theirs = Seen(), set[tuple[str, str]]()
        for a, b in rng.integers(12, size=(300, 2)):
            text = (str(a), str(b))
            assert ours.add(*text) == (text not in theirs)
            theirs.add(text)
            assert len(ours) == len(theirs)
        parts.append((ours, theirs))
    (one, first), (other, second) = parts
    one.update(other)
    assert len(one) == len(first | second)
    assert not any(one.add(*text) for text in first | second)
    assert one.add("x1", "23")
    assert one.add("x12", "3"), "where a part ends counts"


def test_examples_are_drawn_one_by_one_as_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task("inference", {"memorized_names": 24, "free_names": 24, "statements": 3, "questions": 3}, 0)
    together = draw(task, np.random.default_rng(0), 200, "conflict", "fit")
    assert len({(e.item, e.prompt) for e in together}) == len(together) == 200
    assert {e.split for e in together} == {"fit"}
    asked, examples = [], type(task).examples
    monkeypatch.setattr(type(task), "examples", lambda *args: [asked.append(args[2]), examples(*args)][1])
    monkeypatch.setattr(tasks_base, "MOST_AT_ONCE", 50)
    stream = draws(task, np.random.default_rng(0), 200, "conflict", "fit")
    first = next(stream)
    assert asked == [50], "no more is drawn than is needed"
    streamed = [first, *stream]
    assert set(asked) == {50}
    assert streamed == draw(task, np.random.default_rng(0), 200, "conflict", "fit")
    assert len({(e.item, e.prompt) for e in streamed}) == 200


def test_one_example_of_a_split_is_found_whatever_the_seed() -> None:
    task = build_task("addition", {"digits": 2, "stored": 80}, 0)
    found = [draw(task, np.random.default_rng(seed), 1, "memory", "tune") for seed in range(200)]
    assert {len(one) for one in found} == {1}


def test_rows_written_as_they_come_are_those_of_the_whole(tmp_path: Path) -> None:
    table = pd.DataFrame({"name": [f"n{i}" for i in range(40)], "value": np.arange(40) / 7})
    with table_writer(tmp_path / "t.parquet", COLUMNS) as add:
        for start in range(0, 40, 11):
            add(table.iloc[start : start + 11])
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table.astype({"name": "str"}))

    with table_writer(tmp_path / "none.parquet", COLUMNS):
        pass
    assert pd.read_parquet(tmp_path / "none.parquet").columns.tolist() == ["name", "value"]


@pytest.mark.parametrize("fail", [lambda add: add(pd.DataFrame({"name": ["a"]})), lambda add: add(GOOD) or 1 / 0])
def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path, fail: Callable[[Any], object]) -> None:
    with pytest.raises((KeyError, ZeroDivisionError)), table_writer(tmp_path / "t.parquet", COLUMNS) as add:
        fail(add)
    assert not list(tmp_path.iterdir())
