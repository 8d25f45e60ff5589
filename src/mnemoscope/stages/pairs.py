"""Mine pairs in every split and stream the contrast of the fit pairs."""

from __future__ import annotations

from functools import reduce
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from mnemoscope import ranks
from mnemoscope.behaviour import Asking, PairBatch, draw_candidates, mine_pairs
from mnemoscope.cells import Cell
from mnemoscope.contrast import ContrastAccumulator
from mnemoscope.errors import StudyError
from mnemoscope.files import write_atomically
from mnemoscope.stages.common import Tell, cell_model, cell_task, rng_of, write_table
from mnemoscope.tasks import SPLITS, Task, draw


def pairs_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Mine pairs in every split; stream the contrast of the fit pairs."""
    task, asking, config = cell_task(cell), cell_model(cell), cell.config.pairs
    rng = rng_of(cell, "pairs")
    # All lists are drawn before anything is labelled, so that the yield has an honest denominator.
    candidates = {
        split: draw_candidates(
            task, draw(task, rng, getattr(config, f"{split}_examples"), "conflict", split), rng, config.rephrasings
        )
        for split in SPLITS
    }
    total = sum(map(len, candidates.values()))
    done = 0
    tables: list[pd.DataFrame] = []
    contrast: ContrastAccumulator | None = None
    for split in SPLITS:
        found: list[pd.DataFrame] = []
        for batch in mine_pairs(asking, candidates[split], config.site, part=(ranks.rank(), ranks.world())):
            done += ranks.world() * len(batch.candidates)
            tell(min(done, total), total, f"mining {split} pairs")
            found.append(_pairs_table(batch, split))
            if split == "fit" and batch.is_pair_N.any():
                contrast = contrast or _no_contrast(cell, batch)
                groups = [pair[0].group for pair in batch.pairs()]
                contrast.add(batch.states_generalized_PLD, batch.states_memorized_PLD, groups)
        tables += _in_order(found)
    contrast = _merged(contrast)
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    files = [write_table(cell.records / "pairs.parquet", table)]
    with_pairs = set(table["split"][table["is_pair"]]) if len(table) else set()
    for split in SPLITS:
        if split not in with_pairs:
            raise StudyError(f"{cell.name}: no pairs found in the {split} split: {_why_no_pairs(cell, table, split)}")
    files += _held_out_pairs(cell, task, asking, tell)
    if contrast is not None:
        files.append(write_atomically(cell.folder / "contrast.safetensors", contrast.result().save))
    return files


def _held_out_pairs(cell: Cell, task: Task, asking: Asking, tell: Tell) -> list[Path]:
    """Test pairs of what nothing is fitted on, where the task holds something out."""
    config, tables = cell.config.pairs, []
    for name, other in getattr(task, "held_out", dict)().items():
        tell(1, 1, f"mining test pairs of another {name}")
        rng = rng_of(cell, f"pairs/{name}")
        examples = draw(other, rng, config.held_out_examples or config.test_examples, "conflict", "test")
        drawn = draw_candidates(other, examples, rng, config.rephrasings)
        batches = mine_pairs(asking, drawn, config.site, part=(ranks.rank(), ranks.world()))
        tables += _in_order([_pairs_table(batch, "test").assign(held_out=name) for batch in batches])
    if not tables:
        return []
    return [write_table(cell.records / "pairs_held_out.parquet", pd.concat(tables, ignore_index=True))]


def _in_order(mine: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The tables of all processes, in the order of the batches that they took in turn."""
    rounds = zip_longest(*ranks.from_all(mine))
    return [table for tables in rounds for table in tables if table is not None]


def _merged(mine: ContrastAccumulator | None) -> ContrastAccumulator | None:
    """The contrast of what all processes found, for the first one."""
    parts = [part for part in ranks.to_first(mine) if part is not None]
    return reduce(ContrastAccumulator.merge, parts) if parts else None


def _no_contrast(cell: Cell, batch: PairBatch) -> ContrastAccumulator:
    layers, neurons = batch.states_generalized_PLD.shape[1:]
    config = cell.config.pairs
    return ContrastAccumulator.empty(config.site, layers, neurons, config.permutations, cell.seed)


def _pairs_table(batch: PairBatch, split: str) -> pd.DataFrame:
    columns: dict[str, Any] = {
        field: [getattr(a, field) for a, _ in batch.candidates]
        for field in ("item", "group", "memorized", "generalized")
    }
    columns["split"] = split
    for side, scores in enumerate((batch.scores_a, batch.scores_b)):
        letter = "ab"[side]
        columns[f"prompt_{letter}"] = [pair[side].prompt for pair in batch.candidates]
        columns[f"family_{letter}"] = [pair[side].family for pair in batch.candidates]
        columns[f"behaviour_{letter}"] = scores.behaviour_N
        columns[f"margin_{letter}"] = scores.margin_N
    columns["is_pair"] = batch.is_pair_N
    return pd.DataFrame(columns)


def _why_no_pairs(cell: Cell, table: pd.DataFrame, split: str) -> str:
    part = table[table["split"] == split] if len(table) else table
    if not len(part):
        return "the task gave no candidate; every item needs two phrasings, in each split"
    counts = pd.concat([part["behaviour_a"], part["behaviour_b"]]).value_counts()
    seen = ", ".join(f"{name} {count}" for name, count in counts.items())
    mend = f"raise pairs.{split}_examples, or train to a more even mixture (training.stop.conflict_each)"
    if not (cell.config.model.is_trained or cell.config.model.cell):
        mend = "ask more items in more phrasings, of which the model answers some either way"
    return f"none of {len(part)} candidates flips ({seen}); {mend}"
