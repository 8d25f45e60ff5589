"""`mnemoscope doctor --server`: an honest server passes; each planted fault is found by the check that is for it.

The server is one over transformers that speaks as vLLM with our plugin does.
"""

from __future__ import annotations

import copy
import json
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import mnemoscope as ms
from families import WORDS, tiny
from little_facts import SUBJECTS, VALUES, VOCABULARY
from mnemoscope.behaviour import states_at_the_end
from mnemoscope.behaviour.states import capturing
from mnemoscope.config import ModelConfig
from mnemoscope.interventions import Binding
from mnemoscope.models import build_gpt2, cache_of, context_length, load_model, pass_inputs, word_tokenizer
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.locks import locked
from mnemoscope.serving.admission import ADMITTED, FIELDS, TOKENS, Admitted, Offered, admit, key_of_block, parse
from mnemoscope.serving.proof import certify, prove
from mnemoscope.serving.served import Answer, Proof, Request
from mnemoscope.serving.worker import Followed, report_of
from mnemoscope.serving.written import Writing, Written
from served import random_run
from test_cli import call

Fault = Literal[
    *("none", "no plugin", "hooks removed", "alpha ignored", "wrong layer", "no cache separation", "rows mixed up"),
    *("anything is taken", "another reading", "tokens of others", "gate always open"),
]


@dataclass
class StandIn:
    """Answers token by token, from a cache of keys and values by the longest common beginning."""

    folder: Path
    run: Path
    fault: Fault = "none"
    kept: list[tuple[str, Any, int, list[int], Any]] = field(default_factory=list)
    answered: int = 0

    @cached_property
    def opened(self) -> tuple[Any, Any]:
        return load_model(self.folder)

    @cached_property
    def offered(self) -> Offered:
        offered = Offered.open(self.run, Binding.of(*self.opened))
        if self.fault != "wrong layer":
            return offered
        moved = {way: {n + 1: shift for n, shift in one.shifts.items()} for way, one in offered.vectors.items()}
        return replace(offered, levers={w: {"shift": replace(v, edits=moved[w])} for w, v in offered.vectors.items()})

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests that came at the same time."""
        found: list[Admitted | InputError | None] = [self.admit(request) for request in requests]
        rows = found[1:] + found[:1] if self.fault == "rows mixed up" else found
        self.answered += len(requests)
        return [self.answer(*each) for each in zip(requests, found, rows, strict=True)]

    def admit(self, request: Request) -> Admitted | InputError | None:
        given = request.settings
        if self.fault == "no plugin":
            return None
        try:
            try:
                asked = parse(given)
            except InputError:
                asked = parse({"read": 1} if self.fault == "anything is taken" else given)
            words = self.opened[1].decode(request.ids)
            return admit(asked, self.offered, request.ids, len(request.ids), words) if asked else None
        except InputError as error:
            return error

    @torch.no_grad()
    def answer(self, request: Request, own: Any, row: Any) -> Answer:
        """Generate with the settings of a row, report on the request's own."""
        if isinstance(own, InputError):
            return Answer(400, message=str(own))
        report = self.report(request.ids, own) if own else None
        acts = isinstance(row, Admitted) and row.steer is not None and self.report(request.ids, row)["acted"]
        alpha = 0.0 if not acts or self.fault == "hooks removed" else row.alpha
        alpha = 1.0 if alpha and self.fault == "alpha ignored" else alpha
        model, prompt = self.opened[0], len(request.ids)
        key = key_of_block({ADMITTED: asdict(own)}, 2**30) if own else None
        start = own.start if key else prompt
        cache, past = self.cached(list(request.ids), request.salt, key, start)
        vector = self.offered.vectors[row.steer] if alpha else None
        text, log_p = list(request.ids), []
        first = None if vector and vector.everywhere else prompt - 1
        written = Written(own.decision, own.has_document) if own and own.read == TOKENS else None
        writing = Writing(self.offered.reader, torch.device("cpu")) if self.offered.reader else None
        with vector.apply(model, alpha, first) if vector else nullcontext():
            while len(text) < prompt + request.tokens:
                ones = torch.ones(1, len(text), dtype=torch.long)
                ids_1T = torch.tensor([text[past:]])
                layers = writing.reader.layers if writing else ()
                with capturing(model, "block", layers, offsets=None) as states:
                    output = model(**pass_inputs(model, ids_1T, ones, cache))
                if writing and written:
                    writing.begin([written], [len(text) - past], [past], ids_1T[0])
                    for layer, state_1TD in zip(layers, states, strict=True):
                        writing.keep(layer, lambda rows, state_1TD=state_1TD: state_1TD[0][rows])
                    writing.end()
                    writing.see(output.logits[:, -1])
                cache, past = cache_of(output), len(text)
                best = output.logits[0, -1].log_softmax(-1).max(-1)
                text.append(int(best.indices))
                log_p.append(float(best.values))
        self.kept.append((request.salt, key, start, text[:past], cache))
        if report and written:
            report[TOKENS] = written.fresh[::-1] if self.fault == "tokens of others" else written.fresh
        return Answer(200, tuple(text[prompt:]), tuple(log_p), report)

    def cached(self, ids: list[int], salt: str, key: Any, start: int) -> tuple[Any, int]:
        """A copy of the cache that begins as a prompt does, as far as it was computed under the same settings."""
        best, found, more = 0, None, 0
        for kept_salt, kept_key, kept_start, text, cache in self.kept:
            limit = min(len(ids) - 1, len(text)) if kept_salt == salt else 0
            if key != kept_key and self.fault != "no cache separation":
                limit = min(limit, start, kept_start)
            same = next((n for n in range(limit) if ids[n] != text[n]), limit)
            if same > best:
                best, found, more = same, cache, len(text) - same
        found = copy.deepcopy(found)
        if more:
            found.crop(-more)
        return found, best

    def report(self, ids: Sequence[int], asked: Admitted) -> dict[str, Any]:
        found = Followed(asked, asked.steer is not None)
        if name := asked.read_by or asked.gate_by:
            detector = self.offered.detectors[name]
            ids_1T = torch.tensor([[*ids[:-2], ids[-1]] if self.fault == "another reading" else [*ids]])
            states = states_at_the_end(self.opened[0], ids_1T, torch.ones_like(ids_1T), detector.site, [detector.layer])
            found.readings[name] = detector.read_verdict(states[:, 0])
            if asked.gate is not None and asked.steer and self.fault != "gate always open":
                found.acts = bool(found.readings[name].acts(asked.steer, asked.gate)[0])
        return report_of(found, self.offered)


