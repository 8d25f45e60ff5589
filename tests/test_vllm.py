"""The plugin inside real vLLM, over HTTP, against transformers; skipped where vLLM is not installed.

python -m pytest tests/test_vllm.py                               a tiny model, three servers and two with faults
MNEMOSCOPE_SERVED=smollm2 python -m pytest tests/test_vllm.py     300 requests and 84 follow-ups of each of five servers
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from families import WORDS
from families import tiny as tiny_of
from mnemoscope.face.fitted import Fitted
from mnemoscope.models import load_model, word_tokenizer
from mnemoscope.serving.client import Server
from mnemoscope.serving.engine import TRIED
from mnemoscope.serving.offline import asking
from mnemoscope.serving.proof import prove
from served import random_run
from vllm_server import BLOCK, CONTEXT, ENVIRONMENT, Material, Wanted, ask_all, counter, serving, ways

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here"),
]
MODEL = os.environ.get("MNEMOSCOPE_SERVED", "")
REQUESTS, TALKS = (300, 12) if MODEL else (90, 6)
SMALL = ("--num-gpu-blocks-override", "14")  # a request of all tokens, and a few more
CHUNKED = ("--max-num-batched-tokens", "16")
SERVERS: dict[str, tuple[str, ...]] = {
    "as it comes": (),
    "in chunks, preempted": (*CHUNKED, *SMALL),
}
# Heads of 32 neurons, the fewest that vLLM's kernels take.
_SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": CONTEXT}
SIZES: dict[str, dict[str, Any]] = {
    **{name: {**_SIZES, "sliding_window": 64} for name in ("mistral", "gemma2", "gemma3_text")},
    "gpt2": {"n_embd": 128, "n_positions": CONTEXT},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "max_position_embeddings": CONTEXT},
}
# What must find each.
FAULTS = {
    "hooks removed": "steered = transformers'",
    "alpha ignored": "steered = transformers'",
    "wrong layer": "steered = transformers'",
    "no cache separation": "follow-up after steering = fresh",
    # Which requests share a pass is the server's choice: on a busy machine no unsteered one may have such a neighbour.
    "rows mixed up": "steered = transformers'",
}
if MODEL:
    SERVERS |= {"in chunks": CHUNKED, "preempted": SMALL, "no prefix caching": ("--no-enable-prefix-caching",)}
else:  # SmolLM2 has nine heads
    SERVERS |= {"two ranks": ("--tensor-parallel-size", "2")}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material.make(tmp_path_factory.mktemp("served"), MODEL)


@pytest.fixture(scope="module")
def requests(material: Material) -> list[Wanted]:
    """Each prompt in two ways; all ways are there."""
    asked, prompts = ways(material.threshold()), material.prompts
    both = [(prompt, asked[(n * 5 + k * 3) % len(asked)]) for k in range(2) for n, prompt in enumerate(prompts)]
    return [material.wanted(*pair, 24) for pair in both]


@pytest.fixture(scope="module")
def talks(material: Material) -> list[tuple[Wanted, list[Wanted]]]:
    """Conversations, and what follows each: asked for nothing, in another way, and as before."""
    asked, found = ways(material.threshold()), []
    steered = [asked[1], asked[3], asked[8], asked[6]]
    for n, prompt in enumerate(material.prompts[-TALKS:]):
        before = steered[n % 4] if n % 3 < 2 else {}
        other = steered[(n + 1) % 4]
        talk = material.wanted(prompt, before, 72)
        longer = [*prompt, *talk.tokens, *prompt[:5]]
        found.append((talk, [material.wanted(longer, way, 6) for way in ({}, other, before)]))
    return found


@pytest.fixture(scope="class")
def server(
    request: pytest.FixtureRequest, material: Material, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, httpx.Client]]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    name = request.cls.NAME
    with serving(material, log, *SERVERS[name]) as client:
        yield name, client


def checked(client: httpx.Client, wanted: list[Wanted], what: str) -> None:
    found = ask_all(client, wanted)
    print(f"{what}: {dict(found.counts)}, log p {found.log_p:.1e}, P(memorized) {found.p_memorized:.1e}")
    assert not found.wrong, found.wrong[:5]
    assert found.log_p < 1e-4
    assert found.p_memorized < 1e-4
    assert found.counts["tie"] <= len(wanted) / 20


@pytest.mark.parametrize("at_start", ["", "wrong layer"])  # where a vector acts is read when a server starts
def test_the_doctor_passes_an_honest_server_and_finds_a_planted_fault(
    material: Material, tmp_path: Path, at_start: str
) -> None:
    present = tmp_path / "fault"
    present.write_text(at_start)
    texts = [material.fitted.tokenizer.decode(prompt) for prompt in material.prompts[:8]]
    with serving(material, tmp_path / "server.log", *CHUNKED, fault=present) as client:
        server = Server(str(client.base_url))
        assert server.engine.startswith("vLLM 0.")
        for fault in [at_start] if at_start else ["", *(name for name in FAULTS if name != "wrong layer")]:
            present.write_text(fault)
            assert client.post("/reset_prefix_cache").status_code == 200
            proofs = prove(server.ask, material.fitted, texts, CONTEXT)
            found = {proof.name.partition(" (")[0]: proof for proof in proofs}
            print(fault or "honest", *found.values(), sep="\n")
            failed = {name for name, proof in found.items() if not proof.passed}
            assert found["unsteered = transformers'"].passed
            assert FAULTS[fault] in failed if fault else not failed, (fault, failed)


@pytest.mark.filterwarnings("ignore")  # of vLLM's own imports
@pytest.mark.parametrize("family", TRIED if MODEL else ("gemma3_text",))
def test_an_llm_of_each_family_that_is_allowed_is_proven_in_process(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low-rank shifts and detectors would see a state that is not whole."""
    from vllm import LLM

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    words = load_model("smollm2")[1] if family == "qwen2" else word_tokenizer(WORDS, CONTEXT)  # it opens its own kind
    sizes = {"vocab_size": len(words), **SIZES.get(family, _SIZES)}
    model = tiny_of(family, **sizes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)  # so that a token depends on those before it
    for part in (model, words):
        part.save_pretrained(tmp_path / "model")
    opened = load_model(tmp_path / "model")
    run = random_run(tmp_path / "run", *opened, 1, low_rank=True)
    llm = LLM(
        str(tmp_path / "model"),
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        max_num_seqs=16,
        max_model_len=CONTEXT,
        additional_config={"mnemoscope": str(run)},
    )
    try:
        texts = [" ".join(WORDS[(7 * n + 3 * k) % 61] for k in range(5 + n)) for n in range(4)]
        found = list(prove(asking(llm), Fitted.open(run, *opened), texts, CONTEXT))
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()  # its sockets are closed here, where their warnings are ignored, and not when everything has ended
    print(family, *found, sep="\n")
    assert len(found) == 9
    assert [proof for proof in found if not proof.passed] == []


