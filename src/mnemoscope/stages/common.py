"""Task, model, generators and files of a cell, shared by its stages."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save

from mnemoscope.behaviour import PLAIN, Asking, KeptStates, Prompting
from mnemoscope.cells import STATES, Cell, Tell
from mnemoscope.directions import ANSWERED, Labels, Setting
from mnemoscope.errors import InputError
from mnemoscope.files import replacing, write_atomically
from mnemoscope.models import load_model
from mnemoscope.steering import Artefact, Binding
from mnemoscope.tasks import Task, build_task

Stage = Callable[[Cell, Tell], list[Path]]

GATE = 0.5  # probability from which on a gate acts, where a study judges it


def rng_of(cell: Cell, stage: str) -> np.random.Generator:
    """The generator of a stage, independent of those of other stages."""
    return np.random.default_rng([cell.seed, zlib.crc32(stage.encode())])


def cell_task(cell: Cell) -> Task:
    """The cell's task with the cell's seed, of the facts that the model knows where the task asks for that."""
    given = cell.opened.task if cell.opened else None
    task = build_task(cell.config.task, cell.config.options, cell.seed) if given is None else given
    known = cell.records / "known.json"
    return task.knowing(set(json.loads(known.read_text())["known"])) if known.exists() else task


class PerProcess:
    """A cell whose model each process opens once, when first needed; other processes are sent the cell alone."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def __reduce__(self) -> tuple[type[PerProcess], tuple[Cell]]:
        return type(self), (self.cell,)

    @cached_property
    def asking(self) -> Asking:
        """The cell's model."""
        return cell_model(self.cell)


def cell_model(cell: Cell) -> Asking:
    """The cell's trained model with frozen parameters; InputError where its folder is missing or damaged."""
    shape = cell.config.model
    source = shape.folder if shape.folder and not shape.is_trained else cell.model_folder  # a hub id stays text
    asking = opened_model(cell, source, cell_task(cell))
    asking.model.requires_grad_(False)  # only shifts are fitted
    return asking


def opened_model(cell: Cell, source: str | Path, task: Task) -> Asking:
    """A model opened as the cell's configuration says; InputError where its folder is missing or damaged."""
    shape = cell.config.model
    if shape.opened and cell.opened is None:
        raise InputError("model.opened: this run is of a model that was open in Python; call mnemoscope.fit with it")
    if cell.opened is not None:
        model, tokenizer = cell.opened.model, cell.opened.tokenizer
    else:
        model, tokenizer = load_model(source, dtype=shape.dtype, device_map=shape.device_map, layout=shape.layout)
    prompting = PLAIN
    if shape.chat:
        split = task.split_reply if task.begins_reply else None
        prompting = Prompting(True, shape.chat.system, shape.chat.reply, split)
    return Asking(model, tokenizer, task.boundary, cell.config.pairs.batch_size, prompting)


def kept_states(cell: Cell, anew: bool = False) -> KeptStates:
    """States that earlier stages of a cell have read; ``anew``: without those of an earlier attempt."""
    folder = cell.folder / STATES
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    return KeptStates(folder)


def keep_shifts(cell: Cell, shifts: Mapping[Setting, np.ndarray]) -> None:
    """Keep directions, float64 (L, D), for later stages, by setting."""
    tensors = {json.dumps(asdict(setting)): shift_LD for setting, shift_LD in shifts.items()}
    write_atomically(cell.folder / STATES / "shifts" / "kept.safetensors", save(tensors))


def kept_shifts(cell: Cell) -> dict[tuple[Setting, Labels], np.ndarray]:
    """The cache of ``Directions`` that ``keep_shifts`` left; {} where there is none."""
    path = cell.folder / STATES / "shifts" / "kept.safetensors"
    stored = load_file(path) if path.is_file() else {}
    return {(_setting(json.loads(name)), ANSWERED): shift_LD for name, shift_LD in stored.items()}


def save_without_card(cell: Cell, artefact: Artefact, path: Path) -> Path:
    """Save an artefact, whose JSON the cards stage writes again, so it has to run again; the file of the tensors."""
    (cell.folder / "stages" / "cards.json").unlink(missing_ok=True)
    return artefact.save(path)[0]


def read_binding(cell: Cell) -> Binding:
    """The binding of the cell's model, computed once, by the train stage."""
    return Binding(**json.loads((cell.folder / "cell.json").read_text())["binding"])


def read_chosen(cell: Cell, aim: str) -> dict[tuple[str, str], Setting]:
    """The settings that the steering stage chose for an aim, by direction and method."""
    methods = json.loads((cell.records / "chosen.json").read_text())[aim]["methods"]
    names = ("site", "layers", "top", "strength", "positions")
    return {
        (direction, method): _setting(
            {"direction": direction, "method": method} | {name: facts[name] for name in names}
        )
        for method, by_direction in methods.items()
        for direction, facts in by_direction.items()
    }


def _setting(facts: Mapping[str, Any]) -> Setting:
    return Setting(**{**facts, "layers": tuple(facts["layers"])})


def read_best(cell: Cell) -> dict[str, Path]:
    """The files of the vectors that were best for pairs on the tune split, by direction."""
    best = json.loads((cell.records / "chosen.json").read_text())["pairs"]["best"]
    return {d: cell.folder / "vectors" / f"{d}-{method}.safetensors" for d, method in best.items()}


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a Parquet file atomically; equal tables give equal bytes."""
    return write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))


class TableWriter:
    """Writes a Parquet file from tables as they come, holding ``ROWS`` rows at most; equal rows give equal bytes.

    The file appears when the context ends without an error.
    """

    ROWS = 2**12

    def __init__(self, path: Path, columns: dict[str, pa.DataType]) -> None:
        self.path, self.schema = path, pa.schema(columns.items())
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> TableWriter:
        self._stack = ExitStack()
        temporary = self._stack.enter_context(replacing(self.path))
        self._file = self._stack.enter_context(pq.ParquetWriter(temporary, self.schema))
        return self

    def add(self, table: pd.DataFrame) -> None:
        """Append rows."""
        self._waiting.append(pa.Table.from_pandas(table, self.schema, preserve_index=False).replace_schema_metadata())
        while sum(map(len, self._waiting)) >= self.ROWS:
            whole = pa.concat_tables(self._waiting).combine_chunks()
            self._file.write_table(whole.slice(0, self.ROWS))
            self._waiting = [whole.slice(self.ROWS)]

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._stack.__exit__(*error)  # so that the file does not take its name
            return
        with self._stack:
            if any(map(len, self._waiting)):
                self._file.write_table(pa.concat_tables(self._waiting).combine_chunks())


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file atomically."""
    return write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
