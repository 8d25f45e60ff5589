"""Mistakes that a person makes: each is one line that says what to do, soon, as nothing heavy is imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mnemoscope as ms
from test_tasks import BOTH

ROW = {"item": "i", "prompt": "p"}
GOOD = [{"item": f"i{n}", "prompt": f"{word} {n}?"} | BOTH for n in range(8) for word in ("what", "which")]
QA = {"question": "Who?", "context": "It is Ann.", "context_answer": "Ann", "memory_answer": "Anna"}
FILES: dict[str, Any] = {
    "mine.jsonl": GOOD,
    "family.jsonl": [ROW | BOTH | {"famliy": "f"}],
    "equal.jsonl": [ROW | {"memorized": " a", "generalized": " a"}],
    "one.jsonl": [ROW | {"memorized": " a"}],
    "other.jsonl": [ROW | BOTH, {"item": "i", "prompt": "q", "memorized": " a", "generalized": " z"}],
    "space.jsonl": [ROW | {"memorized": " a ", "generalized": " b"}],
    "bare.jsonl": [ROW | {"answer": " a"}],
    "split.jsonl": [ROW | BOTH | {"split": "train"}],
    "twice.jsonl": [ROW | BOTH, {"item": "j", "prompt": "p"} | BOTH],
    "unnamed.jsonl": [{"prompt": f"p{n}"} | BOTH for n in range(9)],
    "swallowed.json": json.dumps([QA]),
    "object.json": json.dumps({"rows": GOOD}),
    "pretty.jsonl": json.dumps(GOOD, indent=1),
    "columns.csv": "item,prompt,prompt\n1,a,b\n",
    "empty.csv": "",
    "mine.xlsx": "x",
}
TASK, OUT = ("--task", "mine.jsonl"), ("-o", "out")
STEER = ("steer", "model", "--from", "run", "hello", "--toward")
MISTAKES: dict[tuple[str, ...], str] = {
    ("chek",): "No such command 'chek'",
    ("check", "smolm2", *TASK): "did you mean smollm2?",
    ("check", "./modle", *TASK): "the folder ./modle does not exist; did you mean model?",
    ("check", "mine.jsonl", *TASK): "mine.jsonl is a file; give the folder that holds it",
    ("check", "run", *TASK): "the folder run has no config.json; give one that transformers can open",
    ("check", "model"): "Missing option '--task'",
    ("check", "model", *TASK, "--dtype", "fp16"): "'fp16' is not one of 'float32', 'bfloat16', 'float16', 'auto'",
    ("check", "model", *TASK, "--layout", "blocks=h"): "layout.attention: Field required",
    ("check", "model", *TASK, "--reply", "Sure:"): "add --chat",
    ("check", "model", "--task", "facs"): "did you mean facts?",
    ("check", "model", "--task", "mien.jsonl"): "mien.jsonl does not exist; did you mean mine.jsonl?",
    ("check", "model", "--task", "mine.xlsx"): "files (.jsonl, .csv, .parquet, .json), or package.module:Class",
    ("check", "model", "--task", "my_tasks"): "or package.module:Class",
    ("check", "model", "--task", "my_tasks:Mine"): "'my_tasks:Mine' cannot be imported (No module named 'my_tasks')",
    ("check", "model", *TASK, "--option", "seed"): "not of the form name=value",
    (
        "check",
        "model",
        *TASK,
        "--option",
        "boundry=.",
    ): "has no such option; it has file, boundary; did you mean boundary",
    ("check", "model", "--task", "family.jsonl"): "did you mean family?",
    ("check", "model", "--task", "equal.jsonl"): "a conflict needs two answers that differ",
    ("check", "model", "--task", "one.jsonl"): "a conflict needs both",
    ("check", "model", "--task", "other.jsonl"): "give it an item of its own",
    ("check", "model", "--task", "space.jsonl"): "an answer ends with a word",
    ("check", "model", "--task", "bare.jsonl"): "has no conflict, no line with 'memorized' and 'generalized'",
    ("check", "model", "--task", "split.jsonl"): "split: 'train' is not one of fit, tune, test",
    ("check", "model", "--task", "twice.jsonl"): "what is asked twice belongs to one group",
    ("check", "model", "--task", "unnamed.jsonl"): "line 1, line 2, line 3 and 6 more: field 'item' is missing",
    ("check", "model", "--task", "swallowed.json"): "neither may begin the other",
    ("check", "model", "--task", "object.json"): "a list of objects is wanted, or one a line in .jsonl",
    ("check", "model", "--task", "pretty.jsonl"): "not JSON",
    ("check", "model", "--task", "columns.csv"): "'prompt' names two columns; a name stands for one",
    ("check", "model", "--task", "empty.csv"): "empty.csv cannot be read",
    ("check", "model", "--task", "latin.csv"): "latin.csv cannot be read ('utf-8' codec",
    ("fit", "model", *TASK): "Missing option '-o' / '--out'",
    ("fit", "model", *TASK, "-o", ""): "name a folder for the run",
    ("fit", "model", *TASK, "-o", "mine.jsonl/run"): "out: mine.jsonl is a file; name a folder for the run",
    ("fit", "model", *TASK, *OUT, "--budget", "4"): "No such option: --budget",
    ("fit", "model", *TASK, *OUT, "--settings", "3"): "settings: 3 is less than the",
    ("fit", "model", *TASK, *OUT, "--positions", "everywhere"): "'everywhere' is not one of 'decision', 'all'",
    ("fit", "model", *TASK, *OUT, "--lost", "8"): "Invalid value for '--lost'",
    ("steer", "model", "hello", "--from", "run"): "Missing option '--toward'",
    (*STEER, "contxt"): "did you mean context?",
    (*STEER, "context", "--gate", "50"): "Invalid value for '--gate'",
    (*STEER, "context", "--alpha", "-1"): "Invalid value for '--alpha'",
    (*STEER, "context", "--lever", "adaptor"): "'shift', 'low-rank', 'adapter'",
    (*STEER, "context", ""): "prompt: '' is empty; give each prompt as one argument, in quotes",
    ("detect", "model", "hello", "--from", "runs"): "from: runs does not exist",
    ("detect", "model", "hello", "--from", "mine.jsonl"): "is neither a vector, a detector, nor a run",
    ("arena", "model", *TASK, *OUT, "--method", "nmdd"): "did you mean nmd?",
    ("arena", "model", *TASK, *OUT, "--size", "conflicts"): "--size: ['conflicts'] is not of the form name=value",
    ("arena", "model", *TASK, *OUT, "--size", "conflicts=2"): "arena: conflicts: Input should be greater than",
    ("export", "run", "--to", "onnx", *OUT): "'onnx' is not one of 'gguf', 'checkpoint'",
    ("report", "mine.jsonl"): "RUN: mine.jsonl is not a run folder",
    ("serve", "model"): "RUN: model is not a run folder",
    ("serve", "--port", "80000"): "Invalid value for '--port'",
    ("emergence", "model", *TASK, *OUT, "--split", "dev"): "'dev' is not one of 'fit', 'tune', 'test'",
    ("watch", "model"): "RUN: model has no table of a training",
    ("data", "addition", "-n", "2000000000", *OUT): "Invalid value for '-n'",
    ("run", "quickstrat"): "study: 'quickstrat' is neither a file nor one of",
}
EACH = """
import json, sys
from typer.testing import CliRunner
from mnemoscope.cli import app
for arguments in json.load(sys.stdin):
    done = CliRunner().invoke(app, arguments)
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    print(json.dumps([done.exit_code, done.stdout, done.stderr, heavy, repr(done.exception)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a person has there."""
    here = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        rows = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        (here / name).write_text(rows)
    (here / "latin.csv").write_bytes("item,prompt\n1,caf\xe9\n".encode("latin-1"))
    for place, name in (("model", "config.json"), ("run/records", "chosen.json")):
        (here / place).mkdir(parents=True)
        (here / place / name).write_text("{}")
    return here


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[tuple[str, ...], Any]:
    """What the command line says of each mistake, all in one process."""
    before = sorted(folder.rglob("*"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MNEMOSCOPE_CACHE": str(folder), "COLUMNS": "200"}
    environment["PYTHONPATH"] = str(Path(ms.__file__).parents[1])
    command, asked = [sys.executable, "-c", EACH], json.dumps(list(MISTAKES))
    done = subprocess.run(
        command, cwd=folder, env=environment, input=asked, capture_output=True, text=True, check=False
    )
    assert sorted(folder.rglob("*")) == before, "nothing is left behind"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(MISTAKES, lines, strict=True))


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_that_says_what_to_do(
    arguments: tuple[str, ...], told: dict[tuple[str, ...], Any]
) -> None:
    code, stdout, stderr, heavy, error = told[arguments]
    assert (code, stdout, stderr.count("\n"), heavy) == (2, "", 1, []), (stderr, error)
    assert MISTAKES[arguments] in stderr


def test_there_are_forty_mistakes_and_more() -> None:
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda at: ms.fit("smollm2"), "task: None; give a"),
        (lambda at: ms.fit("smollm2", at / "mine.jsonl", "facts"), "tokenizer: a model that is given by name"),
        (lambda at: ms.fit("smollm2", task=at / "mien.jsonl"), "did you mean .*mine.jsonl"),
        (lambda at: ms.fit("smollm2", task=at / "mine.jsonl", setings=8), "setings: fit has no such argument; it has"),
        (lambda at: ms.fit("smollm2", task=at / "mine.jsonl", aim="pair"), "aim: 'pair'; allowed are"),
        (lambda at: ms.load_model(at / "run"), "has no config.json"),
        (lambda at: ms.Prompting(reply="Sure:"), "reply: 'Sure:' is a part of a chat; set chat"),
        (lambda at: ms.build_task("jsonl", {}, 0), "task.options: task 'jsonl' refuses"),
    ],
)
def test_so_it_is_in_python_before_a_model_is_opened(call: Any, words: str, folder: Path) -> None:
    with pytest.raises(ms.InputError, match=words) as error:
        call(folder)
    assert "\n" not in str(error.value)
