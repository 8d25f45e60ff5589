"""The playground: its API says what the library says, leaks nothing between requests, and its pages work."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread, current_thread
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pandas as pd
import pytest
import schemathesis
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from playwright.sync_api import expect

from mnemoscope.behaviour import prepare, score
from mnemoscope.bench import Bench, Turning
from mnemoscope.contrast import Contrast
from mnemoscope.errors import InputError
from mnemoscope.steering import SteeringVector
from mnemoscope.tasks import Example
from mnemoscope.web import build_app, check_reachable
from mnemoscope.web.guards import LARGEST_BODY
from mnemoscope.web.jobs import RUNNING, WORKERS

CELL = "/api/runs/first/cells/addition-0"


@pytest.fixture(scope="module")
def root(mini_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, and one that has only begun."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        shutil.copytree(mini_run, folder / name)
    (folder / "begun").mkdir()
    shutil.copy(mini_run / "study.yaml", folder / "begun")
    (folder / "letter.txt").write_text("not a run")
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    """One event loop for all requests, as a server has."""
    with TestClient(build_app(root), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def bench(root: Path) -> Bench:
    return Bench.of(root / "first", "addition-0")


@pytest.fixture(scope="module")
def pairs(client: TestClient) -> list[dict[str, Any]]:
    return client.get(f"{CELL}/questions?n=20").json()  # type: ignore[no-any-return]


def error_of(response: Any, status: int = 422) -> tuple[str, str]:
    assert response.status_code == status, response.text
    return response.json()["error"]["field"], response.json()["error"]["message"]


def test_both_phrasings_of_a_pair_are_answered_as_the_records_say(client: TestClient, pairs: list[Any]) -> None:
    assert len(pairs) == 20
    for pair in pairs:
        for behaviour, question in pair.items():
            answer = client.post(f"{CELL}/ask", json={"question": question}).json()
            assert answer["behaviour"] == behaviour
            assert answer["said"] == question[behaviour]
            assert min(answer["p_memorized"], answer["p_generalized"]) >= 0
            assert answer["p_memorized"] + answer["p_generalized"] <= 1
            assert len(answer["reading"]["p_memorized_by_layer"]) == 2


def test_what_a_vector_turns_on_the_page_it_turned_in_the_study(root: Path, bench: Bench) -> None:
    """The chosen vectors at alpha 1, example by example, against ``records/steering.parquet``."""
    rows = pd.read_parquet(root / "first" / "cells" / "addition-0" / "records" / "steering.parquet")
    rows = rows[(rows.aim == "pairs") & (rows.examples == "pairs") & (rows.role == "vector")]
    found = pd.read_parquet(root / "first" / "cells" / "addition-0" / "records" / "pairs.parquet")
    found = found[found.is_pair & (found.split == "test")]
    for direction, toward, source in (
        ("to_generalized", "generalized", "memorized"),
        ("to_memorized", "memorized", "generalized"),
    ):
        for method in ("nmd", "gradient", "learned"):
            after = rows[(rows.direction == direction) & (rows.method == method)].after.tolist()
            asked = [
                e for row in found.itertuples() if (e := phrasing(row, source)) and bench_keeps(bench, e, direction)
            ]
            # A phrasing that is part of several pairs is judged once.
            asked = list({(e.item, e.prompt): e for e in asked}.values())[: len(after)]
            assert asked
            now = [bench.ask(e, Turning(toward, method)).behaviour for e in asked]  # type: ignore[arg-type]
            assert now == after


def phrasing(row: Any, behaviour: str) -> Example:
    side = "a" if row.behaviour_a == behaviour else "b"
    words = getattr(row, f"prompt_{side}"), "conflict", row.group, getattr(row, f"family_{side}"), row.split
    return Example(row.item, *words, row.memorized, row.generalized)


def bench_keeps(bench: Bench, example: Example, direction: str) -> bool:
    from mnemoscope.tasks import keeps_key

    return direction == "to_generalized" or keeps_key(bench._records.task, example)


def test_no_strength_is_no_turning(client: TestClient, pairs: list[Any]) -> None:
    question = pairs[0]["memorized"]
    plain = client.post(f"{CELL}/ask", json={"question": question}).json()
    turning = {"toward": "generalized", "method": "nmd", "alpha": 0}
    assert client.post(f"{CELL}/ask", json={"question": question, "turning": turning}).json() == plain


def test_layers_and_neurons_of_a_vector_can_be_chosen(bench: Bench) -> None:
    nmd = bench.vectors.meant(Turning("generalized", "nmd"))
    own = {layer: int((shift != 0).sum()) for layer, shift in nmd.shifts.items()}
    same = bench.vectors.meant(Turning("generalized", "nmd", layers=tuple(own), neurons=sum(own.values())))
    for layer, shift in nmd.shifts.items():
        np.testing.assert_allclose(same.shifts[layer].numpy(), shift.numpy(), rtol=1e-5)
    one = bench.vectors.meant(Turning("memorized", "nmd", layers=(1,), neurons=3))
    assert one.layers == [1]
    assert int((one.shifts[1] != 0).sum()) == 3
    strongest, shift_D = np.argsort(-np.abs(bench.contrast.rho_LD[1]))[:3], one.shifts[1].numpy()
    assert set(np.flatnonzero(shift_D)) == set(strongest)
    assert np.array_equal(np.sign(shift_D[strongest]), -np.sign(bench.contrast.nmd_LD[1, strongest]))
    few = bench.vectors.meant(Turning("generalized", "learned", neurons=2))
    whole = bench.vectors.meant(Turning("generalized", "learned"))
    kept = {(layer, int(n)) for layer, shift in few.shifts.items() for n in np.flatnonzero(shift.numpy())}
    assert len(kept) == 2
    largest = max((float(abs(v)), layer, n) for layer, s in whole.shifts.items() for n, v in enumerate(s.tolist()))
    assert largest[1:] in kept


@pytest.mark.parametrize(
    ("turning", "field"),
    [
        ({"method": "magic"}, "method"),
        ({"layers": [9]}, "layers"),
        ({"layers": []}, "layers"),
        ({"neurons": 10**6}, "neurons"),
        ({"neurons": 0}, "neurons"),
        ({"alpha": -1}, "alpha"),
        ({"alpha": 1e9}, "alpha"),
        ({"toward": "sideways"}, "toward"),
        ({"toward": "generalized", "colour": "red"}, "colour"),
    ],
)
def test_a_turning_that_does_not_exist_is_named(
    client: TestClient, pairs: list[Any], turning: dict[str, Any], field: str
) -> None:
    asked = {"question": pairs[0]["memorized"], "turning": {"toward": "generalized", "method": "nmd", **turning}}
    assert error_of(client.post(f"{CELL}/ask", json=asked))[0] == field


@pytest.mark.parametrize(
    ("question", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "12+34=" * 2000}, "prompt"),
        ({"prompt": "12+34=" * 20}, "prompt"),
        ({"prompt": "Who?", "memorized": "1", "generalized": "2"}, "prompt"),
        ({"prompt": "12+34=", "memorized": "46", "generalized": "46"}, "memorized, generalized"),
        ({"prompt": "12+34=", "memorized": "46"}, "memorized, generalized"),
        ({"prompt": "12+34=", "memorized": "4", "generalized": "46"}, "memorized, generalized"),
    ],
)
def test_a_question_that_cannot_be_read_is_named(client: TestClient, question: dict[str, str], field: str) -> None:
    assert error_of(client.post(f"{CELL}/ask", json={"question": question}))[0] == field


def test_a_prompt_without_answers_is_gone_on_with(client: TestClient, pairs: list[Any]) -> None:
    prompt = pairs[0]["generalized"]["prompt"]
    answer = client.post(f"{CELL}/ask", json={"question": {"prompt": prompt}}).json()
    assert answer["behaviour"] is None
    assert answer["p_memorized"] is None
    assert answer["said"].startswith(pairs[0]["generalized"]["generalized"])
    turning = {"toward": "memorized", "method": "learned", "alpha": 2}
    assert client.post(f"{CELL}/ask", json={"question": {"prompt": prompt}, "turning": turning}).status_code == 200


def test_other_words_for_the_same_item(client: TestClient, pairs: list[Any]) -> None:
    question = pairs[0]["memorized"]
    asked = {"item": question["item"], "prompt": question["prompt"], "seed": 3}
    other = client.post(f"{CELL}/rephrase", json=asked).json()
    assert other["prompt"] != question["prompt"]
    assert {key: other[key] for key in ("item", "memorized", "generalized")} == {
        key: question[key] for key in ("item", "memorized", "generalized")
    }
    assert error_of(client.post(f"{CELL}/rephrase", json={"item": "no such item"}))[0] == "item"


def test_no_answer_sees_the_shift_of_another(root: Path, pairs: list[Any]) -> None:
    """Many at once, each with a vector and a strength of its own, against the same ones asked quietly elsewhere.

    Neither has answered anybody before, so what a shift could leak into is made while others are answered.
    """
    turnings: list[dict[str, Any] | None] = [None]
    for toward in ("generalized", "memorized"):
        turnings += [
            {"toward": toward, "method": method, "alpha": alpha}
            for method in ("nmd", "learned")
            for alpha in (0.5, 2.0)
        ]
    asked = [
        {"question": question, "turning": turning}
        for pair in pairs[:6]
        for question in pair.values()
        for turning in turnings
    ]
    asked += [{"question": {"prompt": one["question"]["prompt"]}, "turning": one["turning"]} for one in asked[::4]]

    def answer(number: int, client: TestClient) -> Any:
        return client.post(f"{CELL}/ask", json=asked[number]).json()

    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(asked)), 2))
    # One event loop for all requests of a server.
    with TestClient(build_app(root), base_url="http://localhost") as client, ThreadPoolExecutor(24) as crowd:
        loud = list(crowd.map(partial(answer, client=client), order))
    with TestClient(build_app(root), base_url="http://localhost") as client:
        quiet = [answer(number, client) for number in range(len(asked))]
    assert all(found == quiet[number] for number, found in zip(order, loud, strict=True))
    assert len({json.dumps(found) for found in quiet}) > len(asked) / 2, "they do differ"


def finished(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    for _ in range(2000):
        state: dict[str, Any] = client.get(f"/api/jobs/{job['job']}").json()
        if state["state"] != "running":
            return state
    raise AssertionError("the job does not end")


def test_a_neuron_is_shown_on_tune_pairs(client: TestClient, bench: Bench, root: Path) -> None:
    cell = root / "first" / "cells" / "addition-0"
    contrast = Contrast.load(cell / "contrast.safetensors")
    layer, neuron = map(int, np.unravel_index(np.abs(contrast.rho_LD).argmax(), contrast.rho_LD.shape))
    started = client.post(f"{CELL}/neurons/{layer}/{neuron}")
    assert started.status_code == 202
    seen = finished(client, started.json())["result"]
    assert seen["rank_rho"] == 1
    found = pd.read_parquet(cell / "records" / "pairs.parquet")
    tune = found[found.is_pair & (found.split == "tune")].head(100)
    asking = bench._asking
    for behaviour in ("generalized", "memorized"):
        examples = [phrasing(row, behaviour) for row in tune.itertuples()]
        scores = score(asking, prepare(asking, examples), margins=False, capture="block")
        assert scores.states_NLD is not None
        expected = scores.states_NLD[:, layer, neuron].mean()
        assert seen[f"mean_{behaviour}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert seen["pairs"] == len(tune)
    assert seen["drawing"].startswith("<svg")
    assert [row["times"] for row in seen["alone"]] == [1, 4, 16]
    assert {key for row in seen["alone"] for key in row} == {"times", "generalized", "memorized"}
    assert error_of(client.get("/api/jobs/none"), 404)[0] == "job"
    assert error_of(client.post(f"{CELL}/neurons/0/9999"), 422) == ("neuron", "9999 is not in 0 .. 63")


def opened_bench(client: TestClient) -> Bench:
    """The server's own."""
    client.get(CELL)
    opened = client.app.state.opened  # type: ignore[attr-defined]
    return list(opened._open.values())[-1].bench


