"""What is streamed is what a list would hold: texts seen before, examples, rows of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnemoscope import seen
from mnemoscope.seen import Seen
from mnemoscope.stages.common import TableWriter
from mnemoscope.tasks import base as tasks_base
from mnemoscope.tasks import build_task, draw, draws

COLUMNS = {"name": pa.string(), "value": pa.float64()}


def test_seen_is_a_set_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits to be sorted in, and merged with another."""
    monkeypatch.setattr(seen, "FRESH", 7)
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
    assert next(stream).split == "fit"
    assert asked == [50], "no more is drawn than is needed"
    assert len({(e.item, e.prompt) for e in stream}) == 199
    assert set(asked) == {50}


@pytest.mark.parametrize("size", [3, 11])
def test_rows_written_as_they_come_are_those_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(TableWriter, "ROWS", 10)
    table = pd.DataFrame({"name": [f"n{i}" for i in range(40)], "value": np.arange(40) / 7})

    def written(name: str, size: int) -> bytes:
        with TableWriter(tmp_path / name, COLUMNS) as writer:
            for start in range(0, 40, size):
                writer.add(table.iloc[start : start + size])
        return (tmp_path / name).read_bytes()

    assert written("some.parquet", size) == written("whole.parquet", 40)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "some.parquet"), table.astype({"name": "str"}))
    assert pq.ParquetFile(tmp_path / "some.parquet").num_row_groups == 4
    with TableWriter(tmp_path / "none.parquet", COLUMNS):
        pass
    assert pd.read_parquet(tmp_path / "none.parquet").columns.tolist() == ["name", "value"]


@pytest.mark.parametrize("fail", [lambda writer: writer.add(pd.DataFrame({"name": ["a"]})), lambda writer: 1 / 0])
def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path, fail: Callable[[TableWriter], object]) -> None:
    def attempt() -> None:
        with TableWriter(tmp_path / "t.parquet", COLUMNS) as writer:
            writer.add(pd.DataFrame({"name": ["a"], "value": [1.0]}))
            fail(writer)

    with pytest.raises((KeyError, ZeroDivisionError)):
        attempt()
    assert not list(tmp_path.iterdir())
