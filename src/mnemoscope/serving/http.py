"""OpenAI's routes of vLLM: wrong requests are refused before an answer begins, reports become fields of choices."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any

from mnemoscope.runs.errors import InputError
from mnemoscope.serving import metrics
from mnemoscope.serving.admission import (
    ADMITTED,
    FIELDS,
    PASSES,
    TOKENS,
    Offered,
    gated_beforehand,
    other_word,
    parse,
    refuse_unoffered,
)
from mnemoscope.serving.written import shares_of

SSE = "data: "
CARRYING = ("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch")  # settings there, reports back
HOLDERS = ("vllm_xargs", "extra_args", "extra_body", "sampling_params")  # where a body may hold settings
# Parts of a body that hold what a user sends or a caller keeps, whatever its names are.
DATA = (
    *("messages", "prompt", "input", "tools", "tool_choice", "response_format", "structured_outputs", "metadata"),
    *("chat_template_kwargs", "mm_processor_kwargs", "text", "system", "kv_transfer_params", "logit_bias"),
)
_here: list[Offered | None] = []  # what the engine of this process has
# Whether a request is asked so that its gate decides, and nothing else.
deciding: ContextVar[bool] = ContextVar("deciding", default=False)
# Reports on the choices of a request, in order; None in what came through no guard.
_reports: ContextVar[list[Any] | None] = ContextVar("reports", default=None)


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``around(original, *args, **kwargs)``."""
    original = getattr(owner, name)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, call)


def install(offered: Offered | None) -> None:
    """Put everything in place for a server that offers something, or nothing."""
    if not _here:
        from vllm.entrypoints.launchers.api_server import entry
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.v1.engine.async_llm import AsyncLLM

        wrapped(entry, "build_app", _guarded)
        wrapped(AsyncLLM, "generate", _generated)
        for request in (ChatCompletionRequest, CompletionRequest):
            for name in ("to_sampling_params", "to_beam_search_params"):
                wrapped(request, name, _unguarded)
    _here[:] = [offered]


def refusal(error: InputError) -> Exception:
    """vLLM's own kind of error for a wrong request, which is a 400 over HTTP."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter=str(error).partition(":")[0])


def check(path: str, body: Any) -> bool:
    """Whether a request, as JSON, asks for something.

    Raises InputError where its settings are wrong, this server cannot serve them, or where they stand its route would
    ignore them, or answer without a report.
    """
    (offered,) = _here
    for holder, found in _held("", body):
        if offered is None:
            refuse_unoffered(found)
            continue
        name = next((name for name in FIELDS if name in found), None)
        if not holder and not name:
            near = (str(n) for n in found if other_word(n) or get_close_matches(str(n).lower(), ("steer",), 1, 0.8))
            name = next(near, None)
        if name and not (path.endswith(CARRYING) and holder == "vllm_xargs"):
            inside = f"in {holder} " if holder else ""
            routes = " and ".join(CARRYING[:2])
            raise InputError(f"{name}: is ignored {inside}here; give it inside of vllm_xargs, which {routes} take")
    settings = body.get("vllm_xargs") if isinstance(body, Mapping) else None
    asked = parse(settings) if offered and isinstance(settings, Mapping) else None
    if offered and asked:
        offered.serving(asked)
        if body.get("use_beam_search"):
            raise InputError("use_beam_search: vLLM does not pass vllm_xargs to it; leave one of them out")
    return asked is not None


def _held(holder: str, body: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a body that may hold settings, by the path to them; those that vLLM does not know and drops too."""
    if not isinstance(body, Mapping):
        return
    if not holder or "steer" in body or get_close_matches(holder.rpartition(".")[2].lower(), HOLDERS, 1, cutoff=0.8):
        yield holder, body
    for name, part in body.items():
        if name not in DATA:
            yield from _held(f"{holder}.{name}".lstrip("."), part)


