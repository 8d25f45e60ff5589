"""Asks an ``LLM`` of vLLM in this process, for ``prove`` and ``cost``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mnemoscope.serving.asking import ADMITTED
from mnemoscope.serving.expected import Answer, Request
from mnemoscope.serving.served import Ask


def asking(llm: Any) -> Ask:
    """A function that asks an ``LLM`` which was started with MNEMOSCOPE_RUN; what it refuses is a 400, as over HTTP."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    def ask(requests: Sequence[Request]) -> list[Answer]:
        prompts = [
            {"prompt_token_ids": list(one.ids)} | ({"cache_salt": one.salt} if one.salt else {}) for one in requests
        ]
        params = [
            SamplingParams(
                temperature=0,
                ignore_eos=True,
                max_tokens=one.tokens,
                logprobs=1,
                extra_args=dict(one.settings) or None,
            )
            for one in requests
        ]
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        except VLLMValidationError as error:  # of one of them, which ends all
            return [Answer(400, message=str(error))] if len(requests) == 1 else [ask([one])[0] for one in requests]
        return [_answer(output) for output in outputs]

    return ask


def _answer(output: Any) -> Answer:
    (written,) = output.outputs
    log_p = tuple(float(there[token].logprob) for token, there in zip(written.token_ids, written.logprobs, strict=True))
    return Answer(200, tuple(written.token_ids), log_p, getattr(output, ADMITTED, None))
