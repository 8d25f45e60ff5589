"""Continuations of test prompts, unsteered and steered, with what they cost the unsteered model.

Shapes: N prompts, T tokens (columns).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mnemoscope.behaviour import Asking, continued
from mnemoscope.cells import Cell
from mnemoscope.directions import TOWARD
from mnemoscope.models import pass_inputs
from mnemoscope.stages.common import Tell, cell_model, read_best, write_table
from mnemoscope.stages.lists import Records
from mnemoscope.steering import SteeringVector
from mnemoscope.tasks import Example


def samples_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Continue the first test pairs of different groups, none of them picked by its continuation."""
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
        plain, nats_plain_N = _continuations(asking, prompts, config.tokens, None)
        steered, nats_steered_N = _continuations(asking, prompts, config.tokens, SteeringVector.load(path))
        fields = ("prompt", "group", "memorized", "generalized")
        columns: dict[str, Any] = {key: [getattr(e, key) for e in examples] for key in fields}
        columns |= {"plain": plain, "steered": steered, "nats_plain": nats_plain_N, "nats_steered": nats_steered_N}
        tables.append(pd.DataFrame({"direction": direction, **columns}))
    return [write_table(cell.records / "samples.parquet", pd.concat(tables, ignore_index=True))]


@torch.no_grad()
def _continuations(
    asking: Asking, prompts: list[str], tokens: int, vector: SteeringVector | None
) -> tuple[list[str], np.ndarray]:
    """Continuation of each prompt, and its mean cost per token under the unsteered model, in nats; (N,)."""
    model, tokenizer = asking.model, asking.tokenizer
    if not prompts:
        return [], np.empty(0)
    inputs = asking.padded([asking.text(prompt) for prompt in prompts])
    with vector.apply(model) if vector else nullcontext():
        ids_NT, mask_NT, width = continued(model, tokenizer, inputs, tokens)
    texts = tokenizer.batch_decode(ids_NT[:, width:], skip_special_tokens=True)
    logp_NTV = model(**pass_inputs(model, ids_NT, mask_NT)).logits[:, width - 1 : -1].float().log_softmax(-1)
    logp_NT = logp_NTV.gather(2, ids_NT[:, width:, None])[..., 0]
    written_NT = mask_NT[:, width:].bool()  # up to the end of a text, so each row has a token
    cost_N = -logp_NT.masked_fill(~written_NT, 0.0).sum(1) / written_NT.sum(1)
    return texts, np.asarray(cost_N.double().cpu())
