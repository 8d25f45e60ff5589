"""Task, model, generators and files of a cell, shared by its stages."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mnemoscope.behaviour import PLAIN, Asking, KeptStates, Prompting
from mnemoscope.interventions import Artefact, Binding, Intervention, best_paths, chosen_paths, load_intervention
from mnemoscope.models import check_peft, layers_of, load_model
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import replacing, write_atomically
from mnemoscope.runs.processes import in_order
from mnemoscope.runs.schemas import CellFacts, KnownFacts
from mnemoscope.runs.strict import read_json
from mnemoscope.study.cells import STATES, Cell, git_state
from mnemoscope.tasks import Task, allow_code, build_task

DATA = "data"  # folder of a cell with copies of the files that its task was made from
GATE = 0.5  # probability from which on a gate acts, where a study judges it


def check_cell(cell: Cell, folder: str) -> None:
    """Raises InputError where an adapter's package is missing, or the model of ``folder`` lacks a layer to be tried."""
    if cell.config.model.lora:
        check_peft("model.lora", "accelerate")
    if cell.opened is None and cell.config.analysed:
        cell.config.steering.check_layers(layers_of(folder))


def rng_of(cell: Cell, stage: str) -> np.random.Generator:
    """The generator of a stage, independent of those of other stages."""
    return np.random.default_rng([cell.seed, zlib.crc32(stage.encode())])


def cell_task(cell: Cell) -> Task:
    """The cell's task with the cell's seed, of the facts that the model knows where the task asks for that."""
    allow_code(*cell.code)
    given = cell.opened.task if cell.opened else None
    task = build_task(cell.config.task, cell.config.options, cell.seed) if given is None else given
    known = cell.records / "known.json"
    return task.knowing(set(read_json(known, KnownFacts)["known"])) if known.exists() else task


def keep_data(cell: Cell) -> list[Path]:
    """Copy the files that the options of a task name into the cell, so that a run opens without them; the copies."""
    copies: list[Path] = []
    for source, copy in _data(cell.config.options, cell.folder / DATA):
        if Path(source).is_file():
            copies.append(write_atomically(copy, Path(source).read_bytes()))
        for path in sorted(Path(source).rglob("*.jsonl")) if Path(source).is_dir() else ():
            copies.append(write_atomically(copy / path.relative_to(source), path.read_bytes()))
    return copies


def with_kept_data(cell: Cell) -> Cell:
    """The cell with the copies that ``keep_data`` made in place of the files that its options name."""
    copies = {
        source: str(copy) if copy.exists() or Path(source).exists() else source  # else an id of a data set
        for source, copy in _data(cell.config.options, cell.folder / DATA)
    }

    def swapped(options: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: swapped(value) if isinstance(value, dict) else copies[value] if _is_path(name, value) else value
            for name, value in options.items()
        }

    return replace(cell, config=cell.config.model_copy(update={"options": swapped(cell.config.options)}))


def _data(options: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file or folder that options of a task, or of its parts, name, and the place of its copy."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _data(value, folder / re.sub(r"[^A-Za-z0-9_-]", "-", name))
        elif _is_path(name, value):
            yield value, (folder / name).with_suffix("" if name == "folder" else Path(value).suffix)


def _is_path(name: str, value: Any) -> bool:
    return name in ("file", "folder", "table") and isinstance(value, str)


_OPENED: dict[tuple[str, bytes], Asking] = {}  # the last cell's model


class PerProcess:
    """A cell whose model each process opens once, when first needed; other processes are sent the cell alone."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def __reduce__(self) -> tuple[type[PerProcess], tuple[Cell]]:
        return type(self), (replace(self.cell, map=in_order, opened=None),)

    @cached_property
    def asking(self) -> Asking:
        """The cell's model, which stages that follow each other in a process share."""
        if self.cell.opened is not None:
            return cell_model(self.cell)
        facts = self.cell.folder / "cell.json"  # which says what the weights are, once these are there
        place = str(self.cell.folder.resolve()), facts.read_bytes() if facts.exists() else b""
        if place not in _OPENED:
            _OPENED.clear()
            _OPENED[place] = cell_model(self.cell)
        return _OPENED[place]


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
    prompting = Prompting(True, shape.chat.system, shape.chat.reply).of(task) if shape.chat else PLAIN
    return Asking(model, tokenizer, task.boundary, cell.config.pairs.batch_size, prompting)


def kept_states(cell: Cell, anew: bool = False) -> KeptStates:
    """States that earlier stages of a cell have read; ``anew``: without those of an earlier attempt."""
    folder = cell.folder / STATES
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    return KeptStates(folder)


def save_without_card(cell: Cell, artefact: Artefact, path: Path) -> list[Path]:
    """Save an artefact, whose JSON the cards stage writes again, so it has to run again; its other files."""
    (cell.folder / "stages" / "cards.json").unlink(missing_ok=True)
    tensors, _, *others = artefact.save(path)
    return [tensors, *others]


def artefact_facts(cell: Cell, asking: Asking) -> dict[str, Any]:
    """Fields of every artefact of a cell; the binding is the one that the train stage computed."""
    bound = read_json(cell.folder / "cell.json", CellFacts).get("binding")
    assert bound is not None, "the train stage wrote it"
    binding = Binding(**bound)
    facts = {"task": cell.label, "binding": binding, "prompting": asking.prompting}
    return facts | {"commit": git_state()["commit"] or ""}


def read_interventions(cell: Cell, methods: Literal["all", "best"] = "best") -> list[Intervention]:
    """What was best on tune for the study's aim, one a direction, of fits the best vectors; or that of all methods."""
    paths = best_paths if methods == "best" else chosen_paths
    return [load_intervention(path) for path in paths(cell.folder).values()]


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a Parquet file atomically; equal tables give equal bytes."""
    return write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))


@contextmanager
def table_writer(path: Path, columns: dict[str, pa.DataType]) -> Iterator[Callable[[pd.DataFrame], None]]:
    """A function that appends rows to a Parquet file, which appears when the context ends without an error."""
    schema = pa.schema(columns.items())
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as file:
        yield lambda table: file.write_table(
            pa.Table.from_pandas(table, schema, preserve_index=False).replace_schema_metadata()
        )


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file atomically."""
    return write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
