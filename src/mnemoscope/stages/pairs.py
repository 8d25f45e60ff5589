"""Mine pairs of every split, and compute the contrast of the fit pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa

from mnemoscope.behaviour import PairBatch, draw_candidates, mine_pairs
from mnemoscope.cells import Cell, Tell
from mnemoscope.contrast import ContrastAccumulator
from mnemoscope.errors import StudyError
from mnemoscope.files import write_atomically
from mnemoscope.stages.common import PerProcess, cell_task, kept_states, rng_of, table_writer
from mnemoscope.tasks import SPLITS, Example, Split, Task, draws

Candidate = tuple[Example, Example]
SIDES = {"prompt": pa.string(), "family": pa.string(), "behaviour": pa.string(), "margin": pa.float64()}
COLUMNS = {
    **dict.fromkeys(("item", "group", "memorized", "generalized", "split"), pa.string()),
    **{f"{name}_{letter}": kind for letter in "ab" for name, kind in SIDES.items()},
    "is_pair": pa.bool_(),
}


def pairs_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Mine pairs in every split; stream the contrast of the fit pairs.

    Candidates are drawn batch by batch, independent of labels, so that memory does not grow with their number. Batches
    are labelled in parallel and taken in order, so that all sums are the same for any number of processes.
    """
    task, miner, config = cell_task(cell), _Miner(cell), cell.config.pairs
    contrast: ContrastAccumulator | None = None
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    pairs: Counter[str] = Counter()
    wanted = {split: getattr(config, f"{split}_examples") for split in SPLITS}
    kept, before = kept_states(cell, anew=True), 0
    with table_writer(cell.records / "pairs.parquet", COLUMNS) as add:
        for split in SPLITS:
            for batch in cell.map(miner, _batches(cell, task, split, wanted[split], split)):
                if split == "fit" and batch.is_pair_N.any():
                    layers, neurons = batch.states_generalized_PLD.shape[1:]
                    contrast = contrast or ContrastAccumulator.empty(
                        config.site, layers, neurons, config.permutations, cell.seed
                    )
                    groups = [pair[0].group for pair in batch.pairs()]
                    contrast.add(batch.states_generalized_PLD, batch.states_memorized_PLD, groups)
                batch.keep(kept, config.site, of_all=cell.config.detection.fitted)
                add(_pairs_table(batch))
                counts[split].update([*batch.scores_a.behaviour_N, *batch.scores_b.behaviour_N])
                pairs[split] += int(batch.is_pair_N.sum())
                done = counts[split].total() // 2
                note = f"mining {split} pairs: {pairs[split]:,} in {done:,} candidates"
                tell(before + min(done / config.rephrasings, wanted[split]), sum(wanted.values()), note)
            before += wanted[split]
    for split in SPLITS:
        if not pairs[split]:
            why = _why_no_pairs(cell, counts[split], split)
            raise StudyError(f"{cell.name}: no pairs found in the {split} split: {why}")
    files = [cell.records / "pairs.parquet"]
    if held_out := task.held_out():
        files.append(cell.records / "pairs_held_out.parquet")
        with table_writer(files[-1], {**COLUMNS, "held_out": pa.string()}) as add:
            for name, other in held_out.items():
                tell(1, 1, f"mining test pairs of another {name}")
                n = config.held_out_examples or config.test_examples
                for batch in cell.map(miner, _batches(cell, other, name, n, "test")):
                    batch.keep(kept, config.site, of_all=cell.config.detection.fitted)
                    add(_pairs_table(batch).assign(held_out=name))
    if contrast is not None:
        files.append(write_atomically(cell.folder / "contrast.safetensors", contrast.result().save))
    return files


class _Miner(PerProcess):
    """Labels batches of candidates with the model of a cell."""

    def __call__(self, candidates: list[Candidate]) -> PairBatch:
        (batch,) = mine_pairs(self.asking, candidates, self.cell.config.pairs.site, len(candidates))
        return batch


def _batches(cell: Cell, task: Task, stream: str, n: int, split: Split) -> Iterator[list[Candidate]]:
    """Candidates of ``n`` examples, as many at a time as fill 16 passes, 512 at most."""
    config = cell.config.pairs
    examples = draws(task, rng_of(cell, f"pairs/{stream}"), n, "conflict", split)
    left = draw_candidates(task, examples, rng_of(cell, f"pairs/{stream}/rephrase"), config.rephrasings)
    while drawn := list(islice(left, min(512, 16 * config.batch_size))):
        yield drawn


def _pairs_table(batch: PairBatch) -> pd.DataFrame:
    table = pd.DataFrame([b.to_row("b") | a.to_row("a") for a, b in batch.candidates])
    for side, scores in (("a", batch.scores_a), ("b", batch.scores_b)):
        table[f"behaviour_{side}"] = scores.behaviour_N
        table[f"margin_{side}"] = scores.margin_N
    return table.assign(is_pair=batch.is_pair_N)[list(COLUMNS)]


def _why_no_pairs(cell: Cell, found: Counter[str], split: str) -> str:
    if not found:
        return "the task gave no candidate; every item needs two phrasings, in each split"
    seen = ", ".join(f"{name} {n}" for name, n in found.most_common())
    mend = f"raise pairs.{split}_examples, or train to a more even mixture (training.stop.conflict_each)"
    if not (cell.config.model.is_trained or cell.config.model.cell):
        mend = "ask more items in more phrasings, of which the model answers some either way"
    return f"none of {found.total() // 2} candidates flips ({seen}); {mend}"
