"""A server over transformers that speaks as vLLM with our plugin does, with faults that can be planted."""

from __future__ import annotations

import copy
import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import torch

from mnemoscope.behaviour import states_at_the_end
from mnemoscope.interventions import Binding
from mnemoscope.models import cache_of, context_length, load_model, pass_inputs
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.asking import FIELDS, Admitted, Asked, admit, parse
from mnemoscope.serving.offered import Offered

Fault = Literal[
    "none",
    "hooks removed",
    "alpha ignored",
    "wrong layer",
    "no cache separation",
    "rows mixed up",
    "anything is taken",
    "another reading",
    "gate always open",
    "no plugin",
]
WAIT = 0.01  # seconds in which requests become one batch


@dataclass(eq=False)
class Job:
    """A request on its way."""

    body: dict[str, Any]
    admitted: Admitted | None
    done: threading.Event = field(default_factory=threading.Event)
    answer: dict[str, Any] = field(default_factory=dict)


@dataclass
class StandIn:
    """Answers requests in batches, from a cache of keys and values by the longest common beginning."""

    folder: Path
    run: Path
    fault: Fault = "none"
    jobs: queue.Queue[Job | None] = field(default_factory=queue.Queue)
    kept: list[tuple[str, str | None, int, list[int], Any]] = field(default_factory=list)
    largest: int = 0  # batch
    answered: int = 0

    @cached_property
    def opened(self) -> tuple[Any, Any]:
        return load_model(self.folder)

    @cached_property
    def offered(self) -> Offered:
        return Offered.open(self.run, Binding.of(*self.opened))

    def admit(self, body: dict[str, Any]) -> Admitted | None:
        given = body.get("vllm_xargs")
        if self.fault == "no plugin":
            return None
        if self.fault == "anything is taken" and given:
            try:
                parse(given)
            except InputError:
                given = {"read": 1}
        asked = parse(given)
        return admit(asked, self.offered, body["prompt"], len(body["prompt"])) if asked else None

    def work(self) -> None:
        """Answer until told to stop."""
        while (job := self.jobs.get()) is not None:
            batch = [job]
            try:
                while (job := self.jobs.get(timeout=WAIT)) is not None:
                    batch.append(job)
            except queue.Empty:
                pass
            self.largest, self.answered = max(self.largest, len(batch)), self.answered + len(batch)
            admitted = [one.admitted for one in batch]
            rows = admitted[1:] + admitted[:1] if self.fault == "rows mixed up" else admitted
            for one, row in zip(batch, rows, strict=True):
                try:
                    self.reply(one, row)
                except Exception as error:  # as a server does
                    one.answer = {"error": {"message": repr(error)}}
                one.done.set()
            if job is None:
                return

    @torch.no_grad()
    def reply(self, job: Job, row: Admitted | None) -> None:
        """Generate with the settings of a row, report on the request's own."""
        ids, own = job.body["prompt"], job.admitted
        report = self.report(ids, own) if own else None
        acts = bool(row and row.asked.steer and self.report(ids, row)["acted"])
        alpha = (row.asked.alpha if row and acts else 0.0) and (
            1.0 if self.fault == "alpha ignored" else row.asked.alpha
        )
        alpha = 0.0 if self.fault == "hooks removed" else alpha
        tokens, log_p = self.generate(job, row.asked if row else Asked(), alpha)
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": log_p}}
        job.answer = {"choices": [choice | ({"mnemoscope": report} if report else {})]}

    def generate(self, job: Job, asked: Asked, alpha: float) -> tuple[list[int], list[float]]:
        model, ids, salt = self.opened[0], list(job.body["prompt"]), job.body.get("cache_salt", "")
        own = job.admitted
        key, start = (own.key, own.start) if own and own.key else (None, len(ids))
        cache, past = self.cached(ids, salt, key, start)
        vector = self.offered.vectors.get(asked.steer) if alpha else None
        if vector and self.fault == "wrong layer":
            vector = replace(vector, edits={layer + 1: shift for layer, shift in vector.shifts.items()})
        text, log_p, prompt = list(ids), [], len(ids)
        first = None if vector and vector.positions == "all" else prompt - 1
        with vector.apply(model, alpha, first) if vector else nullcontext():
            while len(text) < prompt + job.body["max_tokens"]:
                ones = torch.ones(1, len(text), dtype=torch.long)
                output = model(**pass_inputs(model, torch.tensor([text[past:]]), ones, cache))
                cache, past = cache_of(output), len(text)
                best = output.logits[0, -1].log_softmax(-1).max(-1)
                text.append(int(best.indices))
                log_p.append(float(best.values))
        self.kept.append((salt, key, start, text[:past], cache))
        return text[prompt:], log_p

    def cached(self, ids: list[int], salt: str, key: str | None, start: int) -> tuple[Any, int]:
        """A copy of the cache that begins as a prompt does, as far as it was computed under the same settings."""
        best, found, more = 0, None, 0
        for kept_salt, kept_key, kept_start, text, cache in self.kept:
            if kept_salt != salt:
                continue
            limit = min(len(ids) - 1, len(text))
            if key != kept_key and self.fault != "no cache separation":
                limit = min(limit, start, kept_start)
            same = next((n for n in range(limit) if ids[n] != text[n]), limit)
            if same > best:
                best, found, more = same, cache, len(text) - same
        if found is None:
            return None, 0
        found = copy.deepcopy(found)
        if more:
            found.crop(-more)
        return found, best

    def report(self, ids: list[int], admitted: Admitted) -> dict[str, Any]:
        asked, acts, facts = admitted.asked, admitted.asked.steer is not None, {}
        if name := admitted.read_by or admitted.gate_by:
            detector = self.offered.detectors[name]
            other = [*ids[:-2], ids[-1]] if self.fault == "another reading" else ids
            ids_1T = torch.tensor([other])
            states = states_at_the_end(self.opened[0], ids_1T, torch.ones_like(ids_1T), detector.site, [detector.layer])
            reading = detector.read_verdict(states[:, 0])
            if asked.gate is not None and asked.steer:
                acts = self.fault == "gate always open" or bool(reading.acts(asked.steer, asked.gate)[0])
            facts = {n: float(getattr(reading, n)[0]) for n in ("p_memorized", "p_conflict", "distance")}
            facts |= {"unlike": bool(reading.unlike[0]), "site": detector.site, "layer": detector.layer}
        alpha = asked.alpha if asked.steer else 0.0
        return {"steer": asked.steer, "alpha": alpha, "acted": acts, **facts}


@contextmanager
def serving(folder: Path, run: Path, fault: Fault = "none") -> Iterator[tuple[str, StandIn]]:
    """The address of a server that listens inside the context, and its inside."""
    inside = StandIn(folder, run, fault)
    assert inside.offered.vectors

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = {"data": [{"id": "mini", "max_model_len": context_length(inside.opened[0])}]}
            self.tell(200, {"version": "0.0"} if self.path == "/version" else models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert set(body.get("vllm_xargs") or {}) <= {*FIELDS, "stear"}
            try:
                job = Job(body, inside.admit(body))
            except InputError as error:
                self.tell(400, {"error": {"message": str(error), "code": 400}})
                return
            inside.jobs.put(job)
            job.done.wait()
            self.tell(200 if "choices" in job.answer else 500, job.answer)

        def tell(self, status: int, content: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 128  # connections that wait; those beyond are reset

    server = Listener(("127.0.0.1", 0), Handler)
    threads = [threading.Thread(target=what) for what in (server.serve_forever, inside.work)]
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", inside
    finally:
        inside.jobs.put(None)
        server.shutdown()
        for thread in threads:
            thread.join()
        server.server_close()
