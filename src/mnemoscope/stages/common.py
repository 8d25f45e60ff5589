"""What the stages of a cell share: its task, its model, its generators, its files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, Chat, all_said
from mnemoscope.cells import Cell, Tell
from mnemoscope.detect import Detector
from mnemoscope.directions import Setting
from mnemoscope.files import write_atomically
from mnemoscope.models import Layout, load_model
from mnemoscope.steering import SteeringVector
from mnemoscope.tasks import Task, build_task

Stage = Callable[[Cell, Tell], list[Path]]


def rng_of(cell: Cell, stage: str) -> np.random.Generator:
    """The generator of a stage; no stage's draws depend on another's."""
    return np.random.default_rng([cell.seed, zlib.crc32(stage.encode())])


def cell_task(cell: Cell) -> Task:
    """The cell's task, with the cell's seed; of what the model knows by heart, where the task asks for that."""
    task = build_task(cell.config.task, cell.config.options, cell.seed)
    known = cell.records / "known.json"
    return task.knowing(set(json.loads(known.read_text())["known"])) if known.exists() else task  # type: ignore[attr-defined]


def cell_model(cell: Cell) -> Asking:
    """The cell's trained model, ready to be asked.

    Raises:
        InputError: its folder is missing or damaged.
    """
    shape = cell.config.model
    # A hub id stays the text that it is.
    source = shape.folder if shape.folder and not shape.is_trained else cell.model_folder
    asking = opened_model(cell, source, cell_task(cell))
    asking.model.requires_grad_(False)  # only shifts are ever fitted to it
    return asking


def opened_model(cell: Cell, source: str | Path, task: Task) -> Asking:
    """A model as the cell's configuration opens it, ready to be asked.

    Raises:
        InputError: its folder is missing or damaged.
    """
    shape = cell.config.model
    layout = Layout(**shape.layout.model_dump()) if shape.layout else None
    model, tokenizer = load_model(source, dtype=shape.dtype, device_map=shape.device_map, layout=layout)
    chat = Chat(shape.chat.system, getattr(task, "parted", all_said)) if shape.chat else None
    return Asking(model, tokenizer, task.boundary, cell.config.pairs.batch_size, chat)


def read_chosen(cell: Cell, aim: str) -> dict[tuple[str, str], Setting]:
    """The settings that the steering stage chose for an aim, by direction and method."""
    methods = json.loads((cell.records / "chosen.json").read_text())[aim]["methods"]
    return {
        (direction, method): Setting(
            direction,
            method,
            facts["site"],
            tuple(facts["layers"]),
            facts["top"],
            facts["strength"],
            facts["positions"],
        )
        for method, by_direction in methods.items()
        for direction, facts in by_direction.items()
    }


def read_best(cell: Cell) -> dict[str, Path]:
    """By direction, the file of the vector that was best for pairs on the tune split."""
    best = json.loads((cell.records / "chosen.json").read_text())["pairs"]["best"]
    return {d: cell.folder / "vectors" / f"{d}-{method}.safetensors" for d, method in best.items()}


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a Parquet file atomically; equal tables give equal bytes."""
    return write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file atomically."""
    return write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def save_bound(folder: Path, name: str, made: SteeringVector | Detector) -> list[Path]:
    """Write the two files of a vector or a detector under temporary names and rename them."""
    folder.mkdir(exist_ok=True)
    path, temporary = folder / f"{name}.safetensors", folder / f".{name}.tmp.safetensors"
    try:
        made.save(temporary)
        for suffix in (".json", ".safetensors"):
            temporary.with_suffix(suffix).replace(path.with_suffix(suffix))
    finally:
        for suffix in (".json", ".safetensors"):
            temporary.with_suffix(suffix).unlink(missing_ok=True)
    return [path, path.with_suffix(".json")]
