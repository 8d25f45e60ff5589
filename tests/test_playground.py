"""The playground in a browser and as a server: its pages work, and it answers nobody without the token."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from playwright.sync_api import expect

from mnemoscope.runs.errors import InputError
from mnemoscope.web.app import LARGEST_BODY, build_app, serve
from mnemoscope.web.parts import Neurons
from mnemoscope.web.runs import Runs
from mnemoscope.web.shapes import Look
from playground import CELL, KNOWN, TOKEN, client_of, error_of, random_reader, served


@pytest.fixture(scope="module")
def reader_of_second(playground_runs: Path) -> Path:
    """Made before a server opens models in another thread: the library must not open two at the same time."""
    run, folder = playground_runs / "second", playground_runs / "reader"
    random_reader(run)
    folder.mkdir()
    for name in ("reader.safetensors", "reader.json"):
        shutil.move(run / name, folder)
    return folder


@pytest.fixture(scope="module")
def address(playground_runs: Path, reader_of_second: Path) -> Iterator[str]:  # the reader first
    with served(build_app(Runs(playground_runs), TOKEN, "first")) as address:
        yield address


# --- who is answered ------------------------------------------------------------------------------------------------


def test_nobody_is_answered_without_the_token(playground_runs: Path) -> None:
    stranger = TestClient(build_app(Runs(playground_runs), TOKEN), base_url="http://localhost")
    for path in ("/api/runs", "/openapi.json", f"/api/runs?token={TOKEN}"):
        assert error_of(stranger.get(path), 401)[0] == "token"
    for path in ("/", "/?token=", "/?token=wrong", "/runs", f"/runs?token={TOKEN}", "/static/playground.js", "/none"):
        refused = stranger.get(path)
        assert refused.status_code == 401
        assert "mnemoscope serve" in refused.text
        assert "ssh -L 80:127.0.0.1:80 " in refused.text
    assert stranger.get("/static/playground.css").status_code == 200, "the page that says so needs it"
    others = ("Bearer wrong", "Bearer", TOKEN, f"Basic {TOKEN}", "Bearer \u00e9")
    for header in (*({"Authorization": other.encode()} for other in others), {"Cookie": "a/b=1; mnemoscope-None="}):
        assert stranger.get("/api/runs", headers=header).status_code == 401
    assert stranger.get("/api/runs", headers=KNOWN).status_code == 200


def test_the_token_moves_from_the_address_into_a_cookie(playground_runs: Path) -> None:
    browser = TestClient(build_app(Runs(playground_runs), TOKEN), base_url="http://localhost:8000")
    entered = browser.get("/", params={"token": TOKEN, "run": "second"}, follow_redirects=False)
    assert (entered.status_code, entered.headers["location"]) == (303, "/?run=second")
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert browser.get("/?run=second").status_code == 200
    assert browser.get("/api/runs").status_code == 200
    again = browser.get("/?token=old", follow_redirects=False)
    assert (again.status_code, again.headers["location"]) == (303, "/"), "a bookmark of the last start"
    other_port = {"host": "localhost:8001"}
    assert browser.get("/api/runs", headers=other_port).status_code == 401, "each port has a cookie of its own"


def test_pages_of_other_sites_cannot_ask_through_the_browser(client: TestClient, playground_runs: Path) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "0.0.0.0", "[::1]:8000"):
        assert client_of(playground_runs, host).get("/api/runs").status_code == 400
    assert client.get("/api/runs", headers={"host": "["}).status_code == 400
    start = f"{CELL}/neurons/0/0"
    origins = ({"origin": origin} for origin in ("http://evil.example", "null", "http://[", "http://localhost:81"))
    for headers in ({"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, *origins):
        assert error_of(client.post(start, headers=headers), 403)[0] == "origin"
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/runs", headers=link).status_code == 200, "a link to a page may be followed"
    for path in ("/api/runs", "/openapi.json", CELL):
        assert error_of(client.get(path, headers=link), 403)[0] == "origin"
    assert error_of(client.post(start, headers=link), 403)[0] == "origin"
    own = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
    assert client.post(start, headers=own).status_code == 200


def test_a_request_body_is_limited(client: TestClient) -> None:
    long, headers = {"question": {"prompt": "1" * LARGEST_BODY}}, {"content-type": "application/json"}
    assert error_of(client.post(f"{CELL}/ask", json=long), 413)[0] == "body"
    assert error_of(client.post(f"{CELL}/ask", content=iter([b"{}"]), headers=headers), 411)[0] == "body"
    assert error_of(client.post(f"{CELL}/ask", content=b"{", headers=headers))[0] == "body"


def test_every_answer_forbids_sniffing_framing_and_referrers(address: str) -> None:
    for path in ("/", "/api/runs", "/static/playground.js", "/runs/first/report", "/none"):
        headers = httpx.get(address + path, headers=KNOWN, timeout=60).headers
        named = ("x-content-type-options", "x-frame-options", "referrer-policy")
        assert [headers[name] for name in named] == ["nosniff", "DENY", "no-referrer"]
        assert ("content-security-policy" in headers) is not path.startswith(("/api", "/static"))
        if path.endswith("/report"):
            assert re.search(r"; sandbox$", headers["content-security-policy"]), "and nothing is allowed in it"


def test_a_look_at_a_neuron_lets_requests_go_and_ends_with_its_client(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count()
    monkeypatch.setattr(Neurons, "watch", lambda *_: (Look(share=next(steps) / 1e9) for _ in count()))  # no end
    with httpx.stream("POST", f"{address}{CELL}/neurons/0/0", headers=KNOWN, timeout=60) as look:
        assert look.headers["content-type"] == "application/x-ndjson"
        assert json.loads(next(look.iter_lines())) == {"share": 0.0, "result": None}
        assert httpx.get(f"{address}{CELL}", headers=KNOWN, timeout=60).status_code == 200
    for _ in range(100):
        before = next(steps)
        time.sleep(0.1)
        if next(steps) == before + 1:
            return
    raise AssertionError("it goes on without its client")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_an_address_with_a_token_and_stops_at_once(playground_runs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mnemoscope", "serve", str(playground_runs / "first"), "--port", port]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        address, start = server.stderr.readline().strip(), f"http://127.0.0.1:{port}/"
        assert address.startswith(f"{start}?token=")
        assert len(address) > len(f"{start}?token=") + 40
        with httpx.Client(base_url=start, timeout=60) as asker:
            assert asker.get("/api/runs").status_code == 401
            entered = asker.get(address, follow_redirects=True)
            assert (entered.status_code, str(entered.url)) == (200, start)
            assert [run["run"] for run in asker.get("/api/runs").json()] == ["first"], "without --siblings"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) in (0, 130, -signal.SIGINT)
        server.stderr.close()


def test_what_cannot_be_served_is_refused(playground_runs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for run, message in (
            (tmp_path / "letter", r"RUN: .*letter is not a run folder"),
            (playground_runs / "begun", r"RUN: .*begun has no cell with steering vectors yet"),
            (playground_runs / "first", rf"port: {port} .*give another one"),
        ):
            with pytest.raises(InputError, match=message):
                serve(run, port, print)


# --- requests drawn from the description ----------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "many"), [("POSITIVE", 30), ("NEGATIVE", 50)])
def test_nothing_that_can_be_sent_breaks_the_server(address: str, mode: str, many: int) -> None:
    """Requests drawn from the OpenAPI description: of a cell that there is, as it says, or not as it says."""
    specification = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=KNOWN)
    assert specification.raw_schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    operations = [found.ok() for found in specification.get_all_operations()]
    assert len(operations) == 8
    real, seen = {"run": "first", "cell": "addition-0"} if mode == "POSITIVE" else {}, list[int]()
    for operation in operations:
        if mode == "NEGATIVE" and not (operation.path_parameters or operation.query or operation.body):
            continue

        @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def ask(case: Any) -> None:
            places = case.path_parameters or {}
            places |= {name: value for name, value in real.items() if name in places}
            response = case.call(headers=KNOWN)
            seen.append(response.status_code)
            assert response.status_code < 500, (case.method, case.path, case.body, response.text)

        ask()
    assert sum(status < 300 if real else status >= 400 for status in seen) > many


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide", "phone"])
def tab(browser: Any, request: pytest.FixtureRequest, address: str) -> Iterator[Any]:
    """A page that came in by the token, may ask nobody but the server, and on which nothing goes wrong unnoticed."""
    width, scheme = request.param
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    tab.goto(f"{address}/?token={TOKEN}&run=first")
    assert tab.url == f"{address}/?run=first"
    yield tab
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert wrong == []
    tab.close()


def serious(tab: Any) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]


def shown(tab: Any, side: str) -> dict[str, Any]:
    """The content of an answer's card, once nothing is waited for."""
    expect(tab.locator(".waiting")).to_have_count(0)
    card = tab.locator(f"#{side}")
    values = {key: card.locator(f'[data-of="{key}"]').text_content() for key in ("memorized", "generalized")}
    layers = tab.locator(f'#layer-rows [data-of="{side}"]').all_text_contents()
    return {"said": card.locator(".said").text_content(), "layers": layers, **values}


