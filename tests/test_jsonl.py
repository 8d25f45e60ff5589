"""Tasks from JSONL files: what is read, how groups are dealt, and what is refused with its line."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mnemoscope.face.recipe import fitting_study
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import KINDS, SPLITS, Task, build_task, draw, named_task
from mnemoscope.tasks.jsonl import JsonlTask, write_jsonl
from mnemoscope.tasks.qa import QATask
from test_tasks import BOTH, made, rng


def test_jsonl_reads_back_what_was_written(tmp_path: Path) -> None:
    task = made("inference")
    examples = [e for kind in KINDS for e in task.examples(rng(), 20, kind)]
    examples.append(replace(examples[0], prompt="one line\u2028to JSON, two\x85to Python"))
    path = tmp_path / "mine.jsonl"
    path.write_text(write_jsonl(examples), "utf-8-sig")  # as some editors mark it
    assert JsonlTask(file=str(path)).examples_read == examples


def jsonl_task(path: Path, rows: list[dict[str, str]]) -> Task:
    path.write_text("\n".join(map(json.dumps, rows)))
    return build_task("jsonl", {"file": str(path)}, 0)


@pytest.mark.parametrize(
    ("row", "documents"),
    [
        ({"prompt": "The code is B. The code is"}, True),  # a text says its answer
        ({"prompt": "12+34=", "bare": "34"}, True),
        ({"prompt": "12+34="}, False),  # a sum does not
    ],
)
def test_reports_of_texts_speak_of_context_and_of_sums_of_working_out(
    row: dict[str, str], documents: bool, tmp_path: Path
) -> None:
    rows = [{"item": "i", "memorized": " a", "generalized": " b"} | row]
    assert jsonl_task(tmp_path / "mine.jsonl", rows).documents is documents


def test_jsonl_deals_groups_and_a_split_of_one_line_is_that_of_its_group(tmp_path: Path) -> None:
    words = itertools.product(range(40), ("what", "which"))
    rows = [{"item": f"i{n}", "prompt": f"{word} {n} ?", "group": f"g{n % 8}"} | BOTH for n, word in words]
    task = jsonl_task(tmp_path / "mine.jsonl", rows)
    found = {split: draw(task, rng(), 100, "conflict", split) for split in SPLITS}
    assert {split: len({e.group for e in es}) for split, es in found.items()} == {"fit": 4, "tune": 2, "test": 2}
    rows = [
        {"item": "i", "prompt": f"p{n}", "group": "g"} | BOTH | ({"split": "test"} if n == 2 else {}) for n in (1, 2)
    ]
    task = jsonl_task(tmp_path / "some.jsonl", rows)
    assert {example.split for example in task.examples(rng(), 9, "conflict")} == {"test"}


def test_jsonl_rephrases_conflicts_within_a_family_and_knows_what_was_asked(tmp_path: Path) -> None:
    names = ["told 0", "told 1", "told 2", "asked 0", "asked 1", "alone 0"]
    rows = [{"item": "i", "prompt": name, "family": name.split()[0]} | BOTH for name in names]
    rows[0]["bare"] = "only this"
    # A question without a conflict may be about the same item; it is no phrasing of it.
    rows += [{"item": "i", "prompt": f"bare {n}", "answer": " a"} for n in range(9)]
    task = jsonl_task(tmp_path / "mine.jsonl", rows)
    by_prompt = {e.prompt: e for e in task.examples(rng(), 100, "conflict")}
    assert sorted(by_prompt) == sorted(names)
    for prompt, example in by_prompt.items():
        others = {task.rephrase(example, rng(seed)).prompt for seed in range(40)}
        alike = {p for p, e in by_prompt.items() if e.family == example.family} - {prompt}
        assert others == (alike or set(names) - {prompt})
    first, second = by_prompt["told 0"], by_prompt["told 1"]
    assert task.without_context(first) == replace(first, prompt="only this")
    assert task.without_context(second) is None
    assert task.prompted(first, "memorized").prompt.endswith("\ntold 0")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 2: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[1]", "line 2: list where an object is wanted"),
        ({"memorised": " a"}, "line 2: field 'memorised' is unknown; known are item, prompt, memorized"),
        ({"prompt": None}, "line 2: field 'prompt' is missing"),
        ({"generalized": " a"}, "line 2: memorized, generalized: both are ' a'"),
        ({"memorized": 3}, "line 2: memorized is 3; text is wanted"),
        ({"split": "train"}, "line 2: split: 'train' is not one of fit, tune, test"),
        ({"memorized": " a\n"}, "line 2: memorized is ' a\\n'; an answer ends with a word, and 'boundary' says what"),
        (
            {"item": "j", "group": "h"},
            "line 2: prompt 'p' has group 'h' here and group 'g' in line 1; what is asked twice belongs",
        ),
        (
            {"generalized": " c"},
            "item 'i' has answers (' a', ' c') here and answers (' a', ' b') in line 1; give it an item",
        ),
        (
            {"item": "j", "split": "test", "group": "g"},
            "line 2: group 'g' has split 'test' here and split 'fit' in line 1; all examples of a group",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, second: Any, message: str) -> None:
    good = {"item": "i", "prompt": "p", "group": "g", "split": "fit"} | BOTH
    line = second if isinstance(second, str) else json.dumps(good | second)
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(good)}\n{line}")
    with pytest.raises(InputError, match=re.escape(message)):
        build_task("jsonl", {"file": str(tmp_path / "bad.jsonl")}, 0)


def test_a_file_without_conflicts_or_without_being_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no conflict"):
        jsonl_task(tmp_path / "none.jsonl", [{"item": "i", "prompt": "p", "answer": " a"}])
    with pytest.raises(InputError, match="cannot be read"):
        build_task("jsonl", {"file": str(tmp_path / "absent.jsonl")}, 0)


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    good = [json.dumps({"item": f"i{n}", "prompt": f"p{n}"} | BOTH) for n in range(8)]
    lines = [*good, "{", json.dumps({"itm": "x"}), *(json.dumps({"prompt": "p"} | BOTH) for _ in range(5))]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        build_task("jsonl", {"file": str(tmp_path / "bad.jsonl")}, 0)
    told = str(error.value)
    assert told.startswith(f"file: {tmp_path}/bad.jsonl, line 9: not JSON")
    assert "; line 10: field 'itm' is unknown; known are item, prompt" in told
    assert "; did you mean item?; line 11, line 12, line 13 and 2 more: field 'item' is missing" in told
    assert told.endswith("; in all 7 of 15")
    assert "\n" not in told


ROWS = [
    {"item": f"i{n // 2}", "prompt": f"{n}, then?", "memorized": " a", "generalized": " b", "bare": f"{n}?"}
    for n in range(8)
] + [{"item": "i9", "prompt": "alone?", "answer": " c", "group": "g"}]


@pytest.mark.parametrize("ending", ["csv", "CSV", "parquet", "json"])
def test_tables_with_the_columns_of_jsonl_are_the_same_task(ending: str, tmp_path: Path) -> None:
    """As pandas writes them, numbers of rows and all; cells without a value are none."""
    table, path = pd.DataFrame(ROWS), tmp_path / f"mine.{ending}"
    if ending == "parquet":
        table.set_index("item", drop=False).rename_axis(None).to_parquet(path)
    elif ending == "json":
        table.to_json(path, orient="records")
    else:
        table.to_csv(path)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    ours, theirs = (named_task(path, {}) for path in (path, tmp_path / "mine.jsonl"))
    assert isinstance(ours, JsonlTask)
    assert isinstance(theirs, JsonlTask)
    assert ours.examples_read == theirs.examples_read
    assert ours.without_context(ours.examples_read[0]) == theirs.without_context(theirs.examples_read[0])
    (cell,) = fitting_study({"folder": "x"}, path, {"seed": 3}).cells.values()
    assert (cell.task, cell.options) == ("jsonl", {"file": str(path), "seed": 3})


@pytest.mark.parametrize(
    ("passage", "said", "true"),
    [("context", "context_answer", "memory_answer"), ("passage", "generalized", "memorized")],
)
def test_questions_with_passages_need_no_name_of_a_task(passage: str, said: str, true: str, tmp_path: Path) -> None:
    rows = [{"question": f"Who is {n}?", passage: f"It is Ann{n}.", said: f"Ann{n}", true: f"Bob{n}"} for n in range(8)]
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    task = named_task(tmp_path / "mine.csv", {})
    example = draw(task, rng(), 1, "conflict", "fit")[0]
    assert isinstance(task, QATask)
    assert (example.memorized or "").startswith(" Bob")
    assert f"It is{example.generalized}." in example.prompt
    (cell,) = fitting_study({"folder": "x"}, tmp_path / "mine.csv", {}).cells.values()
    named = {"context": passage, "context_answer": said, "memory_answer": true}
    assert (cell.task, cell.options) == ("qa", {"file": str(tmp_path / "mine.csv")} | named)


def test_a_json_file_holds_a_list_of_objects(tmp_path: Path) -> None:
    for text, message in (
        ('{"item": 1}', "holds dict; a list of objects is wanted"),
        ("[1]", "row 1: int where an obj"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=message):
            named_task(tmp_path / "bad.json", {})
