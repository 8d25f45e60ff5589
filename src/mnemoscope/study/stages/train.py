"""Train a cell's model until both behaviours appear, label test examples of every kind, and mine pairs."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pandas as pd
import pyarrow as pa

from mnemoscope.behaviour import Asking, PairBatch, draw_candidates, mark_confabulations, mine_pairs, prepare, score
from mnemoscope.interventions import Binding
from mnemoscope.models import PACKAGED, QUANTIZED, adapt, blocks_of, build_gpt2, is_adapted, width_of, word_tokenizer
from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.runs.files import new_folder, write_atomically
from mnemoscope.statistics.contrast import ContrastAccumulator
from mnemoscope.study.cells import STATES, Cell, Tell
from mnemoscope.study.stages import common
from mnemoscope.tasks import KINDS, SPLITS, Example, Split, Task, draw, draws
from mnemoscope.watch.curve import Trained, how_to_mix

Candidate = tuple[Example, Example]
SIDES = {"prompt": pa.string(), "family": pa.string(), "behaviour": pa.string(), "margin": pa.float64()}
COLUMNS = {
    **dict.fromkeys(("item", "group", "memorized", "generalized", "split"), pa.string()),
    **{f"{name}_{letter}": kind for letter in "ab" for name, kind in SIDES.items()},
    "is_pair": pa.bool_(),
}


def train_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Train a model from scratch or an adapter (``model.lora``) until both behaviours appear, or open a trained one."""
    (cell.records / "known.json").unlink(missing_ok=True)
    task, shape = common.cell_task(cell), cell.config.model
    facts: dict[str, Any] = {"task": task.name, "label": cell.label, "seed": cell.seed, "site": cell.config.pairs.site}
    facts |= {"memory_is_conflict": task.memory_is_conflict, "documents": task.documents}
    facts |= {"options": cell.config.options, "analysed": cell.config.analysed}
    facts |= {"shared_initialization": shape.shares_first_weights}
    facts |= {"weights": QUANTIZED} if shape.folder in PACKAGED else {}
    if shape.is_trained:
        asking, trained, attempt = _trained(cell, task, tell)
        files = [common.write_table(cell.records / "training.parquet", pd.DataFrame(trained.curve))]
        times = {"seconds": round(trained.seconds, 2), "steps": trained.steps}
        files.append(common.write_json(cell.records / "training_time.json", times))
        if trained.unmet:
            raise StudyError(f"{cell.name}: {how_to_mix(trained, 'model.lora.rank' if shape.lora else 'model.layers')}")
        facts |= {"trained": True, "attempt": attempt, "precision": trained.precision}
    else:
        asking = common.cell_model(cell)
        files, facts["trained"] = _known(cell, task, asking), False
    model, binding = asking.model, Binding.of(asking.model, asking.tokenizer)
    facts |= {"layers": len(blocks_of(model)), "width": width_of(model), "binding": asdict(binding)}
    files += _save_model(cell, asking) if facts["trained"] else []
    return [*files, *common.keep_data(cell), common.write_json(cell.folder / "cell.json", facts)]


def _known(cell: Cell, task: Task, asking: Asking) -> list[Path]:
    """Which facts the model answers right when asked bare, where the task depends on them."""
    asked = task.facts_to_know()
    if not asked:
        return []
    labels = score(asking, prepare(asking, asked), margins=False).behaviour_N
    known = [example.item for example, label in zip(asked, labels, strict=True) if label == "correct"]
    task.knowing(set(known))  # an empty one is refused here, before anything is written
    return [common.write_json(cell.records / "known.json", {"asked": len(asked), "known": known})]


