"""What steering does to text: its divergence on neutral text, gated and not, and continuations of test prompts.

Neutral text is the model's own, sampled at temperature 1 without any prompt: there the divergence of one token after
another adds up to that of whole texts.

Shapes: N cuts or prompts, T tokens (columns), M read tokens (the steered one and those that follow), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mnemoscope.behaviour import Asking, continued, cost_of, states_at_the_end, written
from mnemoscope.config import CellConfig
from mnemoscope.interventions import Intervention, SteeringVector
from mnemoscope.interventions.detect import Detector
from mnemoscope.interventions.sources import TOWARD
from mnemoscope.models import backbone_of, cache_of, context_length, forked, pass_inputs
from mnemoscope.runs.errors import StudyError
from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages.common import GATE, cell_model, read_best, rng_of, write_table
from mnemoscope.study.stages.lists import Records
from mnemoscope.tasks import Example

EARLIEST = 8  # tokens before a cut, at least, the first included


def neutral_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Divergence of the best vectors at several doses behind random cuts of neutral text."""
    config = cell.config.neutral
    if not config.cuts:
        return []
    asking, rng = cell_model(cell), rng_of(cell, "neutral")
    length = min(config.length, context_length(asking.model) - 1)
    if length < EARLIEST + config.following:
        needed = 1 + EARLIEST + config.following
        raise StudyError(f"{cell.name}: neutral: the model reads {length + 1} tokens; {needed} are needed")
    tell(0, 1, "writing neutral text")
    texts_NT = written(asking, config.texts, length, int(rng.integers(2**31)))
    last = 1 + length - config.following
    cuts = np.stack([rng.integers(0, config.texts, config.cuts), rng.integers(EARLIEST, last + 1, config.cuts)], axis=1)
    cuts = cuts[np.argsort(cuts[:, 1], kind="stable")]  # neighbours are of similar length
    path = cell.folder / "detector.safetensors"
    vectors = {f"to_{one.toward}": one for one in read_best(cell) if isinstance(one, SteeringVector)}
    detector = Detector.load(path) if path.exists() else None
    rows: list[pd.DataFrame] = []
    for start in range(0, len(cuts), config.batch_size):
        tell(start, len(cuts), "reading on behind cuts")
        rows += _measured(asking, texts_NT, cuts[start : start + config.batch_size], vectors, detector, cell.config)
    return [write_table(cell.records / "neutral.parquet", pd.concat(rows, ignore_index=True))]


@torch.no_grad()
def _measured(
    asking: Asking,
    texts_NT: Tensor,
    cuts_N2: np.ndarray,
    vectors: dict[str, SteeringVector],
    detector: Detector | None,
    config: CellConfig,
) -> Iterator[pd.DataFrame]:
    model = asking.model
    width = int(cuts_N2[:, 1].max())
    columns_N1 = torch.from_numpy(cuts_N2[:, 1:]) - width + torch.arange(width)
    mask_NT = (columns_N1 >= 0).long().to(model.device)
    own_NT = texts_NT[torch.from_numpy(cuts_N2[:, 0]).to(model.device)]
    ids_NT = own_NT.gather(1, columns_N1.clamp(min=0).to(model.device))
    after_NM = torch.from_numpy(cuts_N2[:, 1:]) + torch.arange(config.neutral.following)
    read_NM = torch.cat([ids_NT[:, -1:], own_NT.gather(1, after_NM.to(model.device))], dim=1)
    whole_NT = torch.cat([mask_NT, torch.ones_like(read_NM[:, 1:])], dim=1)
    known: dict[tuple[str, float], Any] = {}

    def logp(vector: SteeringVector | None, dose: float) -> Tensor:
        everywhere = vector is not None and vector.positions == "all"
        which = (vector.toward, dose) if vector and everywhere else ("", 0.0)
        with vector.apply(model, dose, start=0 if everywhere else width - 1) if vector else nullcontext():
            if which not in known:
                prefix = pass_inputs(model, ids_NT[:, :-1], mask_NT[:, :-1])
                known[which] = cache_of(backbone_of(model)(**prefix))
            inputs = pass_inputs(model, read_NM, whole_NT, forked(known[which]))
            return model(**inputs).logits.float().log_softmax(-1)

    reading = detector.read(states_at_the_end(model, ids_NT, mask_NT, detector.site)) if detector else None
    plain_NMV = logp(None, 0.0)
    for direction, vector in vectors.items():
        acts_N = reading.acts(TOWARD[direction], GATE) if reading else np.full(len(cuts_N2), np.nan)
        for dose in config.neutral.doses:
            steered_NMV = logp(vector, dose)
            kl_NM = (plain_NMV.exp() * (plain_NMV - steered_NMV)).sum(-1)
            same_N = plain_NMV[:, 0].argmax(-1) == steered_NMV[:, 0].argmax(-1)
            columns = {"direction": direction, "method": vector.method, "dose": dose}
            columns |= {"text": cuts_N2[:, 0], "place": cuts_N2[:, 1], "kl_first": kl_NM[:, 0].double().cpu().numpy()}
            columns |= {"kl_next": kl_NM[:, 1:].double().mean(1).cpu().numpy(), "same_top": same_N.cpu().numpy()}
            yield pd.DataFrame(columns | {"acts": acts_N})


def samples_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Continue the first test pairs of different groups, none of them picked by its continuation."""
    config = cell.config.samples
    if not config.prompts:
        return []
    asking, records = cell_model(cell), Records.of(cell)
    tables = []
    for done, vector in enumerate(read_best(cell)):
        direction = f"to_{vector.toward}"
        tell(done, len(TOWARD), f"{direction}: writing on")
        by_group: dict[str, Example] = {}
        for example in records.targets("test", direction, len(records.pairs)):
            by_group.setdefault(example.group, example)
        examples = list(by_group.values())[: config.prompts]
        prompts = [example.prompt for example in examples]
        plain, nats_plain_N = _continuations(asking, prompts, config.tokens, None)
        steered, nats_steered_N = _continuations(asking, prompts, config.tokens, vector)
        fields = ("prompt", "group", "memorized", "generalized")
        columns: dict[str, Any] = {key: [getattr(e, key) for e in examples] for key in fields}
        columns |= {"plain": plain, "steered": steered, "nats_plain": nats_plain_N, "nats_steered": nats_steered_N}
        tables.append(pd.DataFrame({"direction": direction, **columns}))
    return [write_table(cell.records / "samples.parquet", pd.concat(tables, ignore_index=True))]


@torch.no_grad()
def _continuations(
    asking: Asking, prompts: list[str], tokens: int, vector: Intervention | None
) -> tuple[list[str], np.ndarray]:
    """Continuation of each prompt, and its mean cost per token under the unsteered model, in nats; (N,)."""
    model, tokenizer = asking.model, asking.tokenizer
    if not prompts:
        return [], np.empty(0)
    inputs = asking.padded([asking.text(prompt) for prompt in prompts])
    with vector.apply(model) if vector else nullcontext():
        ids_NT, mask_NT, width = continued(model, tokenizer, inputs, tokens)
    texts = tokenizer.batch_decode(ids_NT[:, width:], skip_special_tokens=True)
    return texts, cost_of(model, ids_NT, mask_NT, width)