def expected(client: TestClient, question: dict[str, Any], steering: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a card is to show of the API's answer."""
    answer = client.post(f"{CELL}/ask", json={"question": question, "steering": steering}).json()

    def percent(share: float) -> str:
        whole = 100 * share
        return "< 0.1 %" if 0 < whole < 0.1 else f"{whole:.{int(whole < 10 or whole > 90)}f} %"

    values = {key: percent(answer[f"p_{key}"]) for key in ("memorized", "generalized")}
    layers = [percent(share) for share in answer["reading"]["p_memorized_by_layer"]]
    return {"said": answer["said"].strip(), "layers": layers, **values}


def test_a_question_is_asked_rephrased_and_steered(tab: Any) -> None:
    plain, steered = tab.locator("#plain .said"), tab.locator("#steered .said")
    expect(tab.locator("#plain.is-memorized:not(.waiting)")).to_have_count(1)
    remembered = plain.text_content()
    expect(tab.locator("#slid")).to_contain_text("1.00 \u00d7 the run's vector towards working it out")
    expect(tab.locator("#ranks")).to_contain_text(
        re.compile(r"ranks \S+ % \(.* of \d+\) of test prompts .* the wording alone \S+ %")
    )
    expect(tab.locator("#layer-rows tr")).to_have_count(2)
    tab.locator("#rephrase").click()
    expect(tab.locator("#plain.is-generalized:not(.waiting)")).to_have_count(1)
    assert plain.text_content() != remembered
    expect(tab.locator("#rephrase")).to_be_enabled()
    tab.locator("#rephrase").click()  # another phrasing, drawn by the server
    expect(tab.locator(".waiting")).to_have_count(0)
    tab.locator("#slider").fill("-2")
    expect(tab.locator("#slid")).to_contain_text("2.00 \u00d7 the run's vector towards remembering")
    expect(tab.locator(".waiting")).to_have_count(0)
    tab.locator("#finer summary").click()
    assert serious(tab) == []
    tab.locator("#prompt").fill("What is that?")
    expect(tab.locator("#rephrase")).to_be_disabled()
    tab.locator("#ask").click()
    expect(tab.locator("#problem")).to_contain_text("no token for")
    expect(tab.locator("#problem")).to_be_in_viewport()
    assert serious(tab) == []
    expect(steered).to_have_text("\u2013")
    assert set(tab.locator("#layer-rows .bar + span").all_text_contents()) == {""}


def test_the_slider_shows_what_the_api_says(tab: Any, client: TestClient) -> None:
    expect(tab.locator("#plain.is-memorized:not(.waiting)")).to_have_count(1)
    question = client.get(f"{CELL}/questions?n=24").json()[0]["memorized"]
    assert tab.locator("#prompt").input_value() == question["prompt"]
    unsteered, methods = expected(client, question), client.get(CELL).json()["methods"]
    best = next(method for method, of in methods.items() if of["generalized"]["best"])  # it starts steered
    assert shown(tab, "steered") == expected(client, question, {"toward": "generalized", "method": best})
    tab.locator("#finer summary").click()
    for method, place, neurons in (("nmd", 1, None), ("learned", 2, None), ("learned", -1.5, None), ("nmd", 1, 3)):
        tab.locator("#method").select_option(method)
        tab.locator("#slider").fill(str(place))
        tab.locator("#neurons").fill(str(neurons or ""))
        tab.locator("#neurons").blur()
        toward = "generalized" if place > 0 else "memorized"
        steering = {"toward": toward, "method": method, "alpha": abs(place), "neurons": neurons}
        assert shown(tab, "steered") == expected(client, question, steering)
        assert shown(tab, "plain") == unsteered
    tab.locator("#neurons").fill("99999")
    tab.locator("#neurons").blur()
    expect(tab.locator("#problem")).to_contain_text("neurons: 99999")
    expect(tab.locator("#steered .said")).to_have_text("\u2013")  # nothing stale beside the new settings
    tab.locator("#neurons").fill("")
    tab.locator("#neurons").blur()
    tab.locator("#slider").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#slid")).to_contain_text("1.05 \u00d7")
    expect(tab.locator("#problem")).to_be_hidden()
    tab.locator("#slider").fill("0")
    assert shown(tab, "steered") == unsteered
    tab.locator("#example").select_option("1")
    expect(tab.locator("#prompt")).not_to_have_value(question["prompt"])
    assert shown(tab, "plain") == shown(tab, "steered")


def test_a_neuron_is_chosen_by_keys_pointer_and_number(tab: Any, address: str) -> None:
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
    tab.locator("#layer").fill("0")
    tab.locator("#number").fill("7")
    tab.get_by_role("button", name="Show it").click()
    expect(tab.locator("#neuron-title")).to_have_text("Neuron 7 of layer 0")
    expect(tab.locator("#pointed")).to_contain_text("Layer 0, neuron 7:")
    expect(tab.locator("#found svg")).to_be_visible()
    # A look that does not come to an end can be left.
    tab.route("**/neurons/*/*", lambda route: None)
    tab.get_by_role("button", name="Show it").click()
    expect(tab.locator("#progress")).to_have_js_property("value", 0)
    assert serious(tab) == []
    tab.get_by_role("button", name="Cancel").click()
    expect(tab.locator("#neuron")).to_be_hidden()
    expect(tab.locator("#problem")).to_be_hidden()


def test_an_answer_is_coloured_while_it_is_written(tab: Any, address: str, reader_of_second: Path) -> None:
    run = reader_of_second.parent / "second"
    for name in ("reader.safetensors", "reader.json"):  # of another width
        (run / name).unlink(missing_ok=True)
    tab.goto(f"{address}/sources?run=second")
    asked = "35+55="
    tab.locator("#question").fill(asked)
    tab.get_by_role("button", name="Answer").click()
    expect(tab.locator("#problem")).to_contain_text("reader: this run has none")
    for name in ("reader.safetensors", "reader.json"):
        shutil.copy(reader_of_second / name, run)
    tab.get_by_role("button", name="Answer").click()
    expect(tab.locator("#shares")).to_contain_text("Names and numbers: document 0 %")
    expect(tab.locator("#problem")).to_be_hidden()
    tab.locator("#document").fill(asked)
    tab.get_by_role("button", name="Answer").click()
    expect(tab.locator("#shares")).to_contain_text("Names and numbers: document")
    assert serious(tab) == []


def test_runs_lead_to_their_reports(tab: Any, address: str) -> None:
    tab.goto(f"{address}/runs")
    width = tab.viewport_size["width"]
    boxes = [link.bounding_box() for link in tab.get_by_role("link", name="playground").all()]
    assert all(box["x"] + box["width"] <= width for box in boxes)  # a phone shows them without scrolling sideways
    assert serious(tab) == []
    tab.get_by_role("link", name="report").first.click()
    expect(tab.locator("h1")).to_be_visible()
    assert tab.url.endswith("/report")
    tab.goto(f"{address}/?run=missing")
    assert "missing" in tab.locator(".problem").text_content()
    assert serious(tab) == []
