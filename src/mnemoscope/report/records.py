"""What a run folder holds, read and checked; ``records.yaml`` declares the tables and their columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import parquet

from mnemoscope.runs.digests import check_closed, intact, is_there
from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.runs.schemas import CellFacts, ManifestFacts, ProbeFacts, StudyFacts, WhyFacts, read_chosen
from mnemoscope.runs.strict import bounded_table, checked, read_json, read_text
from mnemoscope.runs.yaml import MOST_YAML, parse_yaml
from mnemoscope.statistics import group_index
from mnemoscope.statistics.contrast import Contrast

# Text columns of the large tables, which repeat few words: as categories they take a byte a row; groups are numbers.
LARGE = ("steering", "effects", "transfer_steering")
WORDS = ["aim", "direction", "method", "role", "examples", "group", "family", "split", "before", "after"]
WORDS += ["what", "site", "side"]
TABLES = ("behaviour", "pairs", "probes", "learning", "halves", "sweep", "effects")  # of every cell, beside steering
OPTIONAL_TABLES = ("detection", "gate", "neutral", "samples")


@cache
def declared_tables() -> dict[str, dict[str, Any]]:
    """By table: ``about``, ``columns`` ({names: meaning}), and where there is something to add ``if`` and ``note``."""
    return dict(declared("records.yaml"))


@cache
def declared(name: str) -> Any:
    """The content of a YAML file of this package."""
    return parse_yaml((files("mnemoscope.report") / name).read_text(encoding="utf-8"), name)


def columns_of(table: str) -> list[str]:
    """Names of the columns of a table."""
    return ", ".join(declared_tables()[table]["columns"]).split(", ")


@dataclass(frozen=True)
class Cell:
    """The records of one (task, model, seed); None where the study made none."""

    folder: Path
    name: str  # of the folder, and of the random streams of the cell's intervals
    label: str  # under which results and report show it; a task's own name unless the study gives another
    seed: int
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
        probes = ((cell, _json(cell.folder / "probe.json", ProbeFacts, optional=True)) for cell in self.cells)
        return {(cell.label, cell.seed): probe["best_layer"] for cell, probe in probes if probe}

    def by_label(self) -> dict[str, list[Cell]]:
        """The cells of each label by seed; labels in the order of the study, else by name."""
        place = {label: number for number, label in enumerate(self.study.get("cells") or [])}
        cells = sorted(self.cells, key=lambda c: (place.get(c.label, len(place)), c.label, c.seed, c.name))
        return {label: list(part) for label, part in groupby(cells, key=lambda cell: cell.label)}


def read_run(folder: Path) -> Run:
    """Read all records of a run.

    Raises:
        InputError: a file is missing, cannot be read, or lacks a column or field; one line that names the file.
    """
    check_closed(folder)
    study_text = read_intact(folder / "study.yaml", lambda path: read_text(path, most=MOST_YAML))
    study = parse_yaml(study_text, str(folder / "study.yaml"))
    checked(study, StudyFacts, str(folder / "study.yaml"))
    failed = _json(folder / "failed.json", dict[str, str], optional=True)
    folders = [path.parent for path in sorted((folder / "cells").glob("*/cell.json")) if path.parent.name not in failed]
    cells = tuple(read_cell(cell) for cell in folders if _json(cell / "cell.json", CellFacts).get("analysed", True))
    if not cells:
        raise InputError(f"{folder / 'cells'}: no cell.json in any folder here, so there is nothing to report")
    manifest = _json(folder / "manifest.json", ManifestFacts, optional=True)
    tables = ("seeds", "transfer_steering", "transfer_probes")
    across = {name: _table(folder / "records", name, optional=True) for name in tables}
    return Run(study_text, study, manifest, cells, failed, **across)


def read_cell(folder: Path) -> Cell:
    """Read the records of one cell; see ``read_run`` for what it raises."""
    info, records = _json(folder / "cell.json", CellFacts), folder / "records"
    chosen = read_intact(records / "chosen.json", read_chosen)
    needed = (*TABLES, "training") if info["trained"] else TABLES
    tables: dict[str, Any] = {name: _table(records, name) for name in needed}
    tables |= {name: _table(records, name, optional=True) for name in OPTIONAL_TABLES}
    return Cell(
        folder=folder,
        name=folder.name,
        label=info["label"],
        seed=info["seed"],
        info=info,
        training_time=_json(records / "training_time.json", dict[str, float]) if info["trained"] else {},
        chosen=chosen,
        contrast=read_intact(folder / "contrast.safetensors", Contrast.load),
        no_detector=_json(records / "no_detector.json", WhyFacts, optional=True).get("why", ""),
        **tables,
    )


def read_intact(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What ``reader`` makes of a file that is as its stage wrote it; what goes wrong is one line with its name."""
    intact(path)
    with refusing(f"{path}: cannot be read"):
        return reader(path)


def _json(path: Path, kind: Any, optional: bool = False) -> Any:
    """The object in a file, of a type; an empty one for an optional file that is not there."""
    return {} if optional and not is_there(path) else read_intact(path, lambda p: read_json(p, kind))


def _table(folder: Path, name: str, optional: bool = False) -> Any:
    """A table with its declared columns; None for an optional one that is not there, else InputError."""
    path, wanted = folder / f"{name}.parquet", columns_of(name)
    if optional and not is_there(path):
        return None
    present = read_intact(path, lambda p: parquet.read_schema(p).names)
    for column in wanted:
        if column not in present:
            raise InputError(f"{path}: column {column!r} is missing")
    words = WORDS if name in LARGE else None
    table = read_intact(path, lambda p: pd.read_parquet(bounded_table(p), columns=wanted, read_dictionary=words))
    if words:  # names are sorted once, not for each of some thousand intervals
        names = table.group.astype("category").cat
        table["group"] = group_index(names.categories, len(names.categories))[names.codes]
    return table
