"""Models, tables and clients of strangers: what they ask for is bounded, and refused in one line beyond that."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from families import complete, tiny, tokenizer
from mnemoscope.behaviour import Asking
from mnemoscope.models import load_model
from mnemoscope.runs import strict
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import named_task
from mnemoscope.watch import Curve
from mnemoscope.web import connections, runs
from mnemoscope.web.app import build_app
from playground import TOKEN, served
from test_cli import call

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]


def strange(folder: Path, name: str = "", change: Mapping[str, Any] | None = None) -> Path:
    """A tiny model, with other values in one of its JSON files."""
    tiny("gpt2").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if name:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | dict(change or {})))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("generation_config.json", {"eos_token_id": "x"}, "generation: eos_token_id"),
        ("generation_config.json", {"eos_token_id": [[1]]}, "generation: eos_token_id"),
        ("generation_config.json", {"pad_token_id": 1.5}, "generation: pad_token_id"),
        ("generation_config.json", {"temperature": "hot"}, "generation: temperature"),
        ("generation_config.json", {"max_length": "x"}, "generation: max_length"),
        ("config.json", {"eos_token_id": "x"}, "eos_token_id"),
        ("config.json", {"n_layer": 1_000_000}, "many more layers or weights; .* in 40 tensors are saved"),
        ("config.json", {"n_positions": 10**9}, "many more layers or weights"),
        ("config.json", {"vocab_size": 10**9}, "many more layers or weights"),
        ("config.json", {"n_head": 0}, "cannot be opened"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length: .* .got 'x'"),
    ],
)
def test_a_strangers_settings_are_refused_before_they_act(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^model: .*{message}") as error:
        load_model(strange(tmp_path, name, change))
    assert "\n" not in str(error.value)


def test_settings_that_change_answers_unseen_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, words = load_model(strange(tmp_path / "plain"))
    inputs = Asking(model, words).padded(["w1 w2", "w3"])
    wanted, (first, *_) = complete(model, words, inputs, 4), model(**inputs).logits[:, -1].argmax(-1).tolist()
    for change in ({"suppress_tokens": [first]}, {"stop_strings": ["w"]}, {"bad_words_ids": [[first]]}):
        caplog.clear()
        model, words = load_model(strange(tmp_path / next(iter(change)), "generation_config.json", change))
        assert complete(model, words, inputs, 4) == wanted
        assert f"asks for {next(iter(change))}; left out" in caplog.text


def test_a_pattern_that_ends_in_a_panic_is_an_error_like_any_other(tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    model, words = load_model(strange(tmp_path, "tokenizer.json", {"pre_tokenizer": pattern}))
    with pytest.raises(InputError, match=r"^tokenizer: it cannot read the prompts"):
        Asking(model, words).padded(["a" * 60 + "!"])


def curve(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"step": [0, 10], "conflict_memorized": [0.1, 0.2]} | columns)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (curve().iloc[:0], "it has no row"),
        (curve(step=["0", "then"]), "in step what is no step"),
        (curve(step=[0.0, float("nan")]), "in step what is no step"),
        (curve(step=[0.0, float("inf")]), "in step what is no step"),
        (curve(recall=[0.5, 1.5]), "in recall what is no share"),
        (curve(conflict_memorized=["a", "b"]), "in conflict_memorized what is no share"),
        (curve().drop(columns="step"), "it has conflict_memorized"),
    ],
)
def test_a_curve_holds_steps_and_shares(table: pd.DataFrame, message: str, tmp_path: Path) -> None:
    table.to_parquet(tmp_path / "t.parquet")
    code, out, err = call("watch", str(tmp_path / "t.parquet"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
    curve(recall=[0.5, float("nan")]).to_parquet(tmp_path / "t.parquet")
    assert len(Curve.open(tmp_path / "t.parquet").rows) == 2


@pytest.mark.parametrize(
    ("width", "rows", "why"), [(2**17, 50_000, "once it is decoded"), (1, 2**25 + 1, "cells are read")]
)
def test_a_table_is_bounded_by_what_it_decodes_to(width: int, rows: int, why: str, tmp_path: Path) -> None:
    """A few kilobytes, one value and how often it is there."""
    once = pa.array(["x" * width])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), once)
    table, path = pa.table({"item": column, "prompt": column}), tmp_path / "t.parquet"
    parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**24)
    assert path.stat().st_size < 2**18
    with pytest.raises(InputError, match=f"t.parquet has .*{why}"):
        named_task(path, {})
    with pytest.raises(InputError, match=f"t.parquet has .*{why}"):
        strict.bounded_table(path)


def test_a_token_is_asked_for_whatever_the_host_header_says(tmp_path: Path) -> None:
    """An address that is built of that header could end in a page that is open to all."""
    with served(build_app(runs.Runs(tmp_path), TOKEN)) as address:
        for host in ("localhost/report.css?", "localhost:1/static/icon.svg#", "localhost:x"):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10) as client:
                client.sendall(f"GET /api/runs HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                assert client.recv(4096).split()[1] in (b"400", b"401"), host


def test_a_client_that_reads_nothing_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "DEADLINE", 0.5)
    (run := tmp_path / "big").mkdir()
    (run / "study.yaml").write_text("study: big\n")
    monkeypatch.setattr("mnemoscope.web.app.intact", lambda path: path)
    (run / "report.html").write_bytes(b"x" * 2**26)
    with served(build_app(runs.Runs(tmp_path), TOKEN)) as address:
        for patient in (False, True):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10) as client:
                head = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
                client.sendall(f"GET /runs/big/report HTTP/1.1\r\n{head}".encode())
                got = len(client.recv(1000))
                time.sleep(0.1 if patient else 2)
                try:
                    while chunk := client.recv(2**20):
                        got += len(chunk)
                except ConnectionError:
                    pass
                assert (got > 2**26) == patient


def test_an_error_stands_alone_without_bars_of_progress(tmp_path: Path) -> None:
    strange(tmp_path / "checkpoint-1")
    (strange(tmp_path / "checkpoint-2") / "model.safetensors").write_bytes(b"cut")
    asked = ("emergence", str(tmp_path), "--task", "addition", "-o", str(tmp_path / "out"))
    command = [sys.executable, "-m", "mnemoscope", *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (2, 1, "error: "), done.stderr


def test_libraries_with_known_holes_are_not_accepted() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "jinja2>=3.1.6" in project["dependencies"]
    assert "starlette>=0.49.1" in project["optional-dependencies"]["web"]
