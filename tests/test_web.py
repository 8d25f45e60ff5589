"""The API of the playground: it answers as the library does, mixes up no requests, refuses by name, bounds clients."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi import HTTPException
from fastapi.testclient import TestClient

from mnemoscope.auditing.origins import Text
from mnemoscope.auditing.origins.labels import ORIGINS
from mnemoscope.behaviour import prepare, score
from mnemoscope.config import dump_study, load_study
from mnemoscope.interventions import LowRank, SteeringVector, Toward
from mnemoscope.runs.digests import read_marker, write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics.contrast import Contrast
from mnemoscope.study.stages import Records, cell_model
from mnemoscope.web import connections, runs
from mnemoscope.web.app import build_app
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.shapes import Question, Steering
from playground import CELL, TOKEN, client_of, error_of, random_reader, served


@pytest.fixture(scope="module")
def cell(playground_runs: Path) -> OpenedCell:
    return OpenedCell(playground_runs / "first", "addition-0")


@pytest.fixture(scope="module")
def pairs(client: TestClient) -> list[dict[str, Any]]:
    return client.get(f"{CELL}/questions?n=20").json()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def library(cell: OpenedCell) -> tuple[Any, Records, Contrast]:
    """The same cell as the stages see it: its model, its records and its contrast."""
    contrast = Contrast.load(cell.cell.folder / "contrast.safetensors")
    return cell_model(cell.cell), Records.of(cell.cell), contrast


def test_both_phrasings_of_a_pair_are_answered_as_the_records_say(
    client: TestClient, pairs: list[Any], library: Any
) -> None:
    assert len(pairs) == min(20, len(library[1].both_sides("test", 100))) > 0
    for pair in pairs:
        for behaviour, question in pair.items():
            answer = client.post(f"{CELL}/ask", json={"question": question}).json()
            assert (answer["behaviour"], answer["said"]) == (behaviour, question[behaviour])
            assert min(answer["p_memorized"], answer["p_generalized"]) >= 0
            assert answer["p_memorized"] + answer["p_generalized"] <= 1 + 1e-6
            assert len(answer["reading"]["p_memorized_by_layer"]) == 2


@pytest.mark.parametrize("toward", ["generalized", "memorized"])
def test_a_vector_steers_here_what_it_steered_in_the_study(cell: OpenedCell, library: Any, toward: Toward) -> None:
    """The chosen vectors at alpha 1, example by example, against ``records/steering.parquet``."""
    rows = pd.read_parquet(cell.cell.records / "steering.parquet")
    rows = rows[(rows.aim == "pairs") & (rows.examples == "pairs") & (rows.role == "vector")]
    for method in ("nmd", "gradient", "learned"):
        after = rows[(rows.direction == f"to_{toward}") & (rows.method == method)].after.tolist()
        assert after
        asked = [Question.of(example) for example in library[1].targets("test", Toward.of(toward), len(after))]
        steering = Steering(toward=toward, method=method)
        assert [cell.answer(question, steering).behaviour for question in asked] == after


def test_a_low_rank_shift_of_every_token_reaches_the_prompt(
    cell: OpenedCell, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain passes over prompt and answer under the same vector."""
    asking, records, _ = library
    generator, width = torch.Generator().manual_seed(3), asking.model.config.hidden_size
    parts = LowRank(*(torch.randn(*shape, generator=generator) for shape in ((2, width), (2,), (2, width))))
    vector = SteeringVector("generalized", {0: parts * 0.03}, positions="all")
    monkeypatch.setattr(cell.vectors, "part", lambda steering: vector)
    for example in records.targets("test", Toward.GENERALIZED, 4):
        found = cell.answer(Question.of(example), Steering(toward="generalized", method="nmd"))
        prompt = asking.tokenizer(asking.text(example.prompt)).input_ids
        whole = asking.tokenizer(asking.whole(example, str(example.memorized))).input_ids
        with torch.no_grad(), vector.apply(asking.model):
            logp_TV = asking.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        wanted = sum(float(logp_TV[t - 1, whole[t]]) for t in range(len(prompt), len(whole)))
        assert math.log(found.p_memorized) == pytest.approx(wanted, abs=1e-3)


def test_parts_of_a_vector_are_those_that_are_asked_for(cell: OpenedCell, library: Any) -> None:
    """All of its own neurons are the vector itself; further layers are filled in from the mean differences."""
    whole = cell.vectors.part(Steering(toward="memorized", method="nmd"))
    same = cell.vectors.part(Steering(toward="memorized", method="nmd", layers=whole.layers))
    shape = library[2].nmd_LD.shape
    assert np.array_equal(same.dense(*shape), whole.dense(*shape))
    few_LD = cell.vectors.part(Steering(toward="memorized", method="nmd", layers=[0, 1], neurons=3)).dense(*shape)
    assert np.count_nonzero(few_LD) == 3
    assert (np.sign(few_LD) == -np.sign(np.where(few_LD, library[2].nmd_LD, 0))).all()


