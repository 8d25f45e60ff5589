"""Digests of a run's files, and the copies of data that it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemoscope.config import parse_study
from mnemoscope.face.recipe import fitting_study
from mnemoscope.runs.digests import digests_of, facts_digest, inside, intact, read_marker, rewriting, write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.study.cells import cells_of
from mnemoscope.study.stages.common import cell_task, keep_data, with_kept_data


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "one.json").write_text("{}")
    write_marker(tmp_path, "one", [tmp_path / "records" / "one.json"], {"hash": "0", "commit": None})
    return tmp_path


def edited(change: Callable[[dict[str, Any]], object], sealed: bool) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        found = json.loads(path.read_text())
        change(found)
        if sealed:
            found["digest"] = facts_digest({name: value for name, value in found.items() if name != "digest"})
        path.write_text(json.dumps(found))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(lambda m: m.update(hash="1"), False), r"one\.json is damaged \(its digest differs\)"),
        (edited(lambda m: m["files"].clear(), False), r"one\.json is damaged \(its digest differs\)"),
        (edited(lambda m: m.pop("files"), True), r"one\.json is damaged"),
        (edited(lambda m: m.update(digest=None), False), r"one\.json is damaged"),
        (edited(lambda m: m["files"].update({"../secret": "0"}), True), "names a file outside its folder"),
        (edited(lambda m: m["files"].update({"/etc/passwd": "0"}), True), "names a file outside its folder"),
        (edited(lambda m: m["files"].update({"records/one.json": 1}), True), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: path.write_text("[" * 100_000), "is damaged"),
    ],
)
def test_a_damaged_marker_is_named(cell: Path, edit: Callable[[Path], object], message: str) -> None:
    assert intact(cell / "records" / "one.json").is_file()
    edit(cell / "stages" / "one.json")
    with pytest.raises(InputError, match=message):
        intact(cell / "records" / "one.json")


def test_a_rewriting_that_fails_leaves_finished_what_was(cell: Path) -> None:
    one = cell / "records" / "one.json"

    def fails() -> None:
        with rewriting(cell, [one]):
            assert not (cell / "stages" / "one.json").exists()
            one.write_text('{"a": 1}')
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        fails()
    assert intact(one) == one
    assert read_marker(cell / "stages" / "one.json")["hash"] == "0"
    beside = cell / "records" / "beside.json"
    beside.write_text("{}")
    write_marker(cell, "one", [one, beside])
    beside.write_text('{"damaged": 1}')
    with rewriting(cell, [one]):
        one.write_text('{"a": 2}')
    assert intact(one) == one
    with pytest.raises(InputError, match="beside"):
        intact(beside)


def test_a_file_that_changed_is_missing_or_unknown_is_named(cell: Path) -> None:
    one, other = cell / "records" / "one.json", cell / "records" / "other.json"
    other.write_text("{}")
    with pytest.raises(InputError, match=r"other\.json: this file is named by no finished stage"):
        intact(other)
    one.write_text("{ }")
    with pytest.raises(InputError, match=r"one\.json: is damaged \(its checksum differs\)"):
        intact(one)
    one.unlink()
    with pytest.raises(InputError, match=r"one\.json: this file is missing"):
        intact(one)
    one.symlink_to(cell.parent / "elsewhere")
    (cell.parent / "elsewhere").write_text("{}")
    with pytest.raises(InputError, match=r"one\.json: is a link that leads out of its folder"):
        intact(one)
    assert list(digests_of(cell)) == ["records/one.json"]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/etc/passwd", "a\\b", "a\0b"])
def test_a_name_that_is_a_path_is_refused(cell: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no name of a file in it"):
        inside(cell, name)


def test_a_run_keeps_the_data_of_its_task_and_opens_without_the_file(tmp_path: Path) -> None:
    """Whoever opens a run of a stranger opens its own copy, not a file elsewhere that its study names."""
    row = {"item": "a", "group": "g", "memorized": " x", "generalized": " y", "prompt": "p"}
    mine, table = tmp_path / "my data (1).jsonl", tmp_path / "mine.csv"
    lines = [json.dumps(row | {"item": f"{n}", "group": f"{n}", "prompt": f"p {n}"}) for n in range(8)]
    mine.write_text("\n".join(lines))
    table.write_text("relation,subject,value\n" + "\n".join(f"capital,Country{n},City{n}" for n in range(9)))
    config = fitting_study({"folder": "smollm2"}, mine, {}).model_dump()
    assert list(config["cells"]) == ["my-data-1-"]
    config["cells"]["facts"] = {"task": "facts", "options": {"table": str(table)}, "model": {"folder": "m"}}
    cell, other = cells_of(parse_study(config), tmp_path / "run")
    before = cell_task(cell)
    assert keep_data(cell) == [cell.folder / "data" / "file.jsonl"]
    (copy,) = keep_data(other)
    mine.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        cell_task(cell)
    again = cell_task(with_kept_data(cell))
    assert again.examples_read == before.examples_read  # type: ignore[attr-defined]
    assert with_kept_data(other).config.options["table"] == str(copy) == str(other.folder / "data" / "table.csv")
    assert copy.read_bytes() == table.read_bytes()
