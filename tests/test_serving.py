"""The parts of the vLLM plugin that need no vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace as tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

import mnemoscope as ms
from little_facts import VOCABULARY
from mnemoscope.config import ModelConfig
from mnemoscope.interventions import Binding
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.runs.errors import InputError
from mnemoscope.serving import http, metrics, plugin
from mnemoscope.serving.admission import ADMITTED, Asked, Offered, admit, key_of_block, parse
from mnemoscope.serving.worker import NEVER, rows_of
from served import random_run

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steer": "sideways"}, "steer: 'sideways' is not one of generalized, memorized"),
    ({"steer": ["generalized"]}, "steer: "),
    ({"steer": True}, "steer: True is not one of"),
    ({"steer": "generalized", "alpha": -1}, "alpha: -1 is not a number in 0 .. 100"),
    ({"steer": "generalized", "alpha": "1"}, "alpha: '1' is not"),
    ({"steer": "generalized", "alpha": math.nan}, "alpha: nan is not"),
    ({"steer": "generalized", "alpha": True}, "alpha: True is not"),
    ({"steer": "generalized", "gate": 1.5}, "gate: 1.5 is not a number in 0 .. 1"),
    ({"steer": "generalized", "lever": ["shift"]}, "lever: ['shift'] is no name of a lever"),
    ({"alpha": 2.0}, "alpha: 2.0 is given without steer"),
    ({"gate": 0.5, "read": True}, "gate: 0.5 is given without steer"),
    ({"read": "perhaps"}, "read: 'perhaps' is not one of true, false"),
    ({"steer": "generalized", "alpha": 1e39}, "alpha: 1e+39 is not a number in 0 .. 100"),
    ({"toward": "context"}, "toward: is no setting; did you mean steer?"),
    ({"steering": "context"}, "steering: is no setting; did you mean steer?"),
    ({"steer": "context", "strength": 3}, "strength: is no setting; did you mean steer?"),
    ({"stear": "generalized"}, "stear: is no setting; did you mean steer?"),
    ({"Steer": "generalized"}, "Steer: is no setting; did you mean steer?"),
    ({ADMITTED: {"key": None}}, f"{ADMITTED}: is set by the server alone"),
]


@pytest.mark.parametrize(("given", "told"), WRONG, ids=str)
def test_what_is_asked_wrongly_is_refused_in_one_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=r"^" + re.escape(told)) as error:
        parse(given)
    assert "\n" not in str(error.value)


def test_what_is_asked_rightly_is_read() -> None:
    assert parse(None) is None
    assert parse({"session_id": "a", "kv_transfer_params": {}}) is None
    assert parse({"steer": "context", "alpha": 2, "gate": 0}) == Asked("generalized", 2.0, 0.0)
    assert parse({"steer": "memory", "read": 1}) == Asked("memorized", read=True)


def made(out: Path, *everywhere: str) -> Offered:
    tokenizer = word_tokenizer(VOCABULARY, 128)
    model = build_gpt2(tokenizer, ModelConfig(layers=4, width=32, heads=2, context=128), 0).eval()
    run = random_run(out, model, tokenizer, 1, everywhere=everywhere)
    return Offered.open(run, Binding.of(model, tokenizer))


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> Offered:
    return made(tmp_path_factory.mktemp("served"))


def test_another_model_is_refused_at_start(offered: Offered, tmp_path: Path) -> None:
    vector = offered.vectors["generalized"]
    file, _ = vector.save(tmp_path / "v.safetensors")
    alone = Offered.of({"generalized": {"shift": vector}}, None, None).digest
    assert Offered.open(file, vector.binding).digest == alone != offered.digest
    assert Offered.of({"generalized": {"shift": 2 * vector}}, None, None).digest != alone
    with pytest.raises(InputError, match=r"^weights: the vector of .* was made on"):
        Offered.open(file, replace(vector.binding, weights="0" * 64))


def test_what_no_detector_below_the_shift_can_read_is_refused(offered: Offered) -> None:
    above = Offered.of(offered.levers, offered.detectors["detector"], None)
    assert admit(Asked(read=True), above, [1], 1).read_by == "detector"
    assert admit(Asked("memorized", 0.5, 0.3, True), offered, [1, 2], 2).gate_by == "lower"
    for asked, there, message in (
        (
            Asked("generalized", gate=0.5),
            above,
            "gate: the detector reads block 2, this shift changes block 1 and above",
        ),
        (
            Asked("generalized", read=True),
            above,
            "read: the detector reads .*, or read first and steer in a second request$",
        ),
        (Asked(read=True), Offered.of(offered.levers, None, None), "read: this server has no detector"),
        (
            Asked("generalized"),
            Offered.of({}, None, None),
            "steer: this server has no vector or adapter to generalized; it has none",
        ),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            admit(asked, there, [1, 2, 3], 3)


def test_cached_blocks_are_kept_apart_from_the_first_shifted_position_on(offered: Offered) -> None:
    def key(asked: Asked, prompt: int, end: int) -> Any:
        return key_of_block({ADMITTED: asdict(admit(asked, offered, list(range(prompt)), prompt))}, end)

    steered, other = Asked("generalized"), Asked("generalized", 1.5)
    assert key(steered, 38, 32) is None  # of the prompt before it: shared with everybody
    assert key(steered, 33, 32) is None
    assert key(steered, 32, 32) is not None  # position 31 is its last token
    assert key(steered, 38, 64) == key(steered, 38, 96) == key(replace(steered, read=True), 38, 64)
    ways = [steered, other, Asked("memorized"), Asked("generalized", gate=0.5), Asked("generalized", gate=0.6)]
    assert len({key(way, 38, 64) for way in ways}) == len(ways)
    assert key(steered, 38, 64) != key(steered, 40, 64)  # the same tokens may begin to be shifted elsewhere
    assert key(Asked("generalized", 0.0), 38, 64) is None
    assert key(Asked(read=True), 38, 64) is None
    assert key_of_block(None, 64) is None


def test_a_vector_of_all_positions_has_its_key_from_the_first_block_on(tmp_path: Path) -> None:
    offered = made(tmp_path, "generalized", "memorized")
    admitted = admit(Asked("generalized"), offered, list(range(40)), 40)
    assert (admitted.start, admitted.decision) == (0, 39)
    assert key_of_block({ADMITTED: asdict(admitted)}, 16) is not None
    with pytest.raises(InputError, match=r"^read: the detector reads .*, this shift changes every token"):
        admit(Asked("generalized", read=True), offered, [1], 1)
    with pytest.raises(InputError, match=r"^gate: what acts on every token is gated by a pass beforehand"):
        admit(Asked("generalized", gate=0.5), offered, [1], 1)
    deciding = admit(Asked("generalized", gate=0.5), offered, [1], 1, deciding=True)
    assert (deciding.start, deciding.gate_by, deciding.adapted) == (None, "detector", False)
    assert key_of_block({ADMITTED: asdict(deciding)}, 16) is None  # nothing acts yet


def test_a_prompt_without_the_chat_template_is_refused(offered: Offered) -> None:
    vector = ms.SteeringVector("generalized", dict(offered.vectors["generalized"].shifts), opening=(7, 8))
    chatting = Offered({"generalized": {"shift": vector}}, {})
    admit(Asked("generalized"), chatting, [7, 8, 9], 3)
    with pytest.raises(InputError, match=r"^steer: the prompt is not formatted by the chat template"):
        admit(Asked("generalized"), chatting, [7, 9, 9], 3)


ENGINE = SimpleNamespace(vllm_config=SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=None)))
STEER = {"steer": "generalized"}
CHAT = "/v1/chat/completions"
IGNORED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {**STEER}, "steer: is ignored here"),
    (CHAT, {"read": True, "vllm_xargs": STEER}, "read: is ignored here"),
    (CHAT, {"extra_body": {"vllm_xargs": STEER}}, "steer: is ignored in extra_body.vllm_xargs here"),
    (CHAT, {"vllm_xarg": STEER}, "steer: is ignored in vllm_xarg here"),
    (CHAT, {"xargs": STEER}, "steer: is ignored in xargs here"),
    (CHAT, {"extra": {"vllm_xargs": {"read": 1}}}, "read: is ignored in extra.vllm_xargs here"),
    (CHAT, {"stear": "generalized", "stream": True}, "stear: is ignored here"),
    (CHAT, {"vllm_xargs": {**STEER, "alpha": -1}}, "alpha: -1 is not a number"),
    (CHAT, {"vllm_xargs": STEER, "use_beam_search": True}, "use_beam_search: vLLM does not pass"),
    ("/v1/completions", {"extra_args": {"read": 1}}, "read: is ignored in extra_args here"),
    ("/v1/responses", {"vllm_xargs": STEER}, "steer: is ignored in vllm_xargs here"),
    ("/v1/messages", {"vllm_xargs": {"read": 1}}, "read: is ignored in vllm_xargs here"),
    ("/inference/v1/generate", {"sampling_params": {"extra_args": STEER}}, "steer: is ignored in sampling_params"),
]


def posted(path: str, content: bytes, answer: Callable[[], Any] | None = None) -> tuple[int, bytes, bytes]:
    """Status, body of the answer (events, or the word ``steered``), and what the application has read."""
    chunks = [content[:7], content[7:]]
    waiting = [{"type": "http.request", "body": c, "more_body": c is chunks[0]} for c in chunks]
    sent: list[dict[str, Any]] = []
    read: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            read.append(message["body"])
        bodies = await answer() if answer else [b"steered"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
        for body in bodies:
            await send({"type": "http.response.body", "body": body})

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(http.Guard(app)({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send))
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(sent[1]["body"])).encode()
    return sent[0]["status"], b"".join(one["body"] for one in sent[1:]), b"".join(read)


@pytest.mark.parametrize(("path", "body", "told"), IGNORED, ids=str)
def test_what_a_route_would_ignore_or_is_wrong_is_refused(
    path: str, body: dict[str, Any], told: str, offered: Offered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_here", [offered])
    content = json.dumps(body)
    for encoded in (content.encode(), content.encode("utf-16"), content.replace("s", "\\u0073").encode()):
        status, answer, read = posted(path, encoded)
        assert (status, read) == (400, b"")
        error = json.loads(answer)["error"]
        assert error["message"].startswith(told)
        assert error["param"] == told.partition(":")[0]


def test_what_a_route_takes_goes_through_unchanged(offered: Offered, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"json_schema": {"schema": {"properties": {"steer": {"type": "string"}}}}}
    right = [
        (CHAT, {"vllm_xargs": STEER}),
        ("/behind/a/proxy/v1/completions", {"vllm_xargs": {**STEER, "gate": 0.5}}),
        (CHAT, {"messages": [{"role": "user", "content": 'what is "steer"?'}], "response_format": schema}),
        ("/v1/responses", {"input": "read", "metadata": {"read": "yes"}}),
    ]
    monkeypatch.setattr(http, "_here", [offered])
    for path, body in right:
        content = json.dumps(body).encode()
        assert posted(path, content) == (200, b"steered", content)
    assert posted(CHAT, b'{"steer": ') == (200, b"steered", b'{"steer": ')  # no JSON: vLLM refuses it


@pytest.mark.parametrize("form", ["{}", "data: {}\n\n"])
def test_each_choice_that_ends_has_the_report_on_its_prompt(
    offered: Offered, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Of two prompts with two choices each, which end in another order than they came."""
    monkeypatch.setattr(http, "_here", [offered])

    async def generate(engine: Any, prompt: int, params: Any) -> Any:
        yield SimpleNamespace(mnemoscope=None)
        yield SimpleNamespace(mnemoscope={"p_memorized": prompt, "steer": None})

    async def answer() -> list[bytes]:
        params = SimpleNamespace(n=2, extra_args=None)
        results = [http._generated(generate, ENGINE, n, params) for n in range(2)]
        assert [len([output async for output in one]) for one in reversed(results)] == [2, 2]
        choices = [{"index": n, "text": "é", "finish_reason": "stop" if n != 2 else None} for n in (3, 0, 2)]
        return [form.format(json.dumps({"choices": choices})).encode()]

    _, body, _ = posted(CHAT, json.dumps({"vllm_xargs": STEER}).encode(), answer)
    found = json.loads(body.decode().removeprefix("data: "))["choices"]
    assert [choice.get("mnemoscope") for choice in found] == [
        {"p_memorized": 1, "steer": None},
        {"p_memorized": 0, "steer": None},
        None,
    ]
    assert body.decode().endswith(form.partition("}")[2])


