"""What steering does to text: its divergence on neutral text, gated and not, and continuations of test prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.bench.answers import EARLIEST, NOTHING, Neutral, texts_of
from mnemoscope.interventions import SteeringVector
from mnemoscope.interventions.detect import Detector
from mnemoscope.models import context_length
from mnemoscope.runs.errors import StudyError
from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages.common import GATE, cell_model, read_best, rng_of, write_table
from mnemoscope.study.stages.lists import RecordedBench


def neutral_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Divergence of the best vectors at several doses behind random cuts of neutral text."""
    config = cell.config.neutral
    if not config.cuts:
        return []
    asking = replace(cell_model(cell), batch_size=config.batch_size)
    length = min(config.length, context_length(asking.model) - 1)
    if length < EARLIEST + config.following:
        needed = 1 + EARLIEST + config.following
        raise StudyError(f"{cell.name}: neutral: the model reads {length + 1} tokens; {needed} are needed")
    tell(0, 1, "writing neutral text")
    neutral = Neutral(asking, config.cuts, config.texts, length, config.following, rng_of(cell, "neutral"))
    path = cell.folder / "detector.safetensors"
    reading = neutral.read(Detector.load(path)) if path.exists() else None
    rows, best = list[pd.DataFrame](), [one for one in read_best(cell) if isinstance(one, SteeringVector)]
    for done, one in enumerate(best):
        tell(done, len(best), "reading on behind cuts")
        acts_N = reading.acts(one.toward, GATE) if reading else np.full(config.cuts, np.nan)
        for dose in config.doses:
            facts: dict[str, Any] = {"direction": one.toward.direction, "method": one.method, "dose": dose}
            rows.append(neutral.measured(one * dose).assign(**facts, acts=acts_N))
    return [write_table(cell.records / "neutral.parquet", pd.concat(rows, ignore_index=True))]


def samples_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Continue the first test pairs of different groups, none of them picked by its continuation."""
    config = cell.config.samples
    if not config.prompts:
        return []
    bench, best, tables = RecordedBench.of(cell, cell_model(cell)), read_best(cell), []
    for done, one in enumerate(best):
        direction = one.toward.direction
        tell(done, len(best), f"{direction}: writing on")
        targets = bench.records.targets("test", one.toward, len(bench.records.pairs))
        first = {example.group: example for example in reversed(targets)}
        examples = [example for example in targets if first[example.group] is example][: config.prompts]
        plain, steered = (texts_of(each, bench.prompts(examples), config.tokens) for each in (NOTHING, one))
        fields = ("prompt", "group", "memorized", "generalized")
        columns: dict[str, Any] = {key: [getattr(e, key) for e in examples] for key in fields}
        columns |= {"plain": plain.texts, "steered": steered.texts}
        columns |= {"nats_plain": plain.nats_N, "nats_steered": steered.nats_N}
        tables.append(pd.DataFrame({"direction": direction, **columns}))
    return [write_table(cell.records / "samples.parquet", pd.concat(tables, ignore_index=True))]