def test_a_job_can_be_cancelled_while_it_waits_for_the_model(client: TestClient) -> None:
    with opened_bench(client)._turns._lock:  # somebody is asking, for long
        job = client.post(f"{CELL}/neurons/0/0").json()
        assert job["state"] == "running"
        assert client.delete(f"/api/jobs/{job['job']}").status_code == 200
        assert finished(client, job)["state"] == "cancelled"
    assert finished(client, client.post(f"{CELL}/neurons/0/0").json())["state"] == "done"


def test_jobs_that_nobody_wants_any_more_keep_nobody_out(client: TestClient) -> None:
    with opened_bench(client)._turns._lock:
        jobs = [client.post(f"{CELL}/neurons/0/{neuron}").json() for neuron in range(RUNNING)]
        assert error_of(client.post(f"{CELL}/neurons/1/0"), 429)[0] == "job"
        # The last ones first: whoever is cancelled at work makes room for the next, which would begin.
        ended = [client.delete(f"/api/jobs/{job['job']}").json()["state"] for job in reversed(jobs)]
        assert ended.count("cancelled") >= RUNNING - WORKERS  # at once, those that had not begun
        later = client.post(f"{CELL}/neurons/1/0")
        assert later.status_code == 202
    assert finished(client, later.json())["state"] == "done"
    assert {finished(client, job)["state"] for job in jobs} == {"cancelled"}