def test_a_stream_has_each_token_once_and_shares_at_its_end() -> None:
    tokens = [{"document": n / 4, "memory": 1 - n / 4, "neither": 0.0, "unlike": n == 3} for n in range(4)]
    reports, told, found = [{"steer": None, "tokens": tokens[:1]}], dict[int, int](), []
    for known, ends in ((1, None), (1, None), (3, None), (4, "length")):
        reports[0]["tokens"] = tokens[:known]
        event = {"choices": [{"index": 0, "finish_reason": ends}]}
        body = http._with_reports(f"data: {json.dumps(event)}\n\n".encode(), reports, told)
        found.append(json.loads(body.decode().removeprefix("data: "))["choices"][0].get(ADMITTED))
    assert [one and one["tokens"] for one in found] == [tokens[:1], None, tokens[1:3], tokens[3:]]
    assert found[-1]["shares"] == {"document": 0.1875, "memory": 0.5625, "neither": 0.0, "cannot tell": 0.25}


def test_what_became_of_requests_is_counted_and_readings_are_traced(offered: Offered) -> None:
    def counted() -> dict[str, float]:
        samples = next(one for one in REGISTRY.collect() if one.name == "mnemoscope:requests").samples
        return {one.labels["outcome"]: one.value for one in samples if one.name.endswith("_total")}

    metrics.count_refused()
    before = counted()
    report = {"steer": "memorized", "acted": True, "p_memorized": 0.75, "unlike": False, "tokens": []}
    for one in (report, {**report, "acted": False, "p_memorized": None}, {"steer": None}):
        metrics.count(one)
    more = {name: value - before.get(name, 0) for name, value in counted().items()}
    assert more == {"refused": 0, "steered": 1, "held": 1, "read": 1, "tokens_read": 2}
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracing.set_tracer_provider(provider)
    for one in (report, {"steer": None}):
        metrics.trace(one)
    ((event,),) = [span.events for span in spans.get_finished_spans()]
    assert event.name == "gen_ai.evaluation.result"
    assert event.attributes["gen_ai.evaluation.score.value"] == 0.75
    state = metrics.state_of(offered)
    assert (state["digest"], state["levers"]["memorized"], state["reader"]) == (offered.digest, ["shift"], True)
    assert state["run"] == offered.source != ""
    assert state["binding"]["weights"] == offered.vectors["memorized"].binding.weights
    assert metrics.state_of(None) == {"levers": {}}


