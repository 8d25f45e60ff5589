"""What a run folder holds, read and checked; the columns are those of docs/RECORDS.md.

Shapes: L layers, D neurons.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pyarrow import parquet
from safetensors import safe_open

from mnemoscope.errors import InputError

# direction of turning -> (the behaviour it aims at, the behaviour it starts from)
DIRECTIONS = {"to_generalized": ("generalized", "memorized"), "to_memorized": ("memorized", "generalized")}
# What a setting is chosen for, and the list of examples that it is to turn.
AIMS = ("pairs", "conflict")
CONTROLS = ("random_neurons", "low_correlation", "random_sign", "shuffled_labels", "gaussian")

COLUMNS = {
    "training": "step loss novel_accuracy recall conflict_memorized conflict_generalized conflict_other met kept",
    "behaviour": "item prompt kind group family split memorized generalized answer behaviour confabulated margin tie",
    "pairs": "item group split memorized generalized prompt_a family_a behaviour_a margin_a "
    "prompt_b family_b behaviour_b margin_b is_pair",
    "probes": "kind layer offset group label score",
    "learning": "pairs draw groups what layer value n",
    "halves": "halving what layer top value chance chance_low chance_high n",
    "sweep": "direction method site layers top strength examples n shift stay other margin margin_sd kept",
    "steering": "aim direction method role draw examples example group family split before after margin_before margin "
    "confabulated",
    "effects": "what direction method site layers dose role draw side example group after margin_before margin",
    "detection": "examples followed prompt group family p_memorized p_conflict unlike input_only input_repeats "
    "entropy top_gap readable_from",
    "gate": "direction examples example p_memorized unlike acts",
    "neutral": "direction method dose text kl_first kl_next same_top acts",
    "samples": "direction prompt group memorized generalized plain steered nats_plain nats_steered",
    "seeds": "label seed_a seed_b site what layer top shared_initialization value chance_low chance chance_high",
    "transfer_steering": "source target seed direction method role draw example group after",
    "transfer_probes": "source target seed layer group label score",
}
# Text columns of the large tables, which repeat few words: read as categories, they take a byte a row.
LARGE = ("steering", "effects", "transfer_steering")
WORDS = ["aim", "direction", "method", "role", "examples", "group", "family", "split", "before", "after"]
WORDS += ["what", "site", "side"]
CONTRAST_ARRAYS = ("nmd", "rho", "effect_size", "p_family_wise", "p_false_discovery")
ACROSS = ("seeds", "transfer_steering", "transfer_probes")
CELL_FIELDS = ("task", "label", "seed", "memory_is_conflict", "trained")


@dataclass(frozen=True)
class Contrast:
    """Per-neuron statistics of the fit pairs, each of shape (L, D), float64, NaN where undefined.

    Attributes:
        site: where in a layer the states were read.
        pairs, groups: how many went in.
        nmd: mean difference, generalized minus memorized, in units of the state.
        rho: Pearson correlation with the behaviour.
        p_family_wise: p-value that holds for all neurons of all layers together.
    """

    site: str
    pairs: int
    groups: int
    nmd: np.ndarray
    rho: np.ndarray
    p_family_wise: np.ndarray


@dataclass(frozen=True)
class Cell:
    """The records of one (task, model, seed).

    Attributes:
        training: None where the model was not trained by the study.
        detection, gate: None where no detector was fitted.
        neutral, samples: None where the study asked for none.
        no_detector: why none could be fitted.
    """

    folder: Path
    info: dict[str, Any]
    training: pd.DataFrame | None
    training_time: dict[str, float]
    behaviour: pd.DataFrame
    pairs: pd.DataFrame
    probes: pd.DataFrame
    learning: pd.DataFrame
    halves: pd.DataFrame
    sweep: pd.DataFrame
    effects: pd.DataFrame
    chosen: dict[str, Any]
    contrast: Contrast
    detection: pd.DataFrame | None = None
    gate: pd.DataFrame | None = None
    neutral: pd.DataFrame | None = None
    samples: pd.DataFrame | None = None
    no_detector: str = ""

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
    def task(self) -> str:
        """The kind of task."""
        return str(self.info["task"])

    @property
    def seed(self) -> int:
        return int(self.info["seed"])


@dataclass(frozen=True)
class Run:
    """A run folder: its configuration as text and as data, its manifest, and its cells in the order of their names.

    Attributes:
        failed: why cells could not go on, by name; they are not among the cells.
        seeds, transfer_steering, transfer_probes: what compares cells; None where there was nothing to compare.
    """

    folder: Path
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
        files = {(cell.label, cell.seed): cell.folder / "probe.json" for cell in self.cells}
        return {key: int(_json(path)["best_layer"]) for key, path in files.items() if path.exists()}

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
    manifest = _json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    failed = _json(folder / "failed.json") if (folder / "failed.json").exists() else {}
    folders = [path.parent for path in sorted((folder / "cells").glob("*/cell.json")) if path.parent.name not in failed]
    cells = tuple(read_cell(cell) for cell in folders if _json(cell / "cell.json").get("analysed", True))
    if not cells:
        raise InputError(f"{folder / 'cells'}: no cell.json in any folder here, so there is nothing to report")
    across = {name: _table_if_any(folder / "records", name) for name in ACROSS}
    return Run(folder, study_text, study, manifest, cells, failed, **across)


def read_cell(folder: Path) -> Cell:
    """Read the records of one cell; see ``read_run`` for what it raises."""
    info = _json(folder / "cell.json")
    for field in CELL_FIELDS:
        if field not in info:
            raise InputError(f"{folder / 'cell.json'}: field {field!r} is missing")
    records = folder / "records"
    trained = bool(info["trained"])
    return Cell(
        folder=folder,
        info=info,
        training=_table(records, "training") if trained else None,
        training_time=_json(records / "training_time.json") if trained else {},
        behaviour=_table(records, "behaviour"),
        pairs=_table(records, "pairs"),
        probes=_table(records, "probes"),
        learning=_table(records, "learning"),
        halves=_table(records, "halves"),
        sweep=_table(records, "sweep"),
        effects=_table(records, "effects"),
        chosen=_chosen(records / "chosen.json"),
        contrast=_contrast(folder / "contrast.safetensors"),
        detection=_table_if_any(records, "detection"),
        gate=_table_if_any(records, "gate"),
        neutral=_table_if_any(records, "neutral"),
        samples=_table_if_any(records, "samples"),
        no_detector=_json(lacking)["why"] if (lacking := records / "no_detector.json").exists() else "",
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


def _chosen(path: Path) -> dict[str, Any]:
    chosen = _json(path)
    for aim in AIMS:
        if not {"best", "methods"} <= set(chosen.get(aim) or ()):
            raise InputError(f"{path}: field {aim!r} with 'best' and 'methods' is missing")
    return chosen


def _table(folder: Path, name: str) -> pd.DataFrame:
    """A table with the columns that the report reads.

    Raises:
        InputError: it is missing, damaged or lacks a column.
    """
    path = folder / f"{name}.parquet"
    wanted = COLUMNS[name].split()
    present: list[str] = _read(path, lambda p: parquet.read_schema(p).names)
    for column in wanted:
        if column not in present:
            raise InputError(f"{path}: column {column!r} is missing")
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
    return Contrast(
        site=metadata["site"],
        pairs=int(metadata["pairs"]),
        groups=int(metadata["groups"]),
        nmd=arrays["nmd"],
        rho=arrays["rho"],
        p_family_wise=arrays["p_family_wise"],
    )
