"""Cards of a cell's vectors and detectors, with their figures on the test split, from the records."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.interventions import Artefact, Card, Intervention, chosen_paths, load_intervention
from mnemoscope.interventions.detect import Detector
from mnemoscope.report.words import counted
from mnemoscope.runs.schemas import CellFacts
from mnemoscope.runs.strict import read_json
from mnemoscope.statistics import auroc, proportion
from mnemoscope.study.cells import Cell, Tell, version

LIBRARIES = ("torch", "transformers")


def cards_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Write the card into the JSON of every vector and detector; their tensors stay as they are."""
    fitted = [("is_pair", "==", True), ("split", "==", "fit")]
    pairs = pd.read_parquet(cell.records / "pairs.parquet", columns=["group"], filters=fitted)
    shape = cell.config.model
    model = shape.folder or ("an open model" if shape.opened else "a model trained in the study")
    common: dict[str, Any] = {"fitted_on": f"{cell.label}, seed {cell.seed}, {model}"}
    common |= {"pairs": len(pairs), "groups": pairs["group"].nunique()}
    common["versions"] = {"mnemoscope": version()} | {name: metadata.version(name) for name in LIBRARIES}
    paths = {name: cell.records / f"{name}.parquet" for name in ("steering", "neutral", "detection")}
    tables = {name: pd.read_parquet(path) for name, path in paths.items() if path.exists()}
    vectors = {path: load_intervention(path) for path in sorted(chosen_paths(cell.folder).values())}
    found: list[tuple[Path, Artefact, dict[str, Any]]] = [
        (path, vector, _of_vector(cell, vector, tables["steering"], tables.get("neutral")))
        for path, vector in vectors.items()
    ]
    for name, score in (("detector", "p_memorized"), ("detector_below", "p_memorized_below")):
        path = cell.folder / f"{name}.safetensors"
        if path.exists() and "detection" in tables:
            found.append((path, Detector.load(path), _of_detector(tables["detection"], score)))
    written = []
    for path, artefact, facts in found:
        proven = artefact.card.proven if artefact.card else {}
        written.append(replace(artefact, card=Card(**facts, **common, proven=proven)).save(path)[1])
    return written


def _of_vector(
    cell: Cell, vector: Intervention, steering: pd.DataFrame, neutral: pd.DataFrame | None
) -> dict[str, Any]:
    """Figures of an intervention on the list that the study aims at."""
    aim = cell.config.steering.aim
    of_vector = {"direction": f"to_{vector.toward}", "method": vector.method}
    mine = _where(steering, aim=aim, **of_vector)
    judged = mine[mine["examples"] == aim]
    hits, own = judged["after"] == vector.toward, judged["role"] == "vector"
    shift = proportion(hits[own], judged["group"][own])
    facts: dict[str, Any] = {"shift": asdict(shift)}
    controls = hits[~own].groupby(judged["role"][~own]).mean()
    if len(controls):
        facts["control"] = {"name": str(controls.idxmax()), "estimate": float(controls.max())}
    # Where memory examples are the conflicts themselves, steering them to the rule is the aim.
    is_aim = read_json(cell.folder / "cell.json", CellFacts)["memory_is_conflict"]
    left_out = ["memory"] if is_aim and vector.toward == "generalized" else []
    lists = [name for name in counted(vector.toward.direction) if name not in left_out]
    kept = mine[mine["examples"].isin(lists) & (mine["role"] == "vector")]
    wanted = np.where(kept["examples"] == "conflict_rest", vector.toward, "correct")
    right = (kept["after"] == wanted).astype(float) - (kept["before"] == wanted).astype(float)
    facts["cost"] = {str(kind): float(change) for kind, change in right.groupby(kept["examples"]).mean().items()}
    if neutral is not None:
        by_dose = _where(neutral, **of_vector).groupby("dose")["kl_next"].mean()
        facts["divergence"] = {f"{dose:g}": float(kl) for dose, kl in by_dose.items()}
    return facts


def _where(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    return table[(table[list(values)] == pd.Series(values)).all(axis=1)]


def _of_detector(detection: pd.DataFrame, score: str) -> dict[str, Any]:
    test = detection[detection["followed"].isin(("memorized", "generalized")) & (detection["examples"] == "conflict")]
    truth, groups = test["followed"] == "memorized", test["group"].to_numpy()
    mine, beside = (auroc(test[column], truth, groups) for column in (score, "input_only"))
    return {"auroc": asdict(mine) | {"input_only": beside.estimate}}