def test_a_server_without_vectors_refuses_to_steer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_here", [None])
    status, answer, _ = posted("/v1/messages", json.dumps({"vllm_xargs": STEER}).encode())
    assert status == 400
    assert b"this server has no vectors; start it with MNEMOSCOPE_RUN" in answer
    assert posted(CHAT, b'{"read": true}')[0] == 200  # of some other plugin


def test_rows_are_those_of_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 6))
        counts, computed = rng.integers(1, 9, size), rng.integers(0, 20, size)
        begins = np.r_[0, np.cumsum(counts)[:-1]]
        decisions = rng.integers(0, 30, size)
        starts = [NEVER if rng.random() < 0.3 else int(rng.choice([0, end])) for end in decisions]
        shifted_R, owner_R, decision_N = rows_of(counts, computed, starts, decisions)
        wanted, decided = [], np.full(size, -1)
        for n in range(size):
            for token in range(counts[n]):
                position, start = computed[n] + token, starts[n]
                if position >= start:
                    wanted.append((begins[n] + token, n))
                if position == decisions[n]:
                    decided[n] = begins[n] + token
        assert list(zip(shifted_R.tolist(), owner_R.tolist(), strict=True)) == wanted
        assert decision_N.tolist() == decided.tolist()


UNTRIED = f"vllm: version 0.99.0 was not tried; allowed are {', '.join(plugin.TRIED)}"
RUN = '{"seed": 1, "mnemoscope": "runs/mine"}'


@pytest.mark.parametrize(
    ("variable", "words", "where"),
    [
        (None, ["--additional-config", RUN], "--additional-config"),
        (None, [f"--additional-config={RUN}"], "--additional-config"),
        (None, ["--additional_config.mnemoscope", "runs/mine"], "--additional-config"),
        ("runs/mine", [], "MNEMOSCOPE_RUN"),
        (None, ["--additional-config", '{"other": 1}'], ""),
    ],
)
def test_an_untried_version_starts_only_without_a_run_and_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str | None,
    words: list[str],
    where: str,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.99.0"))
    monkeypatch.setenv("MNEMOSCOPE_RUN", variable or "")
    monkeypatch.setattr(sys, "argv", ["api_server", "--model", "mnemoscope/model", *words, "--dtype", "float32"])
    if where:
        with pytest.raises(InputError, match=rf"{re.escape(UNTRIED)} \({where}\)"):
            plugin.register()
    else:
        with caplog.at_level(logging.WARNING, logger="vllm.mnemoscope"):
            plugin.register()
        assert f"{UNTRIED}, so nothing is steered or read, whatever is asked" in caplog.text
