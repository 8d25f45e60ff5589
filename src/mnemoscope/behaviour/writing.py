"""Plain greedy generation: continuations of prompts, and answers up to what closes them.

Shapes: N prompts, T tokens (columns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking
from mnemoscope.errors import InputError
from mnemoscope.models import PLAINLY, context_length, end_ids
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Applied = Callable[[], AbstractContextManager[Any]]


def decode(asking: Asking, examples: Sequence[Example], applied: Applied = nullcontext) -> list[str]:
    """Generate an answer to each example, up to what closes it."""
    tokenizer, closing = asking.tokenizer, asking.boundary_ids()
    options = [option for example in examples for option in example.options]
    longest = max(map(len, tokenizer(options, add_special_tokens=False).input_ids)) if options else 0
    texts: list[str] = []
    for start in range(0, len(examples), asking.batch_size):
        inputs = asking.padded([asking.text(e.prompt) for e in examples[start : start + asking.batch_size]])
        with applied():
            output = _generate(asking.model, inputs, longest + 1, closing, asking.pad_id)
        answers = output[:, inputs.input_ids.shape[1] :].tolist()
        ends = [next((i for i, token in enumerate(answer) if token in closing), len(answer)) for answer in answers]
        texts += tokenizer.batch_decode([answer[:end] for answer, end in zip(answers, ends, strict=True)])
    return texts


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Any, max_new_tokens: int = 20
) -> list[str]:
    """Generate a continuation of each prompt; see ``continued``."""
    ids_NT, _, width = continued(model, tokenizer, inputs, max_new_tokens)
    return tokenizer.batch_decode(ids_NT[:, width:], skip_special_tokens=True)


def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Any, max_new_tokens: int
) -> tuple[Tensor, Tensor, int]:
    """Generate behind the prompts of a left-padded batch (``Asking.padded``).

    Returns:
        ids (N, T), their mask (N, T), which is 0 behind an end of text, and how many columns are the prompts.

    Raises:
        InputError: the prompts leave no room for another token in the model's context.
    """
    width, limit = inputs.input_ids.shape[1], context_length(model)
    if width >= limit:
        raise InputError(f"prompt: {width} tokens leave no room for an answer; the model reads at most {limit}")
    ends = end_ids(model, tokenizer)
    output = _generate(model, inputs, min(max_new_tokens, limit - width), ends or None, tokenizer.pad_token_id)
    ends_NT = torch.isin(output[:, width:], torch.tensor(ends, dtype=torch.long, device=output.device)).long()
    text_NT = (ends_NT.cumsum(1) - ends_NT) == 0  # the end itself belongs to the text
    return output, torch.cat([inputs.attention_mask, text_NT.long()], dim=1), width


@torch.no_grad()
def _generate(model: Any, inputs: Any, most: int, ends: list[int] | None, pad: int | None) -> Tensor:
    """Prompts and what is generated behind them, (N, T)."""
    return model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=most,
        do_sample=False,
        **PLAINLY,
        eos_token_id=ends,
        pad_token_id=pad,
    )