def _trained(cell: Cell, task: Task, tell: Tell) -> tuple[Asking, Trained, int]:
    """Train until both behaviours appear on the tune split, with new weights in each attempt; the last one from 0."""
    config, states = cell.config.training, cell.folder / STATES
    kept = resolve_name("mnemoscope.paper.checkpoints:Checkpoint")(states / "training.safetensors", cell.depends_on)
    for attempt in range(kept.attempt_begun(), config.attempts):
        asking = _untrained(cell, task, attempt)
        rng = common.rng_of(cell, f"train/{attempt}" if attempt else "train")
        again = f"attempt {attempt + 1}: " if attempt else ""

        def progress(step: int, measured: Mapping[str, float], again: str = again) -> None:
            note = "novel {novel_accuracy:.2f} recall {recall:.2f} conflict {conflict_memorized:.2f}"
            note = (note + "/{conflict_generalized:.2f}").format(**measured) if measured else "training"
            tell(min(step, config.steps), config.steps, again + note)

        kept.attempt = attempt
        if cell.config.model.lora:
            from mnemoscope.watch.teaching import teach  # imports the library's Trainer

            folder = states / f"training-{cell.depends_on[:16]}-{attempt}"
            trained = teach(asking, task, config, rng, folder, progress)
        else:
            trained = resolve_name("mnemoscope.paper.loop:train")(asking, task, config, rng, progress, kept)
        if not trained.unmet:
            break
    return asking, trained, attempt


