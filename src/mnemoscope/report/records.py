"""What a run folder holds, read and checked; ``records.yaml`` declares the tables and their columns.

Shapes: L layers, D neurons.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pyarrow import parquet
from safetensors import safe_open

from mnemoscope.errors import InputError
from mnemoscope.report.schema import AIMS

# Text columns of the large tables, which repeat few words: read as categories, they take a byte a row.
LARGE = ("steering", "effects", "transfer_steering")
NEWER = ("p_memorized_below",)  # columns that runs of version 0.1 do not have
WORDS = ["aim", "direction", "method", "role", "examples", "group", "family", "split", "before", "after"]
WORDS += ["what", "site", "side"]
CONTRAST_ARRAYS = ("nmd", "rho", "effect_size", "p_family_wise", "p_false_discovery")
CELL_FIELDS = ("task", "label", "seed", "memory_is_conflict", "trained")


@cache
def declared_tables() -> dict[str, dict[str, Any]]:
    """By table: ``about``, ``columns`` ({names: meaning}), and where there is something to add ``if`` and ``note``."""
    text = (files("mnemoscope.report") / "records.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def columns_of(table: str) -> list[str]:
    """Names of the columns of a table."""
    return ", ".join(declared_tables()[table]["columns"]).split(", ")


@dataclass(frozen=True)
class Contrast:
    """Per-neuron statistics of the fit pairs, each of shape (L, D), float64, NaN where undefined."""

    site: str
    pairs: int
    groups: int
    nmd: np.ndarray
    rho: np.ndarray
    p_family_wise: np.ndarray


@dataclass(frozen=True)
class Cell:
    """The records of one (task, model, seed); None where the study made none."""

    folder: Path
    info: dict[str, Any]
    training_time: dict[str, float]
    chosen: dict[str, Any]
    contrast: Contrast
    no_detector: str
    behaviour: pd.DataFrame
    pairs: pd.DataFrame
    probes: pd.DataFrame
    learning: pd.DataFrame
    halves: pd.DataFrame
    sweep: pd.DataFrame
    effects: pd.DataFrame
    training: pd.DataFrame | None = None
    detection: pd.DataFrame | None = None
    gate: pd.DataFrame | None = None
    neutral: pd.DataFrame | None = None
    samples: pd.DataFrame | None = None

    def read_steering(self) -> pd.DataFrame:
        """The steering table, read anew: it is by far the largest, and one cell's at a time in a process is enough."""
        return _table(self.folder / "records", "steering")

    @property
    def name(self) -> str:
        """The folder's name, which also names the random streams of the cell's intervals."""
        return self.folder.name

    @property
    def label(self) -> str:
        """The name under which results and report show the cell; a task's own name unless the study gives another."""
        return str(self.info["label"])

    @property
    def seed(self) -> int:
        """The seed of the cell."""
        return int(self.info["seed"])


@dataclass(frozen=True)
class Run:
    """A run folder; ``failed`` cells are not among its cells, and None where there was nothing to compare."""

    study_text: str
    study: dict[str, Any]
    manifest: dict[str, Any]
    cells: tuple[Cell, ...]
    failed: dict[str, str]
    seeds: pd.DataFrame | None
    transfer_steering: pd.DataFrame | None
    transfer_probes: pd.DataFrame | None

    def probe_layers(self) -> dict[tuple[str, int], int]:
        """By label and seed, the layer whose probe reads the tune split best; cells without a probe are left out."""
        found = {(cell.label, cell.seed): _json_if_any(cell.folder / "probe.json") for cell in self.cells}
        return {key: int(probe["best_layer"]) for key, probe in found.items() if probe}

    def by_label(self) -> dict[str, list[Cell]]:
        """The cells of each label by seed; labels in the order of the study, else by name."""
        order = list(self.study.get("cells") or [])
        place = {label: number for number, label in enumerate(order)}
        labels: dict[str, list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda c: (place.get(c.label, len(order)), c.label, c.seed, c.name)):
            labels.setdefault(cell.label, []).append(cell)
        return labels