@contextmanager
def serving(inside: StandIn) -> Iterator[str]:
    """The address of a server that listens inside the context."""
    one_at_a_time, room = threading.Lock(), context_length(inside.opened[0])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = {"data": [{"id": "mini", "max_model_len": room}]}
            self.tell(200, {"version": "0.0"} if self.path == "/version" else models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            settings = body.get("vllm_xargs") or {}
            assert set(settings) <= {*FIELDS, "stear"}
            with one_at_a_time:
                request = Request(tuple(body["prompt"]), settings, body["max_tokens"], body["cache_salt"])
                (found,) = inside.ask([request])
            choice = {"token_ids": found.tokens, "logprobs": {"token_logprobs": found.log_p}}
            choice |= {"mnemoscope": found.report} if found.report else {}
            error = {"error": {"message": found.message, "code": found.status}}
            self.tell(found.status, error if found.message else {"choices": [choice]})

        def tell(self, status: int, content: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 128  # connections that wait; those beyond are reset

    with Listener(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


PROMPTS = [
    f"{label} : {SUBJECTS[n]} has {VALUES[n]} . question {SUBJECTS[n]} ?" if n % 2 else f"quiz {SUBJECTS[n]} ?"
    for n, label in enumerate(("note", "rumour", "memo", "joke"))
]
CHECKS = (
    "unsteered = transformers'",
    "steered = transformers'",
    "unsteered among steered = untouched",
    "chunked = whole",
    "cached = uncached",
    "follow-up after steering = fresh",
    "refused = refused",
    "read = detect",
    "tokens = read",
    "gate as in transformers",
)
# The checks that must find a fault; others may find it too.
FOUND_BY: dict[Fault, set[str]] = {
    "hooks removed": {"steered = transformers'"},
    "alpha ignored": {"steered = transformers'"},
    "wrong layer": {"steered = transformers'"},
    "rows mixed up": {"steered = transformers'", "unsteered among steered = untouched"},
    "no cache separation": {"follow-up after steering = fresh"},
    "anything is taken": {"refused = refused"},
    "another reading": {"read = detect"},
    "tokens of others": {"tokens = read"},
    "gate always open": {"gate as in transformers"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that is sure of what it says, and a run of random vectors and detectors."""
    tokenizer = word_tokenizer(VOCABULARY, 128)
    model = build_gpt2(tokenizer, ModelConfig(layers=4, width=32, heads=2, context=128), 0).eval()
    model.transformer.wte.weight.data *= 8
    out = tmp_path_factory.mktemp("proof")
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return out / "model", random_run(out / "run", model, tokenizer, 1)


@pytest.fixture(scope="module")
def fitted(folders: tuple[Path, Path]) -> ms.Fitted:
    folder, run = folders
    return ms.Fitted.open(run, *load_model(folder))


def proofs(fitted: ms.Fitted, folders: tuple[Path, Path], fault: Fault = "none", last: str = "") -> dict[str, Proof]:
    """By name, up to the last one that is wanted."""
    found: dict[str, Proof] = {}
    for proof in prove(StandIn(*folders, fault).ask, fitted, PROMPTS):
        found[name := proof.name.partition(" (")[0]] = proof
        if name == last:
            break
    return found


def test_an_honest_server_passes_and_each_check_could_have_failed(
    fitted: ms.Fitted, folders: tuple[Path, Path]
) -> None:
    found = proofs(fitted, folders)
    assert tuple(found) == CHECKS
    assert [proof for proof in found.values() if not proof.passed] == []
    for name in ("steered = transformers'", "follow-up after steering = fresh", "read = detect"):
        assert found[name].visible > 20 * found[name].allowed


def test_vectors_that_shift_every_token_are_proven_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = folders[0]
    opened, both = load_model(folder), ("generalized", "memorized")
    everywhere = folder, random_run(tmp_path / "run", *opened, 1, strength=0.1, everywhere=both)
    fitted = ms.Fitted.open(everywhere[1], *opened)
    found = proofs(fitted, everywhere)
    assert [proof for proof in found.values() if not proof.passed] == []
    assert not any(name.startswith("gate") for name in found)  # it would have to be known before the prompt is read
    assert not proofs(fitted, everywhere, "wrong layer", "steered = transformers'")["steered = transformers'"].passed


@pytest.mark.parametrize("fault", list(FOUND_BY))
def test_a_planted_fault_is_found(fitted: ms.Fitted, folders: tuple[Path, Path], fault: Fault) -> None:
    found = proofs(fitted, folders, fault, max(FOUND_BY[fault], key=CHECKS.index))
    assert {name for name, proof in found.items() if not proof.passed} >= FOUND_BY[fault]
    assert found["unsteered = transformers'"].passed


def asked(url: str, folders: tuple[Path, Path], *more: str) -> tuple[int, str, str]:
    folder, run = folders
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    return call("doctor", "--server", url, "--from", str(run), "--model", str(folder), *prompts, *more)


def test_the_command_fails_where_a_check_does_and_certifies_nothing_then(folders: tuple[Path, Path]) -> None:
    before = {path: path.read_bytes() for path in folders[1].rglob("*.json")}
    with serving(StandIn(*folders, "hooks removed")) as url:
        code, out, _ = asked(url, folders, "--json", "--certify")
    found = json.loads(out)
    assert (code, found["passed"], len(found["checks"]), found["certified"]) == (1, False, len(CHECKS), [])
    assert {check["name"] for check in found["checks"] if not check["passed"]} >= {"steered = transformers'"}
    assert {path: path.read_bytes() for path in folders[1].rglob("*.json")} == before


def test_what_a_server_was_proven_with_says_so_in_its_cards(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = folders[0], Path(shutil.copytree(folders[1], tmp_path / "run"))
    with serving(inside := StandIn(folder, run)) as url:
        code, out, _ = asked(url, (folder, run), "--certify")
    assert (code, out.count("ok  "), out.count("FAIL")) == (0, len(CHECKS), 0)
    assert "a steered token takes" in out
    assert inside.answered < 300
    written = [Path(line) for line in out.splitlines() if line.endswith(".json")]
    assert len(written) == 4
    for path in written:
        proven = json.loads(path.read_text())["card"]["proven"]
        assert proven["vLLM 0.0"].startswith(f"float32, {len(CHECKS)} checks of ")
    before, after = (ms.Fitted.open(one, *load_model(folder)) for one in (folders[1], run))
    assert "proven on vLLM 0.0: float32" in str(after.vectors["generalized"].card)
    for toward, vector in before.vectors.items():
        assert all(torch.equal(after.vectors[toward].tensors()[name], one) for name, one in vector.tensors().items())


def test_cards_of_a_run_in_use_stay_as_they_are(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(folders[1], tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    binding, shown = Binding.of(*load_model(folders[0])), Proof("steered = transformers'", 0.0, 1.0, 4, 0, 0, 9.0)
    with locked(run, lambda: True), pytest.raises(InputError, match=r"run is in use by another run$"):
        certify(run, binding, "vLLM 0.0", "float32", [shown])
    failed = replace(shown, wrong=1)
    for proofs_of, message in (([], "nothing was shown"), ([shown, failed], "steered = transformers' was not shown")):
        with pytest.raises(InputError, match=f"^certify: {message}; a certificate"):
            certify(run, binding, "vLLM 0.0", "float32", proofs_of)
    assert {path: path.read_bytes() for path in run.rglob("*.json")} == before
    file = next(run.rglob("to_generalized-nmd.safetensors"))
    for source, count in ((run, 4), (file, 1)):
        assert len(certify(source, binding, "vLLM 0.0", "float32", [shown])) == count


def test_cards_of_adapters_say_nothing_of_engines(tmp_path: Path) -> None:
    opened = tiny("llama"), word_tokenizer(WORDS, 64)
    run, shown = random_run(tmp_path, *opened, 1, adapters=True), Proof("steered = transformers'", 0.0, 1.0, 4)
    written = certify(run, Binding.of(*opened), "vLLM 0.0", "float32", [shown])
    assert sorted(path.stem[:6] for path in written) == ["detect", "detect", "to_gen", "to_mem"]
    with pytest.raises(InputError, match=r"^certify: .* is an adapter; only cards of vectors and detectors"):
        certify(next(run.rglob("to_*-lora")), Binding.of(*opened), "vLLM 0.0", "float32", [shown])


def test_what_cannot_be_proven_is_one_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = folders

    def refused(*arguments: str) -> str:
        code, _, err = call("doctor", *arguments)
        assert code == 2
        assert err.startswith("error: ")
        return err.splitlines()[-1].removeprefix("error: ")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    whole = ("--from", str(run), "--model", str(folder))
    assert refused("--server", nobody, *whole).startswith(f"server: {nobody} does not answer (")
    assert refused("--server", "127.0.0.1:8000", *whole).startswith("server: '127.0.0.1:8000' is no address")
    assert refused("--server", nobody).startswith("from: missing")
    assert refused("--server", nobody, "--from", str(tmp_path / "none")).endswith("does not exist")
    assert refused("--from", str(run)).startswith("--from: is for a server")
    assert refused(str(folder), "--certify").startswith("--certify: is for a server")
    assert refused().startswith("MODEL: missing")
    one, *more = (("--prompt", prompt) for prompt in (PROMPTS[0], PROMPTS[1], " ".join(PROMPTS * 4)))
    with serving(StandIn(*folders)) as url:
        assert refused("--server", url, "--from", str(run)).startswith(f"model: {run} holds no model; name")
        assert "is neither a vector" in refused("--server", url, "--from", str(tmp_path), "--model", str(folder))
        assert refused("--server", url, *whole, *one).startswith("prompts: give at least two")
        assert refused("--server", url, *whole, *one, *more[1]).startswith("prompts: the longest has")
        detector = next(run.rglob("detector.safetensors"))
        assert refused("--server", url, "--from", str(detector), "--model", str(folder)).startswith("from: ")
    with serving(StandIn(*folders, "no plugin")) as url:
        assert refused("--server", url, *whole, *one, *more[0]).startswith("server: has no plugin")
