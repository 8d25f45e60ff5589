"""Text that a model writes by sampling, and what a text costs it.

Shapes: N texts, T tokens (columns), V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking
from mnemoscope.models import PLAINLY, pass_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def written(asking: Asking, texts: int, length: int, seed: int) -> Tensor:
    """Texts sampled from the model behind its first token, at temperature 1; int64 (N, 1 + length)."""
    model, tokenizer = asking.model, asking.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids_NT = torch.full((texts, 1), first, device=model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
        ends = {"max_new_tokens": length, "eos_token_id": None, "pad_token_id": first}
        mask_NT = torch.ones_like(ids_NT)
        return model.generate(input_ids=ids_NT, attention_mask=mask_NT, **sampling, **PLAINLY, **ends)


@torch.no_grad()
def cost_of(model: PreTrainedModel, ids_NT: Tensor, mask_NT: Tensor, width: int) -> np.ndarray:
    """Mean cost of the tokens from column ``width`` on, up to the end of each text, in nats a token; float64 (N,)."""
    logp_NTV = model(**pass_inputs(model, ids_NT, mask_NT)).logits[:, width - 1 : -1].float().log_softmax(-1)
    logp_NT = logp_NTV.gather(2, ids_NT[:, width:, None])[..., 0]
    written_NT = mask_NT[:, width:].bool()  # each row has a token
    cost_N = -logp_NT.masked_fill(~written_NT, 0.0).sum(1) / written_NT.sum(1)
    return np.asarray(cost_N.double().cpu())
