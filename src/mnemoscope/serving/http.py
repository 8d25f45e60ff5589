"""OpenAI's routes of vLLM: wrong requests are refused before an answer begins, reports become fields of choices."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from mnemoscope.runs.errors import InputError
from mnemoscope.serving import engine
from mnemoscope.serving.asking import ADMITTED, FIELDS, other_word, parse, served_by

SSE = "data: "
CARRYING = ("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch")  # settings there, reports back
HOLDERS = ("vllm_xargs", "extra_args", "extra_body", "sampling_params")  # where a body may hold settings
# Parts of a body that hold what a user sends or a caller keeps, whatever its names are.
DATA = (
    *("messages", "prompt", "input", "tools", "tool_choice", "response_format", "structured_outputs", "metadata"),
    *("chat_template_kwargs", "mm_processor_kwargs", "text", "system", "kv_transfer_params", "logit_bias"),
)
_installed = False


def install() -> None:
    """Put everything in place, once a process."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    engine.wrapped(entry, "build_app", _guarded)
    for request in (ChatCompletionRequest, CompletionRequest):
        engine.wrapped(request, "to_sampling_params", _checked)
        engine.wrapped(request, "to_beam_search_params", _without_beams)
    engine.wrapped(OpenAIServingChat, "chat_completion_full_generator", _whole_chat)
    engine.wrapped(OpenAIServingChatBatch, "chat_completion_full_generator_batch", _whole_batch)
    engine.wrapped(OpenAIServingChat, "chat_completion_stream_generator", _streamed_chat)
    engine.wrapped(OpenAIServingCompletion, "request_output_to_completion_response", _whole_completion)
    engine.wrapped(OpenAIServingCompletion, "completion_stream_generator", _streamed_completion)


def refuse_ignored(body: Any, path: str, names: Collection[str]) -> None:
    """Raises InputError for settings in the body of a request that its route would ignore, or answer without a report.

    Args:
        body: as JSON.
        path: of the route.
        names: of settings.
    """
    carrying = path.endswith(CARRYING)
    for holder, found in _held("", body):
        name = next((name for name in names if name in found), None)
        if not holder and not name:
            name = next((str(given) for given in found if other_word(given) or _near(given)), None)
        if name and not (carrying and holder == "vllm_xargs"):
            inside = f"in {holder} " if holder else ""
            routes = " and ".join(CARRYING[:2])
            raise InputError(f"{name}: is ignored {inside}here; give it inside of vllm_xargs, which {routes} take")


def _near(given: Any) -> bool:
    return bool(get_close_matches(str(given).lower(), ("steer",), 1, cutoff=0.8))


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
    """ASGI middleware: refuses settings on routes, and in places of a body, where vLLM drops them without a word."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Serve a request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        messages: list[Any] = []
        body = b""
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            body += messages[-1].get("body", b"")
        try:
            self.check(scope["path"], body)
        except InputError as error:
            return await _answer_400(error)(scope, receive, send)
        waiting = iter(messages)

        async def again() -> Any:
            return next(waiting, None) or await receive()

        return await self.app(scope, again, send)

    @staticmethod
    def check(path: str, body: bytes) -> None:
        """Raises InputError as ``refuse_ignored``; what is no JSON is left to vLLM."""
        names = FIELDS if engine.offered_here() else ("steer",)
        try:
            found = json.loads(body)
        except ValueError:  # UnicodeDecodeError among them
            return
        if engine.offered_here():
            refuse_ignored(found, path, names)
        else:
            for _, held in _held("", found):
                engine.refuse_unoffered(held)


def _answer_400(error: InputError) -> Any:
    """The answer that vLLM gives to a wrong request."""
    from starlette.responses import JSONResponse

    facts = {"message": str(error), "type": "BadRequestError", "param": str(error).partition(":")[0], "code": 400}
    return JSONResponse({"error": facts}, status_code=400)


def _guarded(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The application of a server, whose requests are looked at once they are known to be allowed in."""
    from starlette.middleware import Middleware

    app = build(*args, **kwargs)
    app.user_middleware.append(Middleware(Guard))
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it already
    return app