def behaviour_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Label test examples of every kind."""
    task, asking = common.cell_task(cell), common.cell_model(cell)
    rng = common.rng_of(cell, "behaviour")
    tables = []
    for done, kind in enumerate(KINDS):
        tell(done, len(KINDS), f"labelling {kind} examples")
        examples = draw(task, rng, cell.config.pairs.behaviour_examples, kind, "test")
        if not examples:
            continue
        scores = score(asking, prepare(asking, examples))
        if kind == "conflict":
            mark_confabulations(asking, examples, scores, task.has_memorized_format)
        table = pd.DataFrame([example.to_row() for example in examples])
        table = table.astype({field: "str" for field in ("memorized", "generalized", "answer")})
        facts = {name: getattr(scores, f"{name}_N") for name in ("behaviour", "confabulated", "margin", "tie")}
        tables.append(table.assign(**facts))
    if not tables:
        raise InputError(f"task: {task.name} has no example in the test split")
    return [common.write_table(cell.records / "behaviour.parquet", pd.concat(tables, ignore_index=True))]


def _untrained(cell: Cell, task: Task, attempt: int) -> Asking:
    """The model of an attempt before training: with new weights, or a trained one with a new adapter."""
    shape = cell.config.model
    seed = (cell.seed if shape.initialization is None else shape.initialization) + 1000 * attempt
    if not shape.lora:
        if task.vocabulary is None:
            why = f"task {task.name!r} has no vocabulary to train on; give the folder of a trained model"
            raise InputError(f"model.folder: {why}")
        tokenizer = word_tokenizer(task.vocabulary, shape.context)
        return Asking(build_gpt2(tokenizer, shape, seed), tokenizer, task.boundary, cell.config.pairs.batch_size)
    assert shape.folder is not None, "the configuration refuses lora without a folder"
    # Raises for a task without training, before a large model is opened.
    next(task.training(common.rng_of(cell, "any")))
    asking = common.opened_model(cell, shape.folder, task)
    if asking.tokenizer.eos_token_id is None:
        raise InputError(f"model.folder: {shape.folder} has no end-of-text token to close an instance with")
    return replace(asking, model=adapt(asking.model, shape.lora, seed))


def _save_model(cell: Cell, asking: Asking) -> list[Path]:
    """Save the model in a plain folder; of an adapted one the adapter, and the model with the adapter merged in."""
    model, files = asking.model, []
    if is_adapted(model):
        # Left to itself peft asks the hub whether the embeddings were resized.
        files = _save_folder(cell.folder / "adapter", partial(model.save_pretrained, save_embedding_layers=False))
        model = model.merge_and_unload().eval()

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        asking.tokenizer.save_pretrained(folder)

    return files + _save_folder(cell.folder / "model", save)


def _save_folder(folder: Path, save: Callable[[Path], None]) -> list[Path]:
    """Write a folder under a temporary name and rename it; return its files."""
    for stale in (folder, *folder.parent.glob(f".{folder.name}.*.tmp")):
        shutil.rmtree(stale, ignore_errors=True)
    with new_folder(folder) as temporary:
        save(temporary)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def pairs_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Mine pairs in every split; stream the contrast of the fit pairs.

    Candidates are drawn batch by batch, independent of labels, so that memory does not grow with their number. Batches
    are labelled in parallel and taken in order, so that all sums are the same for any number of processes.
    """
    task, miner, config = common.cell_task(cell), _Miner(cell), cell.config.pairs
    wanted = {split: getattr(config, f"{split}_examples") for split in SPLITS}
    kept, before = common.kept_states(cell, anew=True), 0
    files, contrast = [cell.records / "pairs.parquet"], None

    def mined(of: Task, name: str, n: int, split: Split) -> Iterator[PairBatch]:
        for batch in cell.map(miner, _batches(cell, of, name, n, split)):
            batch.keep(kept, config.site, of_all=cell.config.detection.fitted)
            yield batch

    with common.table_writer(files[0], COLUMNS) as add:
        for split in SPLITS:
            counts, pairs = Counter[str](), 0
            for batch in mined(task, split, wanted[split], split):
                if split == "fit" and batch.is_pair_N.any():
                    layers, neurons = batch.states_generalized_PLD.shape[1:]
                    contrast = contrast or ContrastAccumulator.empty(
                        config.site, layers, neurons, config.permutations, cell.seed
                    )
                    groups = [pair[0].group for pair in batch.pairs()]
                    contrast.add(batch.states_generalized_PLD, batch.states_memorized_PLD, groups)
                add(_pairs_table(batch))
                counts.update([*batch.scores_a.behaviour_N, *batch.scores_b.behaviour_N])
                pairs, done = pairs + int(batch.is_pair_N.sum()), counts.total() // 2
                note = f"mining {split} pairs: {pairs:,} in {done:,} candidates"
                tell(before + min(done / config.rephrasings, wanted[split]), sum(wanted.values()), note)
            before += wanted[split]
            if not pairs and (split == "fit" or cell.config.steering.aim == "pairs"):
                why = _why_no_pairs(cell, counts, split)
                raise StudyError(f"{cell.name}: no pairs found in the {split} split: {why}")
    if held_out := task.held_out():
        files.append(cell.records / "pairs_held_out.parquet")
        with common.table_writer(files[-1], {**COLUMNS, "held_out": pa.string()}) as add:
            for name, other in held_out.items():
                tell(1, 1, f"mining test pairs of another {name}")
                for batch in mined(other, name, config.held_out_examples or config.test_examples, "test"):
                    add(_pairs_table(batch).assign(held_out=name))
    assert contrast is not None, "there are pairs of fit"
    return [*files, write_atomically(cell.folder / "contrast.safetensors", contrast.result().save)]


class _Miner(common.PerProcess):
    """Labels batches of candidates with the model of a cell."""

    def __call__(self, candidates: list[Candidate]) -> PairBatch:
        (batch,) = mine_pairs(self.asking, candidates, self.cell.config.pairs.site, len(candidates))
        return batch


def _batches(cell: Cell, task: Task, stream: str, n: int, split: Split) -> Iterator[list[Candidate]]:
    """Candidates of ``n`` examples, as many at a time as the configuration says."""
    config = cell.config.pairs
    examples = draws(task, common.rng_of(cell, f"pairs/{stream}"), n, "conflict", split)
    left = draw_candidates(task, examples, common.rng_of(cell, f"pairs/{stream}/rephrase"), config.rephrasings)
    while drawn := list(
        islice(left, config.at_once if config.at_once > 512 else min(config.at_once, 16 * config.batch_size))
    ):
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
