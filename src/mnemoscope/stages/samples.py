"""Test prompts with what the model says behind them, by itself and steered, and how natural it finds that itself.

Shapes: N prompts, T tokens (columns).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mnemoscope.behaviour import Asking
from mnemoscope.cells import Cell
from mnemoscope.directions import TOWARD
from mnemoscope.models import pass_inputs
from mnemoscope.stages.common import Tell, cell_model, read_best, write_table
from mnemoscope.stages.lists import Records
from mnemoscope.steering import SteeringVector, continued
from mnemoscope.tasks import Example


def samples_stage(cell: Cell, tell: Tell) -> list[Path]:
    """The first test pairs of different groups, none of them picked by what came out."""
    config = cell.config.samples
    if not config.prompts:
        return []
    asking, records = cell_model(cell), Records.of(cell)
    tables = []
    for done, (direction, path) in enumerate(read_best(cell).items()):
        tell(done, len(TOWARD), f"{direction}: writing on")
        by_group: dict[str, Example] = {}
        for example in records.targets("test", direction, len(records.pairs)):
            by_group.setdefault(example.group, example)
        examples = list(by_group.values())[: config.prompts]
        prompts = [example.prompt for example in examples]
        plain, natural_N = said(asking, prompts, config.tokens, None)
        steered, stranger_N = said(asking, prompts, config.tokens, SteeringVector.load(path))
        fields = ("prompt", "group", "memorized", "generalized")
        columns: dict[str, Any] = {key: [getattr(e, key) for e in examples] for key in fields}
        columns |= {"plain": plain, "steered": steered, "nats_plain": natural_N, "nats_steered": stranger_N}
        tables.append(pd.DataFrame({"direction": direction, **columns}))
    return [write_table(cell.records / "samples.parquet", pd.concat(tables, ignore_index=True))]


def said(
    asking: Asking, prompts: list[str], tokens: int, vector: SteeringVector | None
) -> tuple[list[str], np.ndarray]:
    """What follows each prompt, and what a token of it costs the unsteered model on average, in nats; (N,)."""
    model, tokenizer = asking.model, asking.tokenizer
    if not prompts:
        return [], np.empty(0)
    inputs = asking.padded([asking.text(prompt) for prompt in prompts])
    with vector.apply(model) if vector else nullcontext():
        ids_NT, mask_NT, width = continued(model, tokenizer, inputs, tokens)
    texts = tokenizer.batch_decode(ids_NT[:, width:], skip_special_tokens=True)
    return texts, _cost(asking, ids_NT, mask_NT, width)


@torch.no_grad()
def _cost(asking: Asking, ids_NT: Tensor, mask_NT: Tensor, width: int) -> np.ndarray:
    inputs = pass_inputs(asking.model, ids_NT, mask_NT)
    logp_NTV = asking.model(**inputs).logits[:, width - 1 : -1].float().log_softmax(-1)
    logp_NT = logp_NTV.gather(2, ids_NT[:, width:, None])[..., 0]
    said_NT = mask_NT[:, width:].bool()
    # Left of an end of text all is said, so each row has a token.
    cost_N = -logp_NT.masked_fill(~said_NT, 0.0).sum(1) / said_NT.sum(1)
    return np.asarray(cost_N.double().cpu())