def _checked(convert: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Settings of a request, refused before its stream begins."""
    offered, given = engine.offered_here(), self.vllm_xargs
    try:
        if offered is None:
            engine.refuse_unoffered(given or {})
        else:
            refuse_ignored(self.model_extra or {}, CARRYING[0], FIELDS)  # of routes, and batches, without a guard
            if asked := parse(given):
                served_by(asked, offered)
    except InputError as error:
        raise engine.refusal(error) from None
    return convert(self, *args, **kwargs)


def _without_beams(convert: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM drops ``vllm_xargs`` in beam search, so such a request would be answered unsteered."""
    if any(name in (self.vllm_xargs or {}) for name in FIELDS):
        raise engine.refusal(InputError("use_beam_search: vLLM does not pass vllm_xargs to it; leave one of them out"))
    return convert(self, *args, **kwargs)


async def _whole_chat(make: Callable[..., Any], self: Any, request: Any, results: Any, *rest: Any, **named: Any) -> Any:
    reports: dict[int, Any] = {}
    response = await make(self, request, _watched(results, reports), *rest, **named)
    for choice in getattr(response, "choices", ()):
        _put(choice, reports.get(0))
    return response


async def _whole_batch(
    make: Callable[..., Any], self: Any, request: Any, results: Any, *rest: Any, **named: Any
) -> Any:
    reports: list[dict[int, Any]] = [{} for _ in results]
    watched = [_watched(one, report) for one, report in zip(results, reports, strict=True)]
    response = await make(self, request, watched, *rest, **named)
    for choice in getattr(response, "choices", ()):
        _put(choice, reports[choice.index].get(0))
    return response


def _whole_completion(make: Callable[..., Any], self: Any, results: Any, *rest: Any, **named: Any) -> Any:
    response = make(self, results, *rest, **named)
    reports = [getattr(result, ADMITTED, None) for result in results for _ in result.outputs]
    for choice, report in zip(response.choices, reports, strict=True):
        _put(choice, report)
    return response


async def _streamed_chat(
    make: Callable[..., Any], self: Any, request: Any, results: Any, *rest: Any, **named: Any
) -> AsyncIterator[str]:
    reports: dict[int, Any] = {}
    async for line in make(self, request, _watched(results, reports), *rest, **named):
        yield _with_reports(line, reports, 0)


async def _streamed_completion(
    make: Callable[..., Any], self: Any, request: Any, inputs: Any, results: Any, *rest: Any, **named: Any
) -> AsyncIterator[str]:
    reports: dict[int, Any] = {}
    async for line in make(self, request, inputs, _watched(results, reports), *rest, **named):
        yield _with_reports(line, reports, request.n or 1)


async def _watched(results: AsyncIterator[Any], reports: dict[int, Any]) -> AsyncIterator[Any]:
    """The same outputs; their reports by the number of the prompt."""
    async for result in results:
        number, output = result if isinstance(result, tuple) else (0, result)
        if report := getattr(output, ADMITTED, None):
            reports[number] = report
        yield result


def _with_reports(line: str, reports: dict[int, Any], choices: int) -> str:
    """An event of a stream; choices that end in it get their reports. ``choices`` of each prompt; 0: of one."""
    if not reports or not line.startswith(SSE + "{"):
        return line
    event = json.loads(line.removeprefix(SSE))
    ended = [choice for choice in event.get("choices", ()) if choice.get("finish_reason")]
    for choice in ended:
        if report := reports.get(choice["index"] // choices if choices else 0):
            choice[ADMITTED] = report
    return f"{SSE}{json.dumps(event, ensure_ascii=False)}\n\n" if ended else line


def _put(choice: Any, report: Any) -> None:
    if report:
        setattr(choice, ADMITTED, report)
