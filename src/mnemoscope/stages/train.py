"""Train a cell's model until both behaviours appear, then label test examples of every kind."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mnemoscope.behaviour import Asking, mark_confabulations, prepare, score
from mnemoscope.cells import Cell, Tell
from mnemoscope.errors import InputError, StudyError
from mnemoscope.files import new_folder
from mnemoscope.models import (
    PACKAGED,
    QUANTIZED,
    adapt,
    blocks_of,
    build_gpt2,
    is_adapted,
    merged,
    save_adapter,
    width_of,
    word_tokenizer,
)
from mnemoscope.stages.common import cell_model, cell_task, opened_model, rng_of, write_json, write_table
from mnemoscope.steering import Binding
from mnemoscope.tasks import KINDS, Task, draw
from mnemoscope.training import Trained, how_to_mix, train


def train_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Train a model from scratch or an adapter (``model.lora``) until both behaviours appear, or open a trained one."""
    (cell.records / "known.json").unlink(missing_ok=True)
    task = cell_task(cell)
    facts = {"task": task.name, "label": cell.label, "seed": cell.seed, "site": cell.config.pairs.site}
    facts |= {"memory_is_conflict": task.memory_is_conflict, "options": cell.config.options}
    facts |= {"analysed": cell.config.analysed, "shared_initialization": cell.config.model.shares_first_weights}
    if cell.config.model.folder in PACKAGED:
        facts["weights"] = QUANTIZED
    if not cell.config.model.is_trained:
        asking = cell_model(cell)
        facts |= {**_of_model(asking), "trained": False}
        return [*_known(cell, task, asking), write_json(cell.folder / "cell.json", facts)]
    asking, trained, attempt = _trained(cell, task, tell)
    files = [write_table(cell.records / "training.parquet", pd.DataFrame(trained.curve))]
    # Times differ between equal runs, so their file is not checked.
    write_json(cell.records / "training_time.json", {"seconds": round(trained.seconds, 2), "steps": trained.steps})
    if trained.unmet:
        size = "model.lora.rank" if is_adapted(asking.model) else "model.layers"
        raise StudyError(f"{cell.name}: {how_to_mix(trained, size)}")
    facts |= {**_of_model(asking), "trained": True, "attempt": attempt, "precision": trained.precision}
    return [*files, *_save_model(cell, asking), write_json(cell.folder / "cell.json", facts)]


def _of_model(asking: Asking) -> dict[str, Any]:
    model, binding = asking.model, Binding.of(asking.model, asking.tokenizer)
    return {"layers": len(blocks_of(model)), "width": width_of(model), "binding": asdict(binding)}


def _known(cell: Cell, task: Task, asking: Asking) -> list[Path]:
    """Which facts the model answers right when asked bare, where the task depends on them."""
    asked = task.facts_to_know()
    if not asked:
        return []
    labels = score(asking, prepare(asking, asked), margins=False).behaviour_N
    known = [example.item for example, label in zip(asked, labels, strict=True) if label == "correct"]
    task.knowing(set(known))  # an empty one is refused here, before anything is written
    return [write_json(cell.records / "known.json", {"asked": len(asked), "known": known})]


def _trained(cell: Cell, task: Task, tell: Tell) -> tuple[Asking, Trained, int]:
    """Train until both behaviours appear on the tune split, with new weights in each attempt; the last one from 0."""
    config = cell.config.training
    for attempt in range(config.attempts):
        asking = _untrained(cell, task, attempt)
        rng = rng_of(cell, f"train/{attempt}" if attempt else "train")
        again = f"attempt {attempt + 1}: " if attempt else ""

        def progress(step: int, measured: dict[str, float], again: str = again) -> None:
            note = "novel {novel_accuracy:.2f} recall {recall:.2f} conflict {conflict_memorized:.2f}"
            note = (note + "/{conflict_generalized:.2f}").format(**measured) if measured else "training"
            tell(min(step, config.steps), config.steps, again + note)

        trained = train(asking, task, config, rng, progress)
        if not trained.unmet:
            break
    return asking, trained, attempt


def behaviour_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Label test examples of every kind."""
    task, asking = cell_task(cell), cell_model(cell)
    rng = rng_of(cell, "behaviour")
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
    return [write_table(cell.records / "behaviour.parquet", pd.concat(tables, ignore_index=True))]


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
    next(task.training(rng_of(cell, "any")))  # raises for a task without training, before a large model is opened
    asking = opened_model(cell, shape.folder, task)
    if asking.tokenizer.eos_token_id is None:
        raise InputError(f"model.folder: {shape.folder} has no end-of-text token to close an instance with")
    return replace(asking, model=adapt(asking.model, shape.lora, seed))


def _save_model(cell: Cell, asking: Asking) -> list[Path]:
    """Save the model in a plain folder; of an adapted one the adapter, and the model with the adapter merged in.

    Each folder is written under a temporary name and renamed; returns their files.
    """

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        asking.tokenizer.save_pretrained(folder)

    saves = {"model": partial(save, asking.model)}
    if is_adapted(asking.model):
        saves = {"adapter": partial(save_adapter, asking.model), "model": lambda at: save(merged(asking.model), at)}
    files: list[Path] = []
    for name, write in saves.items():
        for stale in (cell.folder / name, *cell.folder.glob(f".{name}.*.tmp")):
            shutil.rmtree(stale, ignore_errors=True)
        with new_folder(cell.folder / name) as temporary:
            write(temporary)
        files += sorted(path for path in (cell.folder / name).rglob("*") if path.is_file())
    return files
