"""Asks for ``prove``: a vLLM server over HTTP, as clients of OpenAI's completions route do, or an ``LLM`` here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, build_opener
from urllib.request import Request as Posted

from mnemoscope.runs.errors import InputError
from mnemoscope.serving.admission import ADMITTED
from mnemoscope.serving.served import Answer, Ask, Request

AT_ONCE = 16  # requests
PATIENCE = 300  # seconds, for a server in use
LOOPBACK = ("localhost", "127.0.0.1", "::1")
KEY = "VLLM_API_KEY"  # the environment variable from which vLLM takes it too


class Server:
    """A server of one model.

    Attributes:
        model: the name under which it serves the model.
        room: the most tokens of prompt and answer; None where it does not say.
        engine: its name and version.
        quantization: of its weights, see ``served.quantize``; None where they are whole.
    """

    def __init__(self, url: str) -> None:
        """Raises InputError where no server of a model answers there."""
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"server: {url!r} is no address; allowed are http://HOST:PORT and https://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._opener: OpenerDirector = build_opener(*([ProxyHandler({})] if parts.hostname in LOOPBACK else []))
        status, told = self._call("/v1/models")
        models = told.get("data") if isinstance(told, dict) else None
        if status != 200 or not isinstance(models, list) or not models or "id" not in models[0]:
            why = f"{status}: {_message(told)}" + (f"; set {KEY}" if status == 401 else "")
            raise InputError(f"server: {self.url} does not serve a model as OpenAI's API does ({why})")
        self.model, self.room = str(models[0]["id"]), models[0].get("max_model_len")
        status, told = self._call("/version")
        self.engine = f"vLLM {told['version']}" if status == 200 and "version" in told else "an engine without version"
        _, state = self._call("/mnemoscope/state")
        self.quantization = state.get("quantization") if isinstance(state, dict) else None

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Ask all, several at a time, so that they share passes; InputError where the server is gone."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(self._answer, requests))

    def _answer(self, request: Request) -> Answer:
        greedy = {"temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True, "max_tokens": request.tokens}
        body: dict[str, Any] = {"model": self.model, "prompt": request.ids, "logprobs": 1, "return_token_ids": True}
        body |= greedy | ({"vllm_xargs": dict(request.settings)} if request.settings else {})
        status, told = self._call("/v1/completions", body | ({"cache_salt": request.salt} if request.salt else {}))
        if status != 200:
            return Answer(status, message=_message(told))
        try:
            choice = told["choices"][0]
            log_p = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
            tokens = tuple(int(token) for token in choice["token_ids"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            return Answer(status, message=f"the answer has no {error}")
        return Answer(status, tokens, log_p, choice.get(ADMITTED))

    def _call(self, route: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        posted = Posted(self.url + route, json.dumps(body).encode() if body else None, headers)
        try:
            with self._opener.open(posted, timeout=PATIENCE) as answer:
                status, content = answer.status, answer.read()
        except HTTPError as error:
            with error:
                status, content = error.code, error.read()
        except (OSError, ValueError, HTTPException) as error:
            raise InputError(
                f"server: {self.url} does not answer ({getattr(error, 'reason', None) or error})"
            ) from error
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode(errors="replace")


def _message(told: Any) -> str:
    """The message of an error, in OpenAI's form or another, in one line."""
    found = told.get("error", told) if isinstance(told, dict) else told
    found = found.get("message", found) if isinstance(found, dict) else found
    return " ".join(str(found).split())[:300]


def asking(llm: Any) -> Ask:
    """A function that asks an ``LLM`` which was started with MNEMOSCOPE_RUN; what it refuses is a 400, as over HTTP."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    greedy = {"temperature": 0, "ignore_eos": True, "logprobs": 1}

    def ask(requests: Sequence[Request]) -> list[Answer]:
        salts = [{"cache_salt": one.salt} if one.salt else {} for one in requests]
        prompts = [{"prompt_token_ids": list(one.ids)} | salt for one, salt in zip(requests, salts, strict=True)]
        settings = [{"max_tokens": one.tokens, "extra_args": dict(one.settings) or None} for one in requests]
        try:
            outputs = llm.generate(prompts, [SamplingParams(**greedy, **some) for some in settings], use_tqdm=False)
        except VLLMValidationError as error:  # of one of them, which ends all
            return [Answer(400, message=str(error))] if len(requests) == 1 else [ask([one])[0] for one in requests]
        return [_answer(output) for output in outputs]

    return ask


def _answer(output: Any) -> Answer:
    (written,) = output.outputs
    log_p = tuple(float(there[token].logprob) for token, there in zip(written.token_ids, written.logprobs, strict=True))
    return Answer(200, tuple(written.token_ids), log_p, getattr(output, ADMITTED, None))
