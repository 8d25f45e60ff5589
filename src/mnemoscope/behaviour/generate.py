"""Generation: answers up to what closes them, continuations, text by sampling, and what a text costs a model.

Shapes: N texts, T tokens (columns), V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking, pad_of
from mnemoscope.models import PLAINLY, context_length, end_ids, pass_inputs, with_last_logits
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Applied = Callable[[], AbstractContextManager[Any]]
PHRASE_ENDS = ("", "\n", ".", ",")
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}


def decode(asking: Asking, examples: Sequence[Example], applied: Applied = nullcontext) -> list[str]:
    """Generate an answer to each example, up to what closes it; where any word end does, up to the end of a phrase."""
    phrase = asking if asking.boundary else replace(asking, boundary=PHRASE_ENDS)
    tokenizer, closing = asking.tokenizer, phrase.boundary_ids()
    options = [option for example in examples for option in example.options]
    longest = max(map(len, tokenizer(options, add_special_tokens=False).input_ids)) if options else 0
    texts: list[str] = []
    for start in range(0, len(examples), asking.batch_size):
        inputs = asking.padded([asking.text(e.prompt) for e in examples[start : start + asking.batch_size]])
        with applied():
            ids_NT, mask_NT, width = continued(asking.model, tokenizer, inputs, longest + 1, closing)
        for ids, mask in zip(ids_NT[:, width:].tolist(), mask_NT[:, width:].tolist(), strict=True):
            answer = ids[: sum(mask)]
            texts.append(tokenizer.decode(answer[:-1] if answer[-1] in closing else answer))
    return texts


def phrase_of(text: str) -> str:
    """A text up to the end of its first phrase: a line's end, or a punctuation mark before white space or the end."""
    begins = len(text) - len(text.lstrip())
    end = re.search(r"[.,;:!?]+(?=\s|$)|\n", text[begins:])
    return text[: begins + end.start()] if end else text


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    inputs: Any,
    max_new_tokens: int,
    ends: Collection[int] | None = None,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> tuple[Tensor, Tensor, int]:
    """Generate greedily behind the prompts of a left-padded batch (``Asking.padded``).

    Args:
        ends: tokens behind which a text ends; default: those of the model and its tokenizer.
        processors: change the logits of each token in turn, float32 (N, V).

    Returns ids (N, T), their mask (N, T), which is 0 behind the end of a text, and how many columns are the prompts.
    Raises InputError where the prompts leave no room for another token in the model's context.
    """
    from transformers import LogitsProcessorList

    width, limit = inputs.input_ids.shape[1], context_length(model)
    if width >= limit:
        raise InputError(f"prompt: {width} tokens leave no room for an answer; the model reads at most {limit}")
    ends = sorted(end_ids(model, tokenizer) if ends is None else ends)
    ids_NT = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=min(max_new_tokens, limit - width),
        do_sample=False,
        logits_processor=LogitsProcessorList(processors),
        **PLAINLY,
        eos_token_id=ends or None,
        pad_token_id=pad_of(tokenizer),
    )
    ends_NT = torch.isin(ids_NT[:, width:], torch.tensor(ends, dtype=torch.long, device=ids_NT.device)).long()
    text_NT = (ends_NT.cumsum(1) - ends_NT) == 0  # the end itself belongs to the text
    return ids_NT, torch.cat([inputs.attention_mask, text_NT.long()], dim=1), width


@torch.no_grad()
def written(asking: Asking, texts: int, length: int, seed: int) -> Tensor:
    """Texts sampled from the model behind its first token, at temperature 1; int64 (N, 1 + length)."""
    model, tokenizer = asking.model, asking.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids_NT = torch.full((texts, 1), first, device=model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = {"input_ids": ids_NT, "attention_mask": torch.ones_like(ids_NT)}
        ends = {"max_new_tokens": length, "eos_token_id": None, "pad_token_id": first}
        return model.generate(**inputs, **SAMPLING, **PLAINLY, **ends)


@torch.no_grad()
def cost_of(model: PreTrainedModel, ids_NT: Tensor, mask_NT: Tensor, width: int) -> np.ndarray:
    """Mean cost of the tokens from column ``width`` on, up to the end of each text, in nats a token; float64 (N,)."""
    output = with_last_logits(model, pass_inputs(model, ids_NT, mask_NT), ids_NT.shape[1] - width + 1)
    logp_NTV = output.logits[:, :-1].float().log_softmax(-1)
    logp_NT = logp_NTV.gather(2, ids_NT[:, width:, None])[..., 0]
    written_NT = mask_NT[:, width:].bool()  # each row has a token
    cost_N = -logp_NT.masked_fill(~written_NT, 0.0).sum(1) / written_NT.sum(1)
    return np.asarray(cost_N.double().cpu())
