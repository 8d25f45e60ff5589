"""What a model writes behind prompts, by plain greedy generation.

Shapes: N prompts, T tokens (columns).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemoscope.errors import InputError
from mnemoscope.models import (
    PLAINLY,
    context_length,
    end_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Any, max_new_tokens: int = 20
) -> list[str]:
    """What a model says behind each prompt, by plain greedy ``generate``; see ``continued``."""
    ids_NT, _, width = continued(model, tokenizer, inputs, max_new_tokens)
    return tokenizer.batch_decode(ids_NT[:, width:], skip_special_tokens=True)


@torch.no_grad()
def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Any, max_new_tokens: int
) -> tuple[Tensor, Tensor, int]:
    """Prompts with what a model says behind them, by plain greedy ``generate``.

    Args:
        inputs: prompts as a left-padded batch, ``input_ids`` and ``attention_mask`` (``Asking.padded``).

    Returns:
        ids (N, T), their mask (N, T), in which what follows an end of text is 0, and how many columns are the prompts.

    Raises:
        InputError: the prompts leave no room for another token in what the model reads.
    """
    width, limit = inputs.input_ids.shape[1], context_length(model)
    if width >= limit:
        raise InputError(f"prompt: {width} tokens leave no room for an answer; the model reads at most {limit}")
    ends = end_ids(model, tokenizer)
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=min(max_new_tokens, limit - width),
        do_sample=False,
        **PLAINLY,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    ends_NT = torch.isin(output[:, width:], torch.tensor(ends, dtype=torch.long, device=output.device)).long()
    # The end itself belongs to what was said.
    said_NT = (ends_NT.cumsum(1) - ends_NT) == 0
    return output, torch.cat([inputs.attention_mask, said_NT.long()], dim=1), width