def test_a_vector_of_another_model_is_refused(playground_runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(playground_runs / "first", tmp_path / "run")
    path = run / "cells" / "addition-0" / "vectors" / "to_generalized-learned.safetensors"
    vector = SteeringVector.load(path)
    assert vector.binding
    replace(vector, binding=replace(vector.binding, weights="0" * 64)).save(path)
    with pytest.raises(InputError, match=r"^weights: the vector was made on 0{64}, this model has "):
        OpenedCell(run, "addition-0")


def test_a_model_outside_of_the_run_is_opened_only_if_it_is_given(playground_runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(playground_runs / "first", tmp_path / "run")
    model = (run / "cells" / "addition-0" / "model").rename(tmp_path / "model")
    study = load_study(str(run / "study.yaml"), [f"cells.addition.model.folder={model}"])
    (run / "study.yaml").write_text(dump_study(study))
    marker = run / "cells" / "addition-0" / "stages" / "train.json"
    files = [marker.parents[1] / name for name in read_marker(marker)["files"] if not name.startswith("model/")]
    write_marker(marker.parents[1], "train", files)
    write_marker(run, "study", [run / "study.yaml"])
    with pytest.raises(InputError, match=rf"^model.folder: {model} is no model that .* --model {model}"):
        OpenedCell(run, "addition-0")
    assert OpenedCell(run, "addition-0", model).answer(Question(prompt="12+34=")).said


BOTH = {"prompt": "12+34=", "memorized": "4", "generalized": "46"}


@pytest.mark.parametrize(
    ("question", "steering", "field"),
    [
        ({}, {"method": "magic"}, "method"),
        ({}, {"layers": [9]}, "layers"),
        ({}, {"neurons": 10**6}, "neurons"),
        ({}, {"neurons": 0}, "neurons"),
        ({}, {"alpha": 1e9}, "alpha"),
        ({}, {"toward": "sideways"}, "toward"),
        ({}, {"colour": "red"}, "colour"),
        ({"prompt": ""}, None, "prompt"),
        ({"prompt": "12+34=" * 2000}, None, "prompt"),
        ({"prompt": "12+34=" * 20}, None, "prompt"),
        ({"prompt": "12+34=" * 20, "memorized": None, "generalized": None}, None, "prompt"),
        ({"prompt": "Who?"}, None, "prompt"),
        ({"memorized": "46"}, None, "memorized, generalized"),
        ({"generalized": None}, None, "memorized, generalized"),
        ({}, None, "memorized, generalized"),  # one begins as the other
    ],
)
def test_what_cannot_be_asked_is_named(client: Any, question: Any, steering: Any, field: str) -> None:
    steering = steering and {"toward": "generalized", "method": "nmd", **steering}
    asked = {"question": BOTH | question, "steering": steering}
    assert error_of(client.post(f"{CELL}/ask", json=asked))[0] == field


def test_a_prompt_without_answers_is_continued(client: TestClient, pairs: list[Any]) -> None:
    question = pairs[0]["generalized"]
    asked = {"question": {"prompt": question["prompt"]}}
    answer = client.post(f"{CELL}/ask", json=asked).json()
    assert (answer["behaviour"], answer["p_memorized"]) == (None, None)
    assert answer["said"].startswith(question["generalized"])
    whole = client.post(f"{CELL}/ask", json={"question": question}).json()
    assert answer["reading"]["p_memorized"] == pytest.approx(whole["reading"]["p_memorized"], abs=1e-4)


def test_another_phrasing_of_the_same_item(client: TestClient, pairs: list[Any]) -> None:
    question = pairs[0]["memorized"]
    other = client.post(f"{CELL}/rephrase?seed=3", json=question).json()
    assert other["prompt"] != question["prompt"]
    assert all(other[key] == question[key] for key in ("item", "memorized", "generalized"))
    assert error_of(client.post(f"{CELL}/rephrase", json=question | {"item": "other"}))[0] == "item"


def test_no_answer_sees_the_shift_of_another(playground_runs: Path, pairs: list[Any]) -> None:
    """Many at once, each with a vector and a strength of its own, against the same ones one by one on a new server."""
    steerings: list[dict[str, Any] | None] = [None]
    for toward in ("generalized", "memorized"):
        methods = [(method, alpha) for method in ("nmd", "learned") for alpha in (0.5, 2.0)]
        steerings += [{"toward": toward, "method": method, "alpha": alpha} for method, alpha in methods]
    questions = [question for pair in pairs[:3] for question in pair.values()]
    asked = [{"question": question, "steering": steering} for question in questions for steering in steerings]
    asked += [{"question": {"prompt": one["question"]["prompt"]}, "steering": one["steering"]} for one in asked[::4]]

    def answer(number: int, client: TestClient) -> Any:
        return client.post(f"{CELL}/ask", json=asked[number]).json()

    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(asked)), 2))
    with client_of(playground_runs) as client, ThreadPoolExecutor(24) as crowd:
        loud = list(crowd.map(partial(answer, client=client), order))
    with client_of(playground_runs) as client:
        quiet = [answer(number, client) for number in range(len(asked))]
    assert all(found == quiet[number] for number, found in zip(order, loud, strict=True))
    assert len({json.dumps(found) for found in quiet}) > len(asked) / 2, "they do differ"


