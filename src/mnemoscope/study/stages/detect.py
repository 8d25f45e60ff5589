"""Fit a detector, read test prompts with it, record where a gate would act; write cards of vectors and detectors.

A gate decides by the unsteered state at the decision position, so a gated vector equals the ungated one where the gate
acts and does nothing elsewhere.

Shapes: N prompts, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, read_states
from mnemoscope.interventions import Card, Intervention, SteeringVector, Toward, chosen_paths, load_intervention
from mnemoscope.interventions.detect import Detector, Observed, Reading, fit_detectors
from mnemoscope.report.words import counted
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import CellFacts
from mnemoscope.runs.strict import read_json
from mnemoscope.statistics import auroc, proportion
from mnemoscope.study.cells import Cell, Tell, version
from mnemoscope.study.stages import common
from mnemoscope.study.stages.lists import Records, judged_lists
from mnemoscope.study.stages.probe import input_scores, uncertainty_scores
from mnemoscope.tasks import SPLITS, Example, Kind, Side, Split, draw

SIDES: tuple[Side, Side] = ("a", "b")
NEITHER: tuple[Kind, ...] = ("memory", "novel")
LIBRARIES = ("torch", "transformers")


def detection_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Fit a detector on fit and tune prompts; read test prompts beside baselines; record what a gate decides."""
    config = cell.config.detection
    if not config.fitted:
        return []
    asking, records = common.cell_model(cell), Records.of(cell)
    parts = {}
    for done, split in enumerate(SPLITS):
        tell(done, 4, f"reading {split} prompts")
        parts[split] = _prompts(cell, asking, records, split)
    # The last block whose output precedes all shifts of the best vectors; -1: none.
    shifting = [one for one in common.read_interventions(cell) if isinstance(one, SteeringVector) and one.layers]
    below = min((vector.layers[0] - (vector.site != "block") for vector in shifting), default=-1)
    try:
        found = fit_detectors(parts["fit"].observed(), parts["tune"].observed(), cell.config.pairs.site, below)
    except InputError as error:  # too few prompts of a behaviour, which is no reason to lose all else
        tell(1, 1, f"no detector: {error}")
        return [common.write_json(cell.records / "no_detector.json", {"why": str(error)})]
    detector, lower = (one and replace(one, **common.artefact_facts(cell, asking)) for one in found)
    assert detector is not None
    # Without their JSON, which the cards stage writes again.
    files = common.save_without_card(cell, detector, cell.folder / "detector.safetensors")
    files += common.save_without_card(cell, lower, cell.folder / "detector_below.safetensors") if lower else []
    files.append(common.write_table(cell.records / "detection.parquet", _readings(asking, parts, detector, lower)))
    tell(3, 4, "where a gate acts")
    gates = pd.concat(_gates(cell, asking, records, detector), ignore_index=True)
    return [*files, common.write_table(cell.records / "gate.parquet", gates)]


class _Prompts(NamedTuple):
    """Prompts of one split with the behaviour that followed and their states at the decision position."""

    rows: pd.DataFrame
    examples: Sequence[Example]
    states_NLD: np.ndarray
    uncertainty_N2: np.ndarray

    def observed(self) -> Observed:
        """What a detector is fitted on: without prompts that were answered neither way."""
        kept_N = self.rows.followed.isin(("memorized", "generalized", "neither")).to_numpy()
        return Observed(self.states_NLD[kept_N], self.rows.followed.to_numpy(dtype=object)[kept_N])


def _prompts(cell: Cell, asking: Asking, records: Records, split: Split) -> _Prompts:
    """Phrasings of candidates as they come, pairs or not, and questions without a conflict."""
    config, rng = cell.config.detection, common.rng_of(cell, f"detection/{split}")
    tables = {"conflict": records.pairs, **(records.held_out if split == "test" else {})}
    found = [
        (name, behaviour, example)
        for name, table in tables.items()
        for example, behaviour in _phrasings(table, split, config.examples, rng)
    ]
    for kind in NEITHER if not records.task.memory_is_conflict else NEITHER[1:]:
        found += [(kind, "neither", e) for e in draw(records.task, rng, config.others, kind, split)]
    rows = pd.DataFrame([row[:2] for row in found], columns=["examples", "followed"])
    examples = [example for *_, example in found]
    states = read_states(asking, examples, cell.config.pairs.site, kept=common.kept_states(cell))
    return _Prompts(rows, examples, states.at_decision_NLD, states.uncertainty_N2)


def _phrasings(
    table: pd.DataFrame, split: Split, limit: int, rng: np.random.Generator
) -> Iterator[tuple[Example, str]]:
    """At most ``limit`` different prompts of candidates, drawn at random, with the behaviour of their answers."""
    part = table[table["split"] == split]
    first = np.flatnonzero(~pd.concat([part["prompt_a"], part["prompt_b"]]).duplicated())
    for place in rng.permutation(first)[:limit]:
        side, number = divmod(int(place), len(part))
        row, letter = part.iloc[number].to_dict(), SIDES[side]
        yield Example.from_row(row, letter), row[f"behaviour_{letter}"]


def _readings(
    asking: Asking, parts: Mapping[Split, _Prompts], detector: Detector, lower: Detector | None
) -> pd.DataFrame:
    """Readings of test prompts, beside scores from the input and from how sure the model is of its next token."""
    test, sides = parts["test"], {"memorized": 1, "generalized": 0}
    labels = {split: part.rows.followed.map(sides).fillna(-1).to_numpy(np.int64) for split, part in parts.items()}
    columns: dict[str, Any] = {
        f: [getattr(e, f) for e in test.examples] for f in ("prompt", "group", "family", "split")
    }
    reading = detector.read(test.states_NLD)
    columns |= _values(reading) | input_scores(asking, {s: part.examples for s, part in parts.items()}, labels)
    columns |= uncertainty_scores({split: part.uncertainty_N2 for split, part in parts.items()}, labels)
    columns["readable_from"] = [np.nan if layer is None else float(layer) for layer in reading.readable_from]
    columns["p_memorized_below"] = lower.read(test.states_NLD).p_memorized if lower else np.nan
    return test.rows.assign(**columns)


def _values(reading: Reading) -> dict[str, Any]:
    return {name: getattr(reading, name) for name in ("p_memorized", "p_conflict", "distance", "unlike")}


def _gates(cell: Cell, asking: Asking, records: Records, detector: Detector) -> Iterator[pd.DataFrame]:
    """The detector's values, and whether a gate acts, for every list that steering was judged on, in its order."""
    for toward in Toward:
        for name, entry in judged_lists(records, toward, cell.config.steering.judged_examples).items():
            states = read_states(asking, entry.examples, cell.config.pairs.site, kept=common.kept_states(cell))
            reading = detector.read(states.at_decision_NLD)
            columns: dict[str, Any] = {"direction": toward.direction, "examples": name}
            columns |= {"example": range(len(entry.examples))}
            yield pd.DataFrame(columns | _values(reading) | {"acts": reading.acts(toward, common.GATE)})


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
    found: list[tuple[Path, Any, dict[str, Any]]] = [
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
