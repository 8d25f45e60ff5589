"""A vLLM server with the plugin, and requests to it with the answers of transformers.

Tests use a tiny model and few requests; ``MNEMOSCOPE_SERVED=smollm2`` takes that model and as many as a server has.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

import mnemoscope as ms
import vllm_faulty
from little_facts import VOCABULARY
from mnemoscope.behaviour import states_at_the_end
from mnemoscope.config import ModelConfig
from mnemoscope.models import build_gpt2, load_model, word_tokenizer
from served import random_run

CONTEXT = 256  # tokens that the server takes
BLOCK = 32  # tokens of a cached block
TIE = 1e-3  # difference of the two best logits
CLIENTS = 20
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
ENVIRONMENT = {
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"},
    **{"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"},
}
SENTENCES = (
    "The capital of France is Paris",
    "In the year 1969 the first man walked on the moon",
    "Water boils at a temperature of a hundred degrees",
    "Once upon a time there was a king who had three daughters",
    "The largest planet is Jupiter, and the smallest one is",
    "To bake bread you need flour, water, salt and yeast",
)


@dataclass(frozen=True)
class Wanted:
    """A request, and what transformers gives.

    Attributes:
        gaps: between the two best logits at each token.
        log_p: of each token.
        report: of the plugin: what of it can be known; None where nothing is asked.
    """

    settings: dict[str, Any]
    prompt: list[int]
    tokens: list[int]
    gaps: list[float]
    log_p: list[float]
    report: dict[str, Any] | None


@dataclass(frozen=True)
class Material:
    """A saved model, vectors and detectors of it, and prompts."""

    folder: Path
    run: Path
    fitted: ms.Fitted
    prompts: list[list[int]]

    @classmethod
    def make(cls, out: Path, name: str = "") -> Material:
        """Of the tiny model, or of one by its name."""
        if name:
            model, tokenizer = load_model(name)
            texts = [
                ". ".join(SENTENCES[(n + k) % len(SENTENCES)] for k in range(1 + n % 5)) + f" {n}" for n in range(30)
            ]
            prompts, layer = [tokenizer(text).input_ids for text in texts], model.config.num_hidden_layers // 3
        else:
            model, tokenizer = tiny()
            draws = torch.Generator().manual_seed(2)
            shared = torch.randint(3, len(tokenizer), (3, 80), generator=draws).tolist()
            own = torch.randint(3, len(tokenizer), (20, 5), generator=draws).tolist()
            prompts, layer = [shared[n % 3][: 4 + 4 * n] + tail for n, tail in enumerate(own)], 1
        tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
        for part in (model, tokenizer):
            part.save_pretrained(out / "model")
        model, tokenizer = load_model(out / "model")
        run = random_run(out / "run", model, tokenizer, layer)
        return cls(out / "model", run, ms.Fitted.open(run, model, tokenizer), prompts)

    def threshold(self) -> float:
        """P(memorized) that lies between two prompts, far from both: gates of half of the prompts open."""
        found = sorted(self.p_memorized(prompt, below=True) for prompt in self.prompts)
        middle = range(len(found) // 4, 3 * len(found) // 4)
        at = max(middle, key=lambda n: found[n + 1] - found[n])
        return round((found[at] + found[at + 1]) / 2, 5)

    def p_memorized(self, prompt: list[int], below: bool) -> float:
        """P(memorized) of a prompt, by one of the two detectors."""
        return float(self._reading(prompt, below).p_memorized[0])

    def _reading(self, prompt: list[int], below: bool) -> Any:
        detector = self.fitted.lower_detector if below else self.fitted.detector
        ids_1T = torch.tensor([prompt])
        return detector.read(states_at_the_end(self.fitted.model, ids_1T, torch.ones_like(ids_1T), detector.site))

    def wanted(self, prompt: list[int], settings: dict[str, Any], length: int) -> Wanted:
        """The answer of transformers, and its report."""
        toward, alpha, gate = (settings.get(name) for name in ("steer", "alpha", "gate"))
        alpha, ids_1T = 1.0 if alpha is None else alpha, torch.tensor([prompt])
        steered = self.fitted.steer(toward, alpha, gate) if toward else nullcontext()
        with steered, torch.no_grad():
            found = self.fitted.model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits_TV = torch.stack(found.logits)[:, 0]
        best_T2 = logits_TV.topk(2).values
        report = None
        if settings:
            acts = bool(toward and alpha)
            if acts and gate is not None:
                acts = bool(self._reading(prompt, below=True).acts(ms.face.known_behaviour(toward), gate)[0])
            report = {"acted": acts}
            if settings.get("read"):
                report["p_memorized"] = self.p_memorized(prompt, below=bool(toward and alpha))
        return Wanted(
            settings,
            prompt,
            found.sequences[0, len(prompt) :].tolist(),
            (best_T2[:, 0] - best_T2[:, 1]).tolist(),
            logits_TV.log_softmax(-1).max(-1).values.tolist(),
            report,
        )


def tiny() -> tuple[Any, Any]:
    """A GPT-2 with random weights, large enough that each of its answers is another one."""
    tokenizer = word_tokenizer(VOCABULARY, CONTEXT)
    model = build_gpt2(tokenizer, ModelConfig(layers=4, width=64, heads=2, context=CONTEXT), 0)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.15)
    return model, tokenizer


def ways(threshold: float) -> list[dict[str, Any]]:
    """Settings of requests: directions, strengths, gates, reads, and none."""
    return [
        {},
        {"steer": "generalized"},
        {"steer": "memory", "alpha": 0.5},
        {"steer": "generalized", "alpha": 2.0, "read": 1},
        {"read": 1},
        {"steer": "generalized", "gate": threshold, "read": 1},
        {"steer": "memorized", "gate": round(1 - threshold, 5)},
        {"steer": "context", "alpha": 0, "read": 1},
        {"steer": "memorized", "alpha": 1.5, "gate": 0},
    ]


@contextmanager
def serving(
    material: Material, log: Path, *flags: str, plugin: bool = True, fault: Path | None = None
) -> Iterator[httpx.Client]:
    """A client of a new server; RuntimeError with the end of its log where it does not start.

    ``fault``: the file that names the fault of our plugin that is there at the time, see ``vllm_faulty``.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(material.folder)]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs", "16"]
    command += ["--block-size", str(BLOCK), *flags]
    environment = {**os.environ, **ENVIRONMENT}
    environment["MNEMOSCOPE_RUN"] = str(material.run)
    if fault:
        environment |= vllm_faulty.installed(log.parent, fault)
    if not plugin:
        environment |= {"VLLM_PLUGINS": ""}
        del environment["MNEMOSCOPE_RUN"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        # A server closes a connection that was idle for seconds, perhaps while a client begins to use it again.
        fresh = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=900, limits=fresh) as client:
            _await_start(client, process, log)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _await_start(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 900
    while True:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the server does not start: {log.read_text()[-3000:]}")


def ask(client: httpx.Client, wanted: Wanted, streamed: bool = False) -> dict[str, Any]:
    """The answer of a server: ``token_ids``, their ``log_p``, and the report."""
    body: dict[str, Any] = {
        **{"model": "served", "prompt": wanted.prompt, "max_tokens": len(wanted.tokens), "temperature": 0},
        **{"logprobs": 1, "ignore_eos": True, "return_token_ids": True, "stream": streamed},
    }
    if wanted.settings:
        body["vllm_xargs"] = wanted.settings
    if not streamed:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
    else:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return {
        "token_ids": [token for choice in choices for token in choice["token_ids"] or ()],
        "log_p": [p for choice in choices for p in (choice["logprobs"] or {}).get("token_logprobs", ())],
        "report": next((choice["mnemoscope"] for choice in choices if "mnemoscope" in choice), None),
    }


@dataclass(frozen=True)
class Compared:
    """How the answers of a server compare with those of transformers.

    Attributes:
        counts: of ``same``, ``tie`` (another token, where the two best are a tie), and ``differs``.
        log_p, p_memorized: the largest differences.
        wrong: what is wrong, in words.
    """

    counts: Counter[str]
    log_p: float
    p_memorized: float
    wrong: list[str]


def compare(wanted: Sequence[Wanted], answers: Sequence[dict[str, Any]]) -> Compared:
    """Compare answers, their log probabilities up to where a tie parts them, and reports."""
    counts, log_p, p_memorized, wrong = Counter[str](), 0.0, 0.0, []
    for one, answer in zip(wanted, answers, strict=True):
        got, report = answer["token_ids"], answer["report"]
        parts = [n for n, (a, b) in enumerate(zip(got, one.tokens, strict=False)) if a != b]
        equal = parts[0] if parts else len(one.tokens)
        kind = "same" if got == one.tokens else "tie" if parts and one.gaps[equal] < TIE else "differs"
        counts[kind] += 1
        if kind == "differs":
            wrong.append(f"{one.settings}: token {equal} of {got}, not {one.tokens}")
        log_p = max([log_p, *(abs(a - b) for a, b in zip(answer["log_p"][:equal], one.log_p[:equal], strict=True))])
        if (report is None) != (one.report is None) or (one.report and report["acted"] != one.report["acted"]):
            wrong.append(f"{one.settings}: report {report}, not {one.report}")
        elif one.report and "p_memorized" in one.report:
            p_memorized = max(p_memorized, abs(report["p_memorized"] - one.report["p_memorized"]))
    return Compared(counts, log_p, p_memorized, wrong)


def ask_all(client: httpx.Client, wanted: Sequence[Wanted]) -> Compared:
    """Ask from many clients at once, a third of them for a stream."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda n: ask(client, wanted[n], n % 3 == 0), range(len(wanted))))
    return compare(wanted, answers)


def counter(client: httpx.Client, name: str) -> float:
    """A total that vLLM counts."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}_total{{"))
