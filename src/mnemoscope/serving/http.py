"""OpenAI's routes of vLLM: wrong requests are refused before an answer begins, reports become fields of choices."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from mnemoscope.errors import InputError
from mnemoscope.serving import engine
from mnemoscope.serving.asking import ADMITTED, FIELDS, parse, served_by

SSE = "data: "
_installed = False


def install() -> None:
    """Put everything in place, once a process."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        engine.wrapped(request, "to_sampling_params", _checked)
    for request in (ChatCompletionRequest, CompletionRequest):
        engine.wrapped(request, "to_beam_search_params", _without_beams)
    engine.wrapped(OpenAIServingChat, "chat_completion_full_generator", _whole_chat)
    engine.wrapped(OpenAIServingChat, "chat_completion_stream_generator", _streamed_chat)
    engine.wrapped(OpenAIServingCompletion, "request_output_to_completion_response", _whole_completion)
    engine.wrapped(OpenAIServingCompletion, "completion_stream_generator", _streamed_completion)


def _checked(convert: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Settings of a request, refused before its stream begins."""
    offered, extra = engine.offered_here(), self.model_extra or {}
    given = getattr(self, "vllm_xargs", None)
    try:
        if offered is None:
            engine.refuse_unoffered({**extra, **(given or {})})
        else:
            for name in FIELDS:
                if name in extra:
                    raise InputError(f"{name}: is ignored here; give it inside of vllm_xargs")
            if "vllm_xargs" in extra:
                raise InputError("vllm_xargs: this route ignores it; use /v1/completions or /v1/chat/completions")
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