def test_a_neuron_is_shown_on_tune_pairs(client: TestClient, library: Any) -> None:
    asking, records, contrast = library
    layer, neuron = map(int, np.unravel_index(np.abs(contrast.rho_LD).argmax(), contrast.rho_LD.shape))
    looks = [json.loads(line) for line in client.post(f"{CELL}/neurons/{layer}/{neuron}").text.splitlines()]
    shares = [look["share"] for look in looks]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [look["result"] for look in looks[:-1]] == [None] * (len(looks) - 1)
    seen, tune = looks[-1]["result"], records.both_sides("tune", 100)
    assert (seen["rank_rho"], seen["pairs"]) == (1, len(tune))
    shift_LD = np.zeros(contrast.nmd_LD.shape)
    shift_LD[layer, neuron] = contrast.nmd_LD[layer, neuron]
    vector = SteeringVector("generalized", {}).with_dense(shift_LD)
    sides = (("generalized", "memorized", -1), ("memorized", "generalized", 1))
    for examples, (behaviour, toward, sign) in zip(zip(*tune, strict=True), sides, strict=True):
        scores = score(asking, prepare(asking, examples), margins=False, capture="block")
        assert scores.states_NLD is not None
        expected = scores.states_NLD[:, layer, neuron].mean()
        assert seen[f"mean_{behaviour}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for alone in seen["alone"]:
            with (sign * alone["times"] * vector).apply(asking.model):
                moved = score(asking, prepare(asking, examples)).behaviour_N == toward
            assert alone[toward] == pytest.approx(moved.mean())
    assert seen["drawing"].startswith("<svg")
    assert [row["times"] for row in seen["alone"]] == [1, 4, 16]
    assert error_of(client.post(f"{CELL}/neurons/0/9999"), 422) == ("neuron", "9999 is not in 0 .. 63")


def test_an_answer_is_read_while_it_is_written(playground_runs: Path, pairs: list[Any]) -> None:
    reader, asking = random_reader(playground_runs / "second")
    about = {"ask": pairs[0]["memorized"]["prompt"], "document": "", "tokens": 10}
    with client_of(playground_runs) as client:
        path = CELL.replace("/first/", "/second/")
        assert client.get(path).json()["reads"]
        told = [json.loads(line) for line in client.post(f"{path}/read", json=about).text.splitlines()]
        assert error_of(client.post(f"{CELL}/read", json=about), 422)[0] == "reader"
        assert error_of(client.post(f"{path}/read", json=about | {"ask": ""}), 422)[0] == "ask"
    written = reader.write(asking, reader.asks(Text(about["ask"], "")), 10)
    assert told[-1]["answer"] == written.answer
    for one in told:
        assert written.answer.startswith(one["answer"])
        numbers = [[token[name] for name in ORIGINS] for token in one["tokens"]]
        np.testing.assert_allclose(numbers, written.p_T3[: len(numbers)], atol=1e-4)


def test_names_do_not_lead_out_of_the_folder(client: TestClient) -> None:
    runs = client.app.state.runs  # type: ignore[attr-defined]
    for name in ("..", "../runs", "letter.txt", "/etc", ".hidden", "no", "first/cells", ""):
        with pytest.raises(InputError, match="run: "):
            runs.folder(name)
        with pytest.raises(InputError, match="cell: "):
            runs.cell("first", f"../{name}")
        if name == "..":
            continue  # a client takes it out of a path before it is sent
        said = quote(name, safe="") or "-"
        cells = f"/api/runs/{said}/cells/x", f"/api/runs/first/cells/{said}"
        for path in (f"/runs/{said}/report", f"/?run={said}", *cells):
            assert client.get(path).status_code in (404, 422), path


def test_runs_are_listed_and_a_damaged_one_hides_no_other(playground_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(playground_runs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "second" / "results.json").write_text('{"schema": 1, "study": "x", "tasks": {"addition": {}}}')
    (tmp_path / "second" / "cells" / "addition-0" / "contrast.safetensors").unlink()
    with client_of(tmp_path) as client:
        listed = {run["run"]: run for run in client.get("/api/runs").json()}
        assert {name: run["finished"] for name, run in listed.items()} == {
            "begun": False,
            "first": True,
            "second": False,
        }
        assert (listed["first"]["cells"], listed["first"]["damaged"]) == (["addition-0"], None)
        assert "to_generalized" in listed["first"]["tasks"]["addition"]
        assert listed["second"]["tasks"] == {}
        assert "results.json: is damaged" in listed["second"]["damaged"]
        assert "results.json: is damaged" in client.get("/runs").text
        for _ in range(2):
            assert error_of(client.get("/api/runs/second/cells/addition-0"))[0] == "cell"
        assert client.get(CELL).status_code == 200


GET = f"GET /api/runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
POST = GET.replace("GET /api/runs", "POST /api/runs/a/cells/b/ask")


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a playground that waits half a second for a request and takes four connections."""
    monkeypatch.setattr(connections, "DEADLINE", 0.5)
    monkeypatch.setattr("mnemoscope.web.app.MOST", 4)
    with served(build_app(runs.Runs(tmp_path), TOKEN)) as address:
        yield int(address.rpartition(":")[2])


def answer_to(port: int, *parts: str, pause: float = 0.0) -> tuple[bytes, float]:
    """All that a client gets that sends parts of a request with pauses, and the seconds until the connection ends."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        got = b""
        for part in parts:
            client.sendall(part.encode())
            time.sleep(pause)
        while chunk := client.recv(65536):
            got += chunk
    return got, time.monotonic() - began


@pytest.mark.parametrize(
    "parts",
    [(), ("G",), ("GET / HTTP/1.1\r\nHost: localhost\r\n",), (f"{POST}Content-Length: 100\r\n\r\n", "{")],
    ids=["nothing", "a letter", "half of the headers", "half of the body"],
)
def test_a_request_that_does_not_arrive_is_not_waited_for(parts: tuple[str, ...], port: int) -> None:
    got, seconds = answer_to(port, *parts)
    assert not got.startswith(b"HTTP/1.1 2")
    assert 0.3 < seconds < 8, "the client itself gives up after ten"


def test_whole_requests_are_answered_on_one_connection_for_longer_than_the_deadline(port: int) -> None:
    got, _ = answer_to(port, f"{GET}\r\n", f"{GET}\r\n", f"{GET}Connection: close\r\n\r\n", pause=0.4)
    assert got.count(b"HTTP/1.1 200") == 3


def test_more_connections_than_the_limit_are_told_so(port: int) -> None:
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
    time.sleep(0.1)
    assert answer_to(port, f"{GET}\r\n")[0].startswith(b"HTTP/1.1 503")
    for one in held:
        one.close()


def test_work_of_a_client_that_has_left_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "LOOK", 0.01)
    monkeypatch.setattr(runs, "OpenedCell", lambda run, cell, model: "opened")
    folders: Any = SimpleNamespace(cell=lambda *_: tmp_path, folder=lambda _: tmp_path, model=None)
    opened, go_on, done = runs.OpenedCells(folders), Event(), list[str]()

    async def has_left() -> bool:
        return True

    async def asked() -> None:
        first = asyncio.create_task(opened.ask("run", "cell", lambda _: go_on.wait(5)))
        await asyncio.sleep(0.05)
        with pytest.raises(HTTPException) as refused:
            await opened.ask("run", "cell", lambda _: done.append("left"), has_left)
        assert refused.value.status_code == 499
        ended = asyncio.create_task(opened.ask("run", "cell", lambda _: done.append("cancelled")))
        last = asyncio.create_task(opened.ask("run", "cell", lambda _: done.append("stayed")))
        await asyncio.sleep(0.05)
        ended.cancel()
        with suppress(asyncio.CancelledError):
            await ended
        go_on.set()
        await asyncio.gather(first, last)

    asyncio.run(asked())
    opened.close()
    assert done == ["stayed"]


@pytest.mark.parametrize(
    "path", ["//evil.example/", "//evil.example", "/runs/", "//evil.example/?token={}", "/?token={}&run=//evil.example"]
)
def test_no_answer_leads_to_another_site(path: str, tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        answer: Any = client.get(f"http://localhost{path.format(TOKEN)}", follow_redirects=False)
        assert answer.headers.get("location", "/").split("?")[0] == "/"
