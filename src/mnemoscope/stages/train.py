"""Train a cell's model until both behaviours are there, then label test examples of every kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from mnemoscope.behaviour import Asking, Scores, mark_confabulations, prepare, score
from mnemoscope.cells import Cell
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
from mnemoscope.stages.common import Tell, cell_model, cell_task, opened_model, rng_of, write_json, write_table
from mnemoscope.steering import Binding
from mnemoscope.tasks import KINDS, Example, Task, draw
from mnemoscope.training import Trained, how_to_mix, train


def train_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Train until both behaviours are there, or open a trained model and ask what it knows by heart.

    What is trained is a model from scratch, or an adapter in a trained one (``model.lora``).
    """
    (cell.records / "known.json").unlink(missing_ok=True)
    task = cell_task(cell)
    facts = {"task": task.name, "label": cell.label, "seed": cell.seed, "site": cell.config.pairs.site}
    facts |= {"memory_is_conflict": task.memory_is_conflict, "options": cell.config.options}
    facts |= {"analysed": cell.config.analysed, "shared_initialization": cell.config.model.shares_first_weights}
    if cell.config.model.folder in PACKAGED:
        facts["weights"] = QUANTIZED
    if not cell.config.model.is_trained:
        asking = cell_model(cell)
        model = asking.model
        facts |= {"layers": len(blocks_of(model)), "width": width_of(model), "trained": False}
        facts["binding"] = asdict(Binding.of(model, asking.tokenizer))
        return [*_known(cell, task, asking), write_json(cell.folder / "cell.json", facts)]
    asking, trained, attempt = _trained(cell, task, tell)
    files = [
        write_table(cell.records / "training.parquet", pd.DataFrame(trained.curve)),
        write_json(cell.records / "training_time.json", {"seconds": round(trained.seconds, 2), "steps": trained.steps}),
    ]
    if trained.unmet:
        size = "model.lora.rank" if is_adapted(asking.model) else "model.layers"
        raise StudyError(f"{cell.name}: {how_to_mix(trained, size)}")
    facts |= {"layers": len(blocks_of(asking.model)), "width": width_of(asking.model)}
    facts |= {"trained": True, "attempt": attempt, "precision": trained.precision}
    facts["binding"] = asdict(Binding.of(asking.model, asking.tokenizer))
    files += _save_model(cell, asking)
    # Times differ between equal runs, so their file is no part of what is checked.
    return [*(f for f in files if f.name != "training_time.json"), write_json(cell.folder / "cell.json", facts)]


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
    """Train until both behaviours are there, from new weights where they did not come, as often as the study allows.

    The attempt that was kept comes last, from 0.

    Only the tune split is looked at, so a model is not chosen by what is reported of it.
    """
    config = cell.config.training
    for attempt in range(config.attempts):
        asking = _untrained(cell, task, attempt)
        rng = rng_of(cell, f"train/{attempt}" if attempt else "train")
        again = f"attempt {attempt + 1}: " if attempt else ""
        trained = train(
            asking,
            task,
            config,
            rng,
            lambda step, now: tell(min(step, config.steps), config.steps, again + _in_words(now)),  # noqa: B023
        )
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
        tables.append(_behaviour_table(examples, scores))
    if not tables:
        raise InputError(f"task: {task.name} has no example in the test split")
    return [write_table(cell.records / "behaviour.parquet", pd.concat(tables, ignore_index=True))]


def _untrained(cell: Cell, task: Task, attempt: int) -> Asking:
    """What an attempt begins with: a model with new weights, or a trained one with a new adapter."""
    shape = cell.config.model
    first = cell.seed if shape.initialization is None else shape.initialization
    begin = _adapted if shape.lora else _built
    return begin(cell, task, first + 1000 * attempt)


def _built(cell: Cell, task: Task, seed: int) -> Asking:
    shape = cell.config.model
    if task.vocabulary is None:
        raise InputError(
            f"model.folder: task {task.name!r} has no vocabulary to train on; give the folder of a trained model"
        )
    tokenizer = word_tokenizer(task.vocabulary, shape.context)
    model = build_gpt2(tokenizer, shape, seed)
    return Asking(model, tokenizer, task.boundary, cell.config.pairs.batch_size)


def _adapted(cell: Cell, task: Task, seed: int) -> Asking:
    shape = cell.config.model
    assert shape.folder is not None, "no lora without it: the configuration sees to that"
    assert shape.lora is not None
    next(task.training(rng_of(cell, "any")))  # a task that only asks says so, before a large model is opened
    asking = opened_model(cell, shape.folder, task)
    if asking.tokenizer.eos_token_id is None:
        raise InputError(f"model.folder: {shape.folder} has no end-of-text token to close an instance with")
    return replace(asking, model=adapt(asking.model, shape.lora, seed))


def _save_model(cell: Cell, asking: Asking) -> list[Path]:
    """A plain folder; what was adapted has its adapter beside it and is saved with the adapter in its weights."""
    model, files = asking.model, []
    if is_adapted(model):
        adapted = model
        files = _save_folder(cell.folder / "adapter", lambda folder: save_adapter(adapted, folder))
        model = merged(adapted)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        asking.tokenizer.save_pretrained(folder)

    return files + _save_folder(cell.folder / "model", save)


def _save_folder(folder: Path, save: Callable[[Path], None]) -> list[Path]:
    """Write a folder under a temporary name and rename it; its files."""
    for stale in (folder, *folder.parent.glob(f".{folder.name}.*.tmp")):
        shutil.rmtree(stale, ignore_errors=True)
    with new_folder(folder) as temporary:
        save(temporary)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _in_words(measured: dict[str, float]) -> str:
    if not measured:
        return "training"
    return (
        f"novel {measured['novel_accuracy']:.2f} recall {measured['recall']:.2f} "
        f"conflict {measured['conflict_memorized']:.2f}/{measured['conflict_generalized']:.2f}"
    )


def _behaviour_table(examples: Sequence[Example], scores: Scores) -> pd.DataFrame:
    table = pd.DataFrame([example.to_row() for example in examples])
    table = table.astype({field: "str" for field in ("memorized", "generalized", "answer")})
    return table.assign(
        behaviour=scores.behaviour_N, confabulated=scores.confabulated_N, margin=scores.margin_N, tie=scores.tie_N
    )