STEER = {"steer": "generalized"}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", {"vllm_xargs": {"steer": "sideways"}}, "steer"),
    ("chat/completions", {"vllm_xargs": {**STEER, "alpha": -1}}, "alpha"),
    ("chat/completions", {"vllm_xargs": {**STEER, "alpha": "much"}}, "alpha"),
    ("chat/completions", {"vllm_xargs": {**STEER, "gate": 1.5}}, "gate"),
    ("chat/completions", {"vllm_xargs": {"alpha": 2}}, "alpha"),
    ("chat/completions", {"vllm_xargs": {"gate": 0.5}}, "gate"),
    ("chat/completions", {"vllm_xargs": {"read": "perhaps"}}, "read"),
    ("chat/completions", {"vllm_xargs": {"stear": "generalized"}}, "stear"),
    ("chat/completions", {"vllm_xargs": {"steer": ["a"]}}, "steer"),
    ("chat/completions", {"vllm_xargs": {"steer": True}}, "steer"),
    ("chat/completions", {"vllm_xargs": {"steer": {"to": "generalized"}}}, "steer"),
    ("chat/completions", {"vllm_xargs": {"mnemoscope": "x"}}, "mnemoscope"),
    ("chat/completions", {"vllm_xargs": STEER, "use_beam_search": True, "n": 2}, "use_beam_search"),
    ("chat/completions", {"vllm_xargs": {**STEER, "alpha": -1}, "stream": True}, "alpha"),
    ("chat/completions", STEER, "steer"),
    ("chat/completions", {"extra_body": {"vllm_xargs": STEER}}, "steer"),
    ("chat/completions", {"vllm_xarg": STEER}, "steer"),
    ("chat/completions/batch", {"vllm_xargs": {**STEER, "alpha": -1}}, "alpha"),
    ("completions", {"vllm_xargs": {**STEER, "alpha": -1}}, "alpha"),
    ("completions", {"vllm_xargs": {**STEER, "alpha": -1}, "stream": True}, "alpha"),
    ("completions", {"read": True}, "read"),
    ("responses", {"vllm_xargs": STEER}, "steer"),
    ("messages", {"vllm_xargs": STEER}, "steer"),
    ("messages", STEER, "steer"),
]