class Noted:
    """A lock that remembers which thread held it when."""

    def __init__(self) -> None:
        self._lock, self.holders = Lock(), []

    def acquire(self, *given: Any, **named: Any) -> bool:
        got = self._lock.acquire(*given, **named)
        if got:
            self.holders.append(current_thread().name)
        return got

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def test_long_work_lets_whoever_waits_go_first(root: Path) -> None:
    bench, noted, asked = Bench.of(root / "first", "addition-0"), Noted(), []
    bench._turns._lock = noted  # type: ignore[assignment]
    question = bench.questions(1)[0][0]

    def wanted() -> bool:
        """In the midst of the third step somebody asks."""
        if len(noted.holders) == 3 and not asked:
            asked.append(asker.submit(bench.ask, question))
            while not bench._turns._waiting:
                time.sleep(0.001)
        return True

    with ThreadPoolExecutor(1, thread_name_prefix="asker") as asker:
        bench.neurons.watch(0, 0, wanted=wanted)
    me = current_thread().name
    assert noted.holders[:4] == [me, me, me, "asker_0"]
    assert set(noted.holders[4:]) == {me}


def test_whoever_asks_a_cell_waits_for_no_other(root: Path, client: TestClient, pairs: list[Any]) -> None:
    """Neither for its opening nor for what is asked of it."""
    other = CELL.replace("first", "second")
    held = Event()
    real = Bench.of

    def slowly(run: Path, cell: str) -> Bench:
        assert held.wait(60)
        return real(run, cell)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as crowd:
        opened_bench(client)
        patch.setattr(Bench, "of", slowly)
        waiting = [crowd.submit(client.get, other) for _ in range(6)]
        assert client.post(f"{CELL}/ask", json={"question": pairs[0]["memorized"]}).status_code == 200
        assert not any(one.done() for one in waiting)
        held.set()
        assert {one.result().status_code for one in waiting} == {200}


