"""The playground's API: it answers as the library does, mixes no requests up, and refuses by name."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product, repeat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient

from mnemoscope.behaviour import prepare, score
from mnemoscope.config import dump_study, load_study
from mnemoscope.interventions import LowRank, SteeringVector, Toward
from mnemoscope.runs.digests import read_marker, write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics.contrast import Contrast
from mnemoscope.study.stages import Records, cell_model
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.shapes import Asked, Question, Steering
from playground import CELL, client_of, error_of, in_thread_of_cell


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
            assert answer["behaviour"] == behaviour
            assert answer["said"] == question[behaviour]
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
        asked = [Question.of(example) for example in library[1].targets("test", f"to_{toward}", len(after))]
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
    for example in records.targets("test", "to_generalized", 4):
        found = cell.answer(Question.of(example), Steering(toward="generalized", method="nmd"))
        prompt = asking.tokenizer(asking.text(example.prompt)).input_ids
        whole = asking.tokenizer(asking.whole(example, str(example.memorized))).input_ids
        with torch.no_grad(), vector.apply(asking.model):
            logp_TV = asking.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        wanted = sum(float(logp_TV[t - 1, whole[t]]) for t in range(len(prompt), len(whole)))
        assert math.log(found.p_memorized) == pytest.approx(wanted, abs=1e-3)


def test_a_page_that_leads_on_is_not_shown(client: TestClient, playground_runs: Path) -> None:
    """Also where a browser reads it as something else than it is told."""
    path = playground_runs / "first" / "report.html"
    before, redirect = path.read_bytes(), "<meta http-equiv='refresh' content='0; url=//other.example'>"
    marker = playground_runs / "first" / "stages" / "report.json"
    kept = marker.read_bytes()
    try:
        for page in (redirect.encode(), redirect.encode("utf-16"), b"\xef\xbb\xbf<p>", b"<p>\0"):
            path.write_bytes(page)
            marker.unlink()
            write_marker(playground_runs / "first", "report", [path, path.with_name("results.json")])
            found = client.get("/runs/first/report")
            assert found.status_code == 422
            assert "that mnemoscope did not write" in found.text
    finally:
        path.write_bytes(before)
        marker.write_bytes(kept)
    assert client.get("/runs/first/report").status_code == 200


def test_a_vector_of_another_model_is_refused(playground_runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(playground_runs / "first", tmp_path / "run")
    cell = run / "cells" / "addition-0"
    path = cell / "vectors" / "to_generalized-learned.safetensors"
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
    opened = OpenedCell(run, "addition-0", model)
    asked = Asked(question=Question(prompt="12+34="), steering=Steering(toward="generalized", method="nmd", neurons=3))
    assert f"OpenedCell({str(run)!r}, 'addition-0', model={str(model)!r})" in opened.snippets(asked)["python"]


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
    steering = {"toward": "memorized", "method": "learned", "alpha": 2}
    assert client.post(f"{CELL}/ask", json=asked | {"steering": steering}).status_code == 200


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
    questions = [question for pair in pairs[:6] for question in pair.values()]
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


# --- neurons and jobs -----------------------------------------------------------------------------------------------


def finished(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    for _ in range(2000):
        state: dict[str, Any] = client.get(f"/api/jobs/{job['job']}").json()
        if state["state"] != "running":
            return state
        time.sleep(0.01)
    raise AssertionError("the job does not end")


def test_a_neuron_is_shown_on_tune_pairs(client: TestClient, library: Any) -> None:
    asking, records, contrast = library
    layer, neuron = map(int, np.unravel_index(np.abs(contrast.rho_LD).argmax(), contrast.rho_LD.shape))
    started = client.post(f"{CELL}/neurons/{layer}/{neuron}")
    assert started.status_code == 202
    seen = finished(client, started.json())["result"]
    assert seen["rank_rho"] == 1
    tune = records.both_sides("tune", 100)
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
    assert seen["pairs"] == len(tune)
    assert seen["drawing"].startswith("<svg")
    assert [row["times"] for row in seen["alone"]] == [1, 4, 16]
    assert error_of(client.get("/api/jobs/none"), 404)[0] == "job"
    assert error_of(client.post(f"{CELL}/neurons/0/9999"), 422) == ("neuron", "9999 is not in 0 .. 63")


def test_a_job_can_be_cancelled_and_lets_requests_go_between_its_steps(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    neurons = in_thread_of_cell(client, lambda cell: cell.neurons).result()
    monkeypatch.setattr(neurons, "watch", lambda layer, neuron: repeat(0.25))  # steps without an end
    job = client.post(f"{CELL}/neurons/0/0").json()
    assert job["state"] == "running"
    jobs = client.app.state.jobs  # type: ignore[attr-defined]
    seen = in_thread_of_cell(client, lambda cell: jobs.get(job["job"]).model_copy()).result()
    assert seen.state == "running"
    assert client.delete(f"/api/jobs/{job['job']}").json()["state"] == "cancelled"
    assert client.get(f"/api/jobs/{job['job']}").json()["state"] == "cancelled"
    monkeypatch.undo()
    assert finished(client, client.post(f"{CELL}/neurons/0/0").json())["state"] == "done"


# --- runs -----------------------------------------------------------------------------------------------------------


def test_runs_are_listed_and_compared(client: TestClient) -> None:
    runs = {row["run"]: row for row in client.get("/api/runs").json()}
    assert {name: row["finished"] for name, row in runs.items()} == {"first": True, "second": True, "begun": False}
    assert runs["first"]["cells"] == ["addition-0"]
    rows = client.get("/api/compare?first=first&second=second").json()
    assert rows
    assert all(row["first"] == row["second"] for row in rows), "one is a copy of the other"
    assert error_of(client.get("/api/compare?first=first&second=none"), 422)[0] == "second"
    assert "first and begun" in client.get("/runs?first=first&second=begun").text


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
        for path in (f"/api/runs/{said}", f"/runs/{said}/report", f"/?run={said}", f"/api/runs/first/cells/{said}"):
            assert client.get(path).status_code in (404, 422), path


def test_a_damaged_run_hides_no_other(playground_runs: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(playground_runs / name, tmp_path / name)
    (tmp_path / "second" / "results.json").write_text('{"schema": 1, "study": "x", "tasks": {"addition": {}}}')
    (tmp_path / "second" / "cells" / "addition-0" / "contrast.safetensors").unlink()
    with client_of(tmp_path) as client:
        assert client.get("/runs").status_code == 200
        listed = client.get("/api/runs").json()
        assert [bool(run["tasks"]) for run in listed] == [True, False]
        assert listed[0]["damaged"] is None
        assert "results.json: is damaged" in listed[1]["damaged"]
        assert "results.json: is damaged" in client.get("/runs").text
        for _ in range(2):
            assert error_of(client.get("/api/runs/second/cells/addition-0"))[0] == "cell"
        assert client.get(CELL).status_code == 200


def test_the_lines_to_copy_do_the_same(client: TestClient, pairs: list[Any], capsys: Any) -> None:
    for question, parts in product([pair["memorized"] for pair in pairs[:4]], ({}, {"layers": [1], "neurons": 8})):
        steering = {"toward": "generalized", "method": "nmd", "alpha": 2.0, **parts}
        asked = {"question": question, "steering": steering}
        expected = client.post(f"{CELL}/ask", json=asked).json()["said"]
        lines = client.post(f"{CELL}/snippets", json=asked).json()
        exec(lines["python"], {})
        printed = capsys.readouterr().out.replace(" ", "").removeprefix(question["prompt"].replace(" ", ""))
        assert printed.startswith(expected.replace(" ", ""))
        assert lines["command"].endswith("" if parts else f"-- {shlex.quote(question['prompt'])}")
        assert bool(lines["command"]) == (not parts)
