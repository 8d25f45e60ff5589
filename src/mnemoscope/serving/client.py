"""Asks a vLLM server over HTTP, with OpenAI's completions route, as any client does. Imports no vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from mnemoscope.runs.errors import InputError
from mnemoscope.serving import expected

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
    """

    def __init__(self, url: str) -> None:
        """Raises InputError where no server of a model answers there."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"server: {url!r} is no address; allowed are http://HOST:PORT and https://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._opener: OpenerDirector = build_opener(*([ProxyHandler({})] if parts.hostname in LOOPBACK else []))
        status, told = self._call("/v1/models", None)
        models = told.get("data") if isinstance(told, dict) else None
        if status != 200 or not isinstance(models, list) or not models or "id" not in models[0]:
            why = f"{status}: {_message(told)}" + (f"; set {KEY}" if status == 401 else "")
            raise InputError(f"server: {self.url} does not serve a model as OpenAI's API does ({why})")
        self.model, self.room = str(models[0]["id"]), models[0].get("max_model_len")
        status, told = self._call("/version", None)
        self.engine = f"vLLM {told['version']}" if status == 200 and "version" in told else "an engine without version"

    def ask(self, requests: Sequence[expected.Request]) -> list[expected.Answer]:
        """Ask all, several at a time, so that they share passes; InputError where the server is gone."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(self._answer, requests))

    def _answer(self, request: expected.Request) -> expected.Answer:
        greedy = {"temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True, "max_tokens": request.tokens}
        body: dict[str, Any] = {"model": self.model, "prompt": list(request.ids), "logprobs": 1, **greedy}
        body |= {"return_token_ids": True}
        body |= {"vllm_xargs": dict(request.settings)} if request.settings else {}
        body |= {"cache_salt": request.salt} if request.salt else {}
        status, told = self._call("/v1/completions", body)
        if status != 200:
            return expected.Answer(status, message=_message(told))
        try:
            choice = told["choices"][0]
            log_p = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
            tokens = tuple(int(token) for token in choice["token_ids"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            return expected.Answer(status, message=f"the answer has no {error}")
        return expected.Answer(status, tokens, log_p, choice.get("mnemoscope"))

    def _call(self, route: str, body: Mapping[str, Any] | None) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._opener.open(Request(self.url + route, data, headers), timeout=PATIENCE) as answer:
                status, content = answer.status, answer.read()
        except HTTPError as error:
            with error:
                status, content = error.code, error.read()
        except (OSError, ValueError, HTTPException) as error:
            why = getattr(error, "reason", None) or error
            raise InputError(f"server: {self.url} does not answer ({why})") from error
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode(errors="replace")


def _message(told: Any) -> str:
    """The message of an error, in OpenAI's form or another, in one line."""
    found = told.get("error", told) if isinstance(told, dict) else told
    found = found.get("message", found) if isinstance(found, dict) else found
    return " ".join(str(found).split())[:300]