def test_a_neuron_alone_does_what_a_vector_of_it_does(bench: Bench) -> None:
    layer, neuron = map(int, np.unravel_index(np.abs(bench.contrast.nmd_LD).argmax(), bench.contrast.nmd_LD.shape))
    alone = bench.neurons.watch(layer, neuron).alone
    pairs = bench._records.both_sides("tune", 100)
    shift_LD = np.zeros(bench.contrast.nmd_LD.shape)
    shift_LD[layer, neuron] = 4 * bench.contrast.nmd_LD[layer, neuron]
    vector = SteeringVector("generalized", {}).with_dense(shift_LD)
    asking = bench._asking
    with vector.apply(asking.model):
        scores = score(asking, prepare(asking, [memorized for _, memorized in pairs]))
    assert alone[4.0]["generalized"] == pytest.approx(np.mean(scores.behaviour_N == "generalized"))
    assert any(share > 0 for turned in alone.values() for share in turned.values())


def test_runs_are_listed_and_compared(client: TestClient) -> None:
    runs = {row["run"]: row for row in client.get("/api/runs").json()}
    assert {name: row["finished"] for name, row in runs.items()} == {"first": True, "second": True, "begun": False}
    assert runs["first"]["cells"] == ["addition-0"]
    rows = client.get("/api/compare?first=first&second=second").json()
    assert rows
    assert all(row["first"] == row["second"] for row in rows), "one is a copy of the other"
    assert error_of(client.get("/api/compare?first=first&second=none"), 422)[0] == "second"
    page = client.get("/runs?first=first&second=begun").text
    assert "first beside begun" in page


@pytest.mark.parametrize("name", ["..", "../runs", "letter.txt", "/etc", ".hidden", "no", "first/cells", ""])
def test_names_do_not_lead_out_of_the_folder(client: TestClient, root: Path, name: str) -> None:
    rooms = client.app.state.rooms  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="run: "):
        rooms.run(name)
    with pytest.raises(InputError, match="cell: "):
        rooms.cell("first", f"../{name}")
    if name == "..":
        return  # a client takes it out of a path before it is sent
    quoted = quote(name, safe="") or "-"
    for path in (f"/api/runs/{quoted}", f"/runs/{quoted}/report", f"/?run={quoted}", f"/api/runs/first/cells/{quoted}"):
        assert client.get(path).status_code in (404, 422), path


