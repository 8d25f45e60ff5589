"""What steering does to text: its divergence on neutral text, gated and not, and continuations of test prompts."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.bench.answers import EARLIEST, NOTHING, Neutral, texts_of
from mnemoscope.interventions import SteeringVector
from mnemoscope.interventions.detect import Detector, Reading
from mnemoscope.models import context_length
from mnemoscope.runs.errors import StudyError
from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages.common import GATE, PerProcess, cell_model, read_best, rng_of, write_table
from mnemoscope.study.stages.lists import RecordedBench


def neutral_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Divergence of the best vectors at several doses behind random cuts of neutral text."""
    config = cell.config.neutral
    if not config.cuts:
        return []
    best = [one for one in read_best(cell) if isinstance(one, SteeringVector)]
    parts = [(one, dose) for one in best for dose in config.doses]
    rows = list[pd.DataFrame]()
    for done, table in enumerate(cell.map(_Neutral(cell), parts)):
        tell(done, len(parts), "reading on behind cuts")
        rows.append(table)
    return [write_table(cell.records / "neutral.parquet", pd.concat(rows, ignore_index=True))]


class _Neutral(PerProcess):
    """A cell's neutral text, and where a gate acts on it."""

    def __call__(self, part: tuple[SteeringVector, float]) -> pd.DataFrame:
        """Divergence of a vector at a dose."""
        one, dose = part
        acts_N = self.reading.acts(one.toward, GATE) if self.reading else np.full(self.cell.config.neutral.cuts, np.nan)
        facts: dict[str, Any] = {"direction": f"to_{one.toward}", "method": one.method, "dose": dose, "acts": acts_N}
        return self.neutral.measured(one * dose).assign(**facts)

    @cached_property
    def neutral(self) -> Neutral:
        """Cuts in text that the model wrote; StudyError where it reads too few tokens."""
        config, asking = self.cell.config.neutral, self.asking
        length = min(config.length, context_length(asking.model) - 1)
        if length < EARLIEST + config.following:
            needed = 1 + EARLIEST + config.following
            raise StudyError(f"{self.cell.name}: neutral: the model reads {length + 1} tokens; {needed} are needed")
        asking, rng = replace(asking, batch_size=config.batch_size), rng_of(self.cell, "neutral")
        return Neutral(asking, config.cuts, config.texts, length, config.following, rng)

    @cached_property
    def reading(self) -> Reading | None:
        """Of the detector at the cuts."""
        path = self.cell.folder / "detector.safetensors"
        return self.neutral.read(Detector.load(path)) if path.exists() else None


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