def read_run(folder: Path) -> Run:
    """Read all records of a run.

    Raises:
        InputError: a file is missing, cannot be read, or lacks a column or field; one line that names the file.
    """
    study_text = _read(folder / "study.yaml", lambda path: path.read_text(encoding="utf-8"))
    study = _read(folder / "study.yaml", lambda _: yaml.safe_load(study_text))
    if not isinstance(study, dict):
        raise InputError(f"{folder / 'study.yaml'}: a mapping is wanted, not {type(study).__name__}")
    failed = _json_if_any(folder / "failed.json")
    folders = [path.parent for path in sorted((folder / "cells").glob("*/cell.json")) if path.parent.name not in failed]
    cells = tuple(read_cell(cell) for cell in folders if _json(cell / "cell.json").get("analysed", True))
    if not cells:
        raise InputError(f"{folder / 'cells'}: no cell.json in any folder here, so there is nothing to report")
    across = {
        name: _table_if_any(folder / "records", name) for name in ("seeds", "transfer_steering", "transfer_probes")
    }
    return Run(study_text, study, _json_if_any(folder / "manifest.json"), cells, failed, **across)


def read_cell(folder: Path) -> Cell:
    """Read the records of one cell; see ``read_run`` for what it raises."""
    info, records = _json(folder / "cell.json"), folder / "records"
    for field in CELL_FIELDS:
        if field not in info:
            raise InputError(f"{folder / 'cell.json'}: field {field!r} is missing")
    tables = ["behaviour", "pairs", "probes", "learning", "halves", "sweep", "effects"]
    tables += ["training"] if info["trained"] else []
    optional = ("detection", "gate", "neutral", "samples")
    found: dict[str, Any] = {name: _table(records, name) for name in tables}
    found |= {name: _table_if_any(records, name) for name in optional}
    return Cell(
        folder=folder,
        info=info,
        training_time=_json(records / "training_time.json") if info["trained"] else {},
        chosen=_chosen(records / "chosen.json"),
        contrast=_contrast(folder / "contrast.safetensors"),
        no_detector=_json_if_any(records / "no_detector.json").get("why", ""),
        **found,
    )


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What ``reader`` makes of the file; whatever goes wrong becomes one line that names the file."""
    if not path.is_file():
        raise InputError(f"{path}: this file is missing; the run may not be finished")
    try:
        return reader(path)
    except Exception as error:  # each reader has its own family of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason[:300]})") from error


def _json(path: Path) -> dict[str, Any]:
    value = _read(path, lambda p: json.loads(p.read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise InputError(f"{path}: an object is wanted, not {type(value).__name__}")
    return value


def _json_if_any(path: Path) -> dict[str, Any]:
    return _json(path) if path.exists() else {}


def _chosen(path: Path) -> dict[str, Any]:
    chosen = _json(path)
    for aim in AIMS:
        if not {"best", "methods"} <= set(chosen.get(aim) or ()):
            raise InputError(f"{path}: field {aim!r} with 'best' and 'methods' is missing")
    return chosen


def _table(folder: Path, name: str) -> pd.DataFrame:
    """A table with its declared columns.

    Raises:
        InputError: it is missing, damaged or lacks a column.
    """
    path, wanted = folder / f"{name}.parquet", columns_of(name)
    present: list[str] = _read(path, lambda p: parquet.read_schema(p).names)
    for column in wanted:
        if column not in (*present, *NEWER):
            raise InputError(f"{path}: column {column!r} is missing")
    wanted = [column for column in wanted if column in present]
    words = WORDS if name in LARGE else None
    table: pd.DataFrame = _read(path, lambda p: pd.read_parquet(p, columns=wanted, read_dictionary=words))
    return table


def _table_if_any(folder: Path, name: str) -> pd.DataFrame | None:
    return _table(folder, name) if (folder / f"{name}.parquet").exists() else None


def _contrast(path: Path) -> Contrast:
    def reader(p: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        with safe_open(p, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118

    arrays, metadata = _read(path, reader)
    for key in CONTRAST_ARRAYS:
        if key not in arrays or arrays[key].ndim != 2:
            raise InputError(f"{path}: array {key!r} of shape (layers, neurons) is missing")
    for key in ("site", "pairs", "groups"):
        if key not in metadata:
            raise InputError(f"{path}: metadata {key!r} is missing")
    kept = {key: arrays[key] for key in ("nmd", "rho", "p_family_wise")}
    return Contrast(metadata["site"], int(metadata["pairs"]), int(metadata["groups"]), **kept)