def test_what_is_sent_is_limited(client: TestClient) -> None:
    long = {"question": {"prompt": "1" * LARGEST_BODY}}
    assert error_of(client.post(f"{CELL}/ask", json=long), 413)[0] == "body"

    def padded() -> Iterator[bytes]:
        yield b'{"question": {"prompt": "12+34="}'
        for _ in range(100):
            yield b" " * 1024
        yield b"}"

    headers = {"content-type": "application/json"}
    assert error_of(client.post(f"{CELL}/ask", content=padded(), headers=headers), 413)[0] == "body"
    assert error_of(client.post(f"{CELL}/ask", content=b"{", headers=headers))[0] == "body"


def test_a_token_is_asked_for_where_there_is_one(root: Path) -> None:
    token = "open; sesame, please"
    app = build_app(root, token=token, host="0.0.0.0")
    stranger = TestClient(app, base_url="http://any.example")
    for path in ("/api/runs", "/openapi.json"):
        assert error_of(stranger.get(path), 401)[0] == "token"
    for path in ("/", "/static/playground.js"):
        assert stranger.get(path).status_code == 401
        assert "token" in stranger.get(path).text
    assert stranger.get("/static/playground.css").status_code == 200, "of the page that says so"
    for header in ({"Authorization": "Bearer open"}, {"Cookie": "a/b=1; path=/; mnemoscope-80="}):
        assert stranger.get("/api/runs", headers=header).status_code == 401
    assert stranger.get("/api/runs", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    entered = stranger.get("/runs", params={"token": token, "first": "first"})
    assert (entered.status_code, str(entered.url)) == (200, "http://any.example/runs?first=first")
    assert stranger.get("/runs").status_code == 200, "the browser was given a cookie"


def test_the_description_says_that_there_is_a_token(root: Path) -> None:
    def schemes(**options: Any) -> Any:
        asker = TestClient(build_app(root, **options), headers={"authorization": "Bearer secret"})
        return asker.get("/openapi.json", headers={"host": "localhost"}).json().get("components", {})

    assert schemes(token="secret")["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert "securitySchemes" not in schemes()


def test_the_command_says_where_it_listens_and_stops_at_once(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mnemoscope", "serve", str(root / "first"), "--port", port, "--token", "a b"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        address = server.stderr.readline().strip()
        assert address == f"http://localhost:{port}/?token=a%20b"
        with httpx.Client(transport=httpx.HTTPTransport(retries=10), timeout=60) as asker:
            assert asker.get(f"http://localhost:{port}/api/runs").status_code == 401
            entered = asker.get(address, follow_redirects=True)
            assert entered.status_code == 200
            assert "token" not in str(entered.url)
            assert {run["run"] for run in asker.get(f"http://localhost:{port}/api/runs").json()} >= {"first", "second"}
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) in (0, 130, -signal.SIGINT)
        server.stderr.close()


def test_pages_of_the_web_cannot_ask_through_the_browser(client: TestClient, root: Path) -> None:
    elsewhere = TestClient(build_app(root), base_url="http://evil.example")
    assert error_of(elsewhere.get("/api/runs"), 400)[0] == "host"
    assert error_of(client.get("/api/runs", headers={"host": "["}), 400)[0] == "host"
    start = f"{CELL}/neurons/0/0"
    origins = ({"origin": origin} for origin in ("http://evil.example", "null", "http://[", "http://localhost:81"))
    for headers in ({"sec-fetch-site": "cross-site"}, *origins):
        assert error_of(client.post(start, headers=headers), 403)[0] == "origin"
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/runs", headers=link).status_code == 200, "a link to a page may be followed"
    assert (
        client.post(start, headers={"origin": "http://localhost", "sec-fetch-site": "same-origin"}).status_code == 202
    )


def test_a_damaged_run_hides_no_other(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "first", tmp_path / "first")
    shutil.copytree(root / "second", tmp_path / "second")
    (tmp_path / "second" / "results.json").write_text('{"schema": 1, "study": "x", "tasks": {"addition": {}}}')
    (tmp_path / "second" / "cells" / "addition-0" / "contrast.safetensors").unlink()
    client = TestClient(build_app(tmp_path), base_url="http://localhost", raise_server_exceptions=False)
    assert client.get("/runs").status_code == 200
    assert [bool(run["tasks"]) for run in client.get("/api/runs").json()] == [True, False]
    assert error_of(client.get("/api/runs/second/cells/addition-0"))[0] == "cell"
    assert client.get(CELL).status_code == 200


@pytest.mark.parametrize(
    ("host", "token", "run", "message"),
    [("0.0.0.0", None, None, "token: others can reach 0.0.0.0"), ("127.0.0.1", None, "letter", "is not a run folder")],
)
def test_the_server_refuses_what_is_unsafe(
    tmp_path: Path, host: str, token: str | None, run: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_reachable(tmp_path / run if run else None, host, 8000, token)


def test_a_run_that_has_nothing_to_show_yet_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"RUN: .*begun has no cell with steering vectors yet"):
        check_reachable(root / "begun", "127.0.0.1", 8000, None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"port: .*give another one"):
        check_reachable(root / "first", "127.0.0.1", taken.getsockname()[1], None)


def test_without_a_run_the_page_says_which_command_makes_one(tmp_path: Path) -> None:
    page = TestClient(build_app(tmp_path), base_url="http://localhost").get("/")
    assert page.status_code == 200
    assert "mnemoscope run quickstart" in page.text


def test_the_lines_to_copy_do_the_same(client: TestClient, pairs: list[Any], capsys: Any) -> None:
    for pair in pairs[:4]:
        question = pair["memorized"]
        for parts in ({}, {"layers": [1], "neurons": 8}):
            turning = {"toward": "generalized", "method": "nmd", "alpha": 2.0, **parts}
            asked = {"question": question, "turning": turning}
            expected = client.post(f"{CELL}/ask", json=asked).json()["said"]
            lines = client.post(f"{CELL}/snippets", json=asked).json()
            assert bool(lines["command"]) == (not parts)
            exec(lines["python"], {})
            printed = capsys.readouterr().out.replace(" ", "").removeprefix(question["prompt"].replace(" ", ""))
            assert printed.startswith(expected.replace(" ", ""))
            if lines["command"]:
                assert lines["command"].endswith(f"-- {shlex.quote(question['prompt'])}")


def statuses(operation: Any, mode: schemathesis.GenerationMode) -> list[int]:
    """What requests drawn from the description of an operation come to."""
    seen: list[int] = []

    @settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is schemathesis.GenerationMode.POSITIVE:  # of a cell that there is
            places = case.path_parameters or {}
            places |= {name: real for name, real in (("run", "first"), ("cell", "addition-0")) if name in places}
        response = case.call()
        seen.append(response.status_code)
        assert response.status_code < 500, (case.method, case.path, case.body, response.text)

    ask()
    return seen


def test_nothing_that_can_be_sent_breaks_the_server(address: str) -> None:
    """Requests drawn from the OpenAPI description, some as it says and some not."""
    specification = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in specification.get_all_operations()]
    assert len(operations) == 12
    right = [status for one in operations for status in statuses(one, schemathesis.GenerationMode.POSITIVE)]
    assert sum(status < 300 for status in right) > 30
    taking = [one for one in operations if one.path_parameters or one.query or one.body]
    wrong = [status for one in taking for status in statuses(one, schemathesis.GenerationMode.NEGATIVE)]
    assert sum(status >= 400 for status in wrong) > 100


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(build_app(root, "first"), port=0, log_level="error"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide", "phone"])
def tab(browser: Any, request: pytest.FixtureRequest, address: str) -> Iterator[Any]:
    """A page that may ask nobody but the server, and on which nothing goes wrong unnoticed."""
    width, scheme = request.param
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    yield tab
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert wrong == []
    tab.close()


def serious(tab: Any) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]


def test_the_playground_in_a_browser(tab: Any, address: str) -> None:
    tab.goto(f"{address}/?run=first")
    plain, steered = tab.locator("#plain .said"), tab.locator("#steered .said")
    expect(tab.locator("#plain.is-memorized:not(.waiting)")).to_have_count(1)
    remembered = plain.text_content()
    expect(steered).to_have_text(remembered)
    expect(tab.locator("#layer-rows tr")).to_have_count(2)
    tab.locator("#rephrase").click()
    expect(tab.locator("#plain.is-generalized:not(.waiting)")).to_have_count(1)
    assert plain.text_content() != remembered
    expect(tab.locator("#rephrase")).to_be_enabled()
    tab.locator("#rephrase").click()  # other words, drawn by the server
    expect(tab.locator(".waiting")).to_have_count(0)
    tab.locator("#slider").fill("-2")
    expect(tab.locator("#slid")).to_contain_text("2.00 times the run's vector towards remembering")
    expect(tab.locator(".waiting")).to_have_count(0)
    tab.locator("#finer summary").click()
    tab.locator("#same summary").click()
    expect(tab.locator("#python")).to_contain_text("to_memorized")
    assert serious(tab) == []
    tab.locator("#prompt").fill("What is that?")
    expect(tab.locator("#rephrase")).to_be_disabled()
    tab.locator("#ask").click()
    expect(tab.locator("#problem")).to_contain_text("cannot encode")
    expect(tab.locator("#problem")).to_be_in_viewport()
    assert serious(tab) == []
    expect(steered).to_have_text("\u2013")
    assert set(tab.locator("#layer-rows .bar + span").all_text_contents()) == {""}


def answer_on(tab: Any, side: str) -> dict[str, str]:
    """What a card shows, once nothing is waited for."""
    expect(tab.locator(".waiting")).to_have_count(0)
    card = tab.locator(f"#{side}")
    shown = {key: card.locator(f'[data-of="{key}"]').text_content() for key in ("memorized", "generalized")}
    layers = tab.locator(f'#layer-rows [data-of="{side}"]').all_text_contents()
    return {"said": card.locator(".said").text_content(), "layers": layers, **shown}


def as_shown(answer: dict[str, Any]) -> dict[str, Any]:
    """What a card is to show of an answer of the API."""

    def percent(share: float) -> str:
        whole = 100 * share
        if 0 < whole < 0.1:
            return "< 0.1 %"
        return f"{whole:.1f} %" if whole < 10 or whole > 90 else f"{whole:.0f} %"

    shown = {key: percent(answer[f"p_{key}"]) for key in ("memorized", "generalized")}
    layers = [percent(share) for share in answer["reading"]["p_memorized_by_layer"]]
    return {"said": answer["said"].strip(), "layers": layers, **shown}


def test_the_slider_shows_what_the_api_says(tab: Any, address: str, client: TestClient, pairs: list[Any]) -> None:
    tab.goto(f"{address}/?run=first")
    expect(tab.locator("#plain.is-memorized:not(.waiting)")).to_have_count(1)
    question = client.get(f"{CELL}/questions?n=24").json()[0]["memorized"]
    assert tab.locator("#prompt").input_value() == question["prompt"]
    by_itself = answer_on(tab, "plain")
    assert by_itself == as_shown(client.post(f"{CELL}/ask", json={"question": question}).json())
    tab.locator("#finer summary").click()
    for method, place in (("nmd", "1"), ("learned", "2"), ("learned", "-1.5")):
        tab.locator("#method").select_option(method)
        tab.locator("#slider").fill(place)
        toward = "generalized" if float(place) > 0 else "memorized"
        turning = {"toward": toward, "method": method, "alpha": abs(float(place))}
        expected = client.post(f"{CELL}/ask", json={"question": question, "turning": turning}).json()
        assert answer_on(tab, "steered") == as_shown(expected)
        assert answer_on(tab, "plain") == by_itself
    tab.locator("#method").select_option("nmd")
    tab.locator("#slider").fill("1")
    tab.locator("#neurons").fill("3")
    tab.locator("#neurons").blur()
    turning = {"toward": "generalized", "method": "nmd", "alpha": 1.0, "neurons": 3}
    expected = client.post(f"{CELL}/ask", json={"question": question, "turning": turning}).json()
    assert answer_on(tab, "steered") == as_shown(expected)
    tab.locator("#neurons").fill("99999")
    tab.locator("#neurons").blur()
    expect(tab.locator("#problem")).to_contain_text("neurons: 99999")
    expect(tab.locator("#steered .said")).to_have_text("\u2013")  # nothing stale beside what the page says now
    tab.locator("#neurons").fill("")
    tab.locator("#neurons").blur()
    tab.locator("#slider").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#slid")).to_contain_text("1.05 times")
    expect(tab.locator("#problem")).to_be_hidden()
    tab.locator("#slider").fill("0")
    assert answer_on(tab, "steered") == by_itself
    tab.locator("#example").select_option("1")
    expect(tab.locator("#prompt")).not_to_have_value(question["prompt"])
    assert answer_on(tab, "plain") == answer_on(tab, "steered")


def test_lines_are_copied(tab: Any, address: str) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto(f"{address}/?run=first")
    expect(tab.locator("#plain.is-memorized:not(.waiting)")).to_have_count(1)
    tab.locator("#same summary").click()
    copy = tab.get_by_role("button", name="Copy the Python")
    expect(copy).to_be_disabled()  # nothing is turned yet
    tab.locator("#slider").fill("1")
    expect(copy).to_be_enabled()
    copy.click()
    expect(tab.locator("[data-copies=python]")).to_have_text("Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == tab.locator("#python").text_content()


def test_a_neuron_in_a_browser(tab: Any, address: str) -> None:
    tab.goto(f"{address}/neurons?run=first")
    expect(tab.locator("#pointed")).to_contain_text("Layer")
    tab.locator("#canvas").focus()
    before = tab.locator("#pointed").text_content()
    tab.keyboard.press("ArrowLeft" if "neuron 63" in before else "ArrowRight")
    assert tab.locator("#pointed").text_content() != before
    tab.keyboard.press("Enter")
    expect(tab.locator("#found svg")).to_be_visible()
    expect(tab.locator("#alone tr")).to_have_count(3)
    assert serious(tab) == []
    tab.get_by_label("correlation with the behaviour").check()
    box = tab.locator("#canvas").bounding_box()
    tab.locator("#canvas").click(position={"x": box["width"] * 0.5, "y": box["height"] * 0.25})
    expect(tab.locator("#neuron-title")).to_have_text("Neuron 32 of layer 1")  # later layers stand higher
    expect(tab.locator("#found svg")).to_be_visible()
    tab.locator("#layer").fill("0")
    tab.locator("#number").fill("7")
    tab.get_by_role("button", name="Look into it").click()
    expect(tab.locator("#neuron-title")).to_have_text("Neuron 7 of layer 0")
    expect(tab.locator("#pointed")).to_contain_text("Layer 0, neuron 7:")
    expect(tab.locator("#found svg")).to_be_visible()


def test_looking_into_a_neuron_can_be_cancelled(tab: Any, address: str) -> None:
    tab.goto(f"{address}/neurons?run=first")
    expect(tab.locator("#pointed")).to_contain_text("Layer")
    # The job is still running whenever the page asks.
    running = {"job": "one", "state": "running", "share": 0.5, "result": None, "error": ""}
    dropped: list[str] = []

    def answer(route: Any) -> None:
        dropped.append(route.request.method)
        route.fulfill(json=running)

    tab.route("**/api/jobs/one", answer)
    tab.route("**/neurons/*/*", lambda route: route.fulfill(json=running))
    tab.locator("#canvas").focus()
    tab.keyboard.press("Enter")
    expect(tab.locator("#progress")).to_have_js_property("value", 0.5)
    assert serious(tab) == []
    tab.get_by_role("button", name="Cancel").click()
    expect(tab.locator("#neuron")).to_be_hidden()
    assert "DELETE" in dropped


def test_runs_side_by_side_in_a_browser(tab: Any, address: str) -> None:
    tab.goto(f"{address}/runs")
    width = tab.viewport_size["width"]
    for shown in tab.locator("[name=second]").all():
        box = shown.bounding_box()
        assert box["x"] + box["width"] <= width  # a phone shows what one came for without scrolling sideways
    tab.locator("[name=first][value=first]").check()
    tab.locator("[name=second][value=second]").check()
    tab.get_by_role("button", name="Compare").click()
    assert tab.locator("h2.side-by-side").text_content() == "first beside second"
    assert serious(tab) == []
    lines = [row.split("\t") for row in tab.locator("table").nth(1).inner_text().split("\n")]
    rows = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert all(c["x"] + c["width"] <= width for c in (v.bounding_box() for v in tab.locator("td:last-child").all()))
    assert {"pairs", "neurons that differ", "test states read right by a probe"} < set(rows)
    assert all(first == second for what, (first, second) in rows.items() if what != "What")
    tab.get_by_role("link", name="report").first.click()
    expect(tab.locator("h1")).to_be_visible()
    assert tab.url.endswith("/report")
    assert serious(tab) == []
    tab.goto(f"{address}/?run=missing")
    assert "missing" in tab.locator(".problem").text_content()
    assert serious(tab) == []