class Guard:
    """ASGI middleware: refuses what vLLM would drop without a word, and puts reports into the choices of answers."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Serve a request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        messages: list[Any] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
        try:
            body = json.loads(b"".join(message.get("body", b"") for message in messages))
        except ValueError:  # UnicodeDecodeError among them; what is no JSON is left to vLLM
            body = None
        try:
            asks = check(scope["path"], body)
        except InputError as error:
            from starlette.responses import JSONResponse

            metrics.count_refused()
            # As vLLM answers a wrong request.
            facts = {
                "message": str(error),
                "type": "BadRequestError",
                "param": str(error).partition(":")[0],
                "code": 400,
            }
            return await JSONResponse({"error": facts}, status_code=400)(scope, receive, send)
        waiting, reports = iter(messages), list[Any]()
        _reports.set(reports)

        async def again() -> Any:
            return next(waiting, None) or await receive()

        return await self.app(scope, again, _reporting(send, reports) if asks else send)


def _reporting(send: Callable[..., Any], reports: list[Any]) -> Callable[..., Any]:
    """What sends an answer, whole or in events, with reports in it."""
    begun: list[Any] = []  # held back until the length of the body is known
    told: dict[int, int] = {}  # by choice, tokens whose reading was sent

    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            begun.append(message)
            return
        if any(reports):
            message = {**message, "body": _with_reports(message.get("body", b""), reports, told)}
        for one in begun:
            length = str(len(message.get("body", b""))).encode()
            headers = [(name, length if name == b"content-length" else value) for name, value in one["headers"]]
            await send({**one, "headers": headers})
        begun.clear()
        await send(message)

    return sent


def _with_reports(body: bytes, reports: list[Any], told: dict[int, int]) -> bytes:
    """An answer, or events of it: choices that end get their reports, all get what was read of tokens since."""
    lines = body.decode().split("\n")
    for n, line in enumerate(lines):
        begin = SSE if line.startswith(SSE) else ""
        event = json.loads(line.removeprefix(SSE)) if line.startswith(begin + "{") else {}
        changed = False
        for choice in event.get("choices", ()):
            report, ended = reports[choice["index"]] or {}, bool(choice.get("finish_reason"))
            tokens = report.get(TOKENS, [])
            fresh = {TOKENS: tokens[told.get(choice["index"], 0) :]} if TOKENS in report else {}
            told[choice["index"]] = len(tokens)
            if ended or fresh.get(TOKENS):
                choice[ADMITTED] = (report | fresh | shares_of(tokens)) if ended else fresh
                changed = True
        lines[n] = begin + json.dumps(event, ensure_ascii=False) if changed else line
    return "\n".join(lines).encode()


def _guarded(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The application of a server, whose requests are looked at once they are known to be allowed in."""
    from starlette.middleware import Middleware

    app = build(*args, **kwargs)
    app.add_api_route("/mnemoscope/state", lambda: metrics.state_of(_here[0]), methods=["GET"])
    app.user_middleware.append(Middleware(Guard))
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it already
    return app


def _generated(
    generate: Callable[..., Any], self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
) -> Any:
    """The outputs for a prompt, whose report is kept for its choices where it is of an HTTP request."""
    (offered,), given = _here, getattr(sampling_params, "extra_args", None) or {}
    asked = parse(given) if offered and given.get("gate") is not None else None
    if offered and asked and gated_beforehand(offered.serving(asked)[0]):
        generate = partial(_decided, generate)
    reports, results = _reports.get(), generate(self, prompt, sampling_params, *args, **kwargs)
    if reports is None:
        return results
    choices = sampling_params.n
    mine = slice(len(reports), len(reports) + choices)
    reports += [None] * choices

    async def watched() -> AsyncIterator[Any]:
        report: dict[str, Any] | None = None
        async with aclosing(results) as outputs:
            async for output in outputs:
                if report := getattr(output, ADMITTED, None):
                    reports[mine] = [report] * choices
                yield output
        if report:
            metrics.count(report)
            if self.vllm_config.observability_config.otlp_traces_endpoint:
                metrics.trace(report, _context(kwargs.get("trace_headers")))

    return watched()


def _context(headers: Mapping[str, str] | None) -> Any:
    """The trace of a request, as vLLM finds it."""
    from vllm.tracing import extract_trace_context

    return extract_trace_context(headers)


async def _decided(
    generate: Callable[..., Any], engine: Any, prompt: Any, params: Any, name: str, **kwargs: Any
) -> AsyncIterator[Any]:
    """The outputs for a prompt whose gate decides in a pass beforehand, and then steers it or does not."""
    from vllm import SamplingParams

    report: dict[str, Any] = {}
    first = SamplingParams(temperature=0, max_tokens=1, extra_args=dict(params.extra_args))
    token = deciding.set(True)
    try:
        async for output in generate(engine, prompt, first, f"{name}-gate", **kwargs):
            report = getattr(output, ADMITTED, None) or report
    finally:
        deciding.reset(token)
    left_out = ("gate", "read") if report["acted"] else FIELDS
    then = params.clone()
    then.extra_args = {name: value for name, value in params.extra_args.items() if name not in left_out}
    async for output in generate(engine, prompt, then, name, **kwargs):
        setattr(output, ADMITTED, report | {"passes": PASSES})
        yield output


def _unguarded(convert: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse the settings of a request that came through no guard: from a file of a batch no report comes back."""
    if _reports.get() is None:
        try:
            check("", {**(self.model_extra or {}), "vllm_xargs": self.vllm_xargs})
        except InputError as error:
            raise refusal(error) from None
    return convert(self, *args, **kwargs)