def body_of(route: str, more: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "user", "content": "question land3 ?"}
    asked: dict[str, Any] = {
        "completions": {"prompt": "question land3 ?"},
        "responses": {"input": "question land3 ?"},
        "chat/completions/batch": {"messages": [[message], [message]]},
    }.get(route, {"messages": [message]})
    most = "max_output_tokens" if route == "responses" else "max_tokens"
    return {"model": "served", most: 4, "temperature": 0, **asked, **more}


Served = tuple[str, httpx.Client]  # the server's name, and who asks it


class OnServer:
    """What is asked of each server; a class of its own each, so that one worker starts it once."""

    NAME = ""

    def test_each_answer_is_that_of_transformers(self, server: Served, requests: list[Wanted]) -> None:
        name, client = server
        plain = {tuple(one.prompt): one.tokens for one in requests if not one.settings.get("steer")}
        moved = [
            one.tokens != plain[tuple(one.prompt)]
            for one in requests
            if one.report and one.report["acted"] and tuple(one.prompt) in plain
        ]
        assert sum(moved) > 0.7 * len(moved) > 3  # so that an unsteered answer is seen
        checked(client, [requests[n * 7 % len(requests)] for n in range(REQUESTS)], f"{REQUESTS} requests, {name}")
        if "preempted" in name:
            assert counter(client, "num_preemptions") > 0
        if name == "as it comes":
            assert counter(client, "prefix_cache_hits") > 0

    def test_what_follows_a_conversation_is_as_on_a_fresh_server(
        self, server: Served, talks: list[tuple[Wanted, list[Wanted]]]
    ) -> None:
        name, client = server
        first, after = [talk for talk, _ in talks], [follow for _, follow in talks]
        rounds = {
            "conversations": first,
            **{f"follow-ups, {way}": [one[k] for one in after] for k, way in enumerate(("unsteered", "other", "same"))},
            "conversations again": first,
            "follow-ups, unsteered again": [one[0] for one in after],
            "follow-ups, mixed": [one[n % 3] for n, one in enumerate(after)],
        }
        for what, wanted in rounds.items():
            checked(client, wanted, f"{what}, {name}")

    def test_what_is_asked_wrongly_is_refused_and_its_field_named(self, server: Served) -> None:
        _, client = server
        for route, more, field in WRONG:
            answer = client.post(f"/v1/{route}", json=body_of(route, more))
            assert answer.status_code == 400, (route, more, answer.text)
            error = answer.json()["error"]
            assert field in error["message"], (route, more, error)
            assert "\n" not in error["message"] or "validation" in error["message"]

    def test_each_choice_has_its_report(self, server: Served) -> None:
        _, client = server
        asked = {
            "vllm_xargs": {**STEER, "read": 1},
            "temperature": 1,
        }  # vLLM takes several greedy answers for a mistake
        found = {}
        for route, more in (
            ("chat/completions", {"n": 2}),
            ("chat/completions/batch", {}),
            ("completions", {"prompt": ["question land3 ?", "land5 has town1 . question land5 ?"], "n": 2}),
        ):
            answer = client.post(f"/v1/{route}", json=body_of(route, {**asked, **more}))
            assert answer.status_code == 200, answer.text
            found[route] = [choice["mnemoscope"]["p_memorized"] for choice in answer.json()["choices"]]
        assert {route: len(reports) for route, reports in found.items()} == {
            "chat/completions": 2,
            "chat/completions/batch": 2,
            "completions": 4,
        }
        one, other, *rest = found["completions"]
        assert one == pytest.approx(other, abs=1e-5)
        assert rest[0] == pytest.approx(rest[1], abs=1e-5)
        assert abs(one - rest[0]) > 1e-4

    def test_who_asks_for_nothing_gets_no_report(self, server: Served) -> None:
        _, client = server
        answer = client.post("/v1/chat/completions", json=body_of("chat/completions", {})).json()
        assert "mnemoscope" not in answer["choices"][0]


for _name in SERVERS:
    _class = f"Test{''.join(word.capitalize() for word in re.findall(r'[a-z]+', _name))}"
    globals()[_class] = type(_class, (OnServer,), {"NAME": _name})
