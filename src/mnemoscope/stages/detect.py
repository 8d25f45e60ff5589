"""Fit a detector, read test prompts with it, and note where a gate would act.

A gate decides by the state at the decision position before anything is shifted, so what a gated vector does to an
example is what the ungated one does where the gate acts, and nothing elsewhere.

Shapes: N prompts, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, prepare
from mnemoscope.cells import Cell
from mnemoscope.detect import Detector, Observed, Reading
from mnemoscope.directions import TOWARD
from mnemoscope.errors import InputError
from mnemoscope.probes import fit_input_probe, fit_layer_probes
from mnemoscope.stages.common import GATE, Tell, cell_model, rng_of, save_bound, write_json, write_table
from mnemoscope.stages.lists import Records, judged_lists
from mnemoscope.stages.probe import UNCERTAINTIES, features_of_input, read_back
from mnemoscope.tasks import SPLITS, Example, Kind, Split, draw

NEITHER: tuple[Kind, ...] = ("memory", "novel")


def detection_stage(cell: Cell, tell: Tell) -> list[Path]:
    """A detector from fit and tune prompts, its readings of test prompts beside baselines, and what a gate decides."""
    config = cell.config.detection
    if not config.fitted:
        return []
    asking, records, site = cell_model(cell), Records.of(cell), cell.config.pairs.site
    parts = {}
    for done, split in enumerate(SPLITS):
        tell(done, 4, f"reading {split} prompts")
        parts[split] = _Prompts.of(cell, asking, records, split)
    observed = {split: parts[split].observed() for split in ("fit", "tune")}
    try:
        detector = Detector.fit(observed["fit"], observed["tune"], site)
    except InputError as error:  # too few prompts of a behaviour, which is no reason to lose all else
        tell(1, 1, f"no detector: {error}")
        return [write_json(cell.records / "no_detector.json", {"why": str(error)})]
    detector = replace(detector.bound_to(asking.model, asking.tokenizer, cell.label), **asking.put)
    tables = [_readings(detector, parts["test"], _baselines(asking, parts))]
    tell(3, 4, "where a gate acts")
    gates = list(_gates(cell, asking, records, detector))
    return [
        *save_bound(cell.folder, "detector", detector),
        write_table(cell.records / "detection.parquet", pd.concat(tables, ignore_index=True)),
        write_table(cell.records / "gate.parquet", pd.concat(gates, ignore_index=True)),
    ]


class _Prompts:
    """Prompts of one split with their states at the decision position and what followed them."""

    def __init__(self, asking: Asking, rows: pd.DataFrame, examples: Sequence[Example], site: Any) -> None:
        self.rows, self.examples = rows, examples
        states_ONLD, self.uncertainty_N2 = read_back(asking, prepare(asking, examples), site, [0])
        self.states_NLD = states_ONLD[0]

    @classmethod
    def of(cls, cell: Cell, asking: Asking, records: Records, split: Split) -> _Prompts:
        """Phrasings of candidates as they come, pairs or not, and questions without a conflict."""
        config, rng = cell.config.detection, rng_of(cell, f"detection/{split}")
        examples, followed, lists = [], [], []
        tables = {"conflict": records.pairs, **(records.held_out if split == "test" else {})}
        for name, table in tables.items():
            for example, behaviour in _phrasings(records, table, split, config.examples, rng):
                examples.append(example)
                followed.append(behaviour)
                lists.append(name)
        for kind in NEITHER if not records.memory_is_conflict else NEITHER[1:]:
            for example in draw(records.task, rng, config.others, kind, split):
                examples.append(example)
                followed.append("neither")
                lists.append(kind)
        rows = pd.DataFrame({"examples": lists, "followed": followed})
        return cls(asking, rows, examples, cell.config.pairs.site)

    def observed(self) -> Observed:
        """What a detector is fitted on: what was answered neither way is left out."""
        kept_N = self.rows.followed.isin(("memorized", "generalized", "neither")).to_numpy()
        return Observed(self.states_NLD[kept_N], self.rows.followed.to_numpy(dtype=object)[kept_N])


def _phrasings(
    records: Records, table: pd.DataFrame, split: Split, limit: int, rng: np.random.Generator
) -> Iterator[tuple[Example, str]]:
    """At most ``limit`` different prompts of candidates, drawn at random, with what they were answered."""
    part = table[table["split"] == split]
    first = np.flatnonzero(~pd.concat([part["prompt_a"], part["prompt_b"]]).duplicated())
    for place in rng.permutation(first)[:limit]:
        side, number = divmod(int(place), len(part))
        (row,) = part.iloc[[number]].itertuples()
        yield records.phrasing(row, "ab"[side]), getattr(row, f"behaviour_{'ab'[side]}")


def _baselines(asking: Asking, parts: Mapping[Split, _Prompts]) -> dict[str, np.ndarray]:
    """Scores of test prompts from what needs no state: the input, and how sure the model is of its next token."""
    kept = {split: part.rows.followed.isin(("memorized", "generalized")).to_numpy() for split, part in parts.items()}
    labels = {s: (p.rows.followed[kept[s]] == "memorized").to_numpy().astype(np.int64) for s, p in parts.items()}
    scores = {}
    for kind, found in features_of_input(asking, {split: part.examples for split, part in parts.items()}).items():
        probe = fit_input_probe(found["fit"][kept["fit"]], labels["fit"], found["tune"][kept["tune"]], labels["tune"])
        scores[kind] = np.asarray(probe.decision_function(found["test"]))
    for column, kind in enumerate(UNCERTAINTIES):
        values = {split: part.uncertainty_N2[:, None, [column]] for split, part in parts.items()}
        probes = fit_layer_probes(
            values["fit"][kept["fit"]], labels["fit"], values["tune"][kept["tune"]], labels["tune"]
        )
        scores[kind] = probes[0].decision_function(values["test"][:, 0])
    return scores


def _readings(detector: Detector, part: _Prompts, baselines: Mapping[str, np.ndarray]) -> pd.DataFrame:
    reading = detector.read(part.states_NLD)
    facts = {field: [getattr(e, field) for e in part.examples] for field in ("prompt", "group", "family", "split")}
    readable = [np.nan if layer is None else float(layer) for layer in reading.readable_from_N]
    columns: dict[str, Any] = facts | _said(reading) | dict(baselines) | {"readable_from": readable}
    return part.rows.assign(**columns)


def _said(reading: Reading) -> dict[str, np.ndarray]:
    return {
        "p_memorized": reading.p_memorized_N,
        "p_conflict": reading.p_conflict_N,
        "distance": reading.distance_N,
        "unlike": reading.unlike_N,
    }


def _gates(cell: Cell, asking: Asking, records: Records, detector: Detector) -> Iterator[pd.DataFrame]:
    """For every list that steering was judged on, in its order: what the detector says, and whether a gate acts."""
    config = cell.config
    for direction, toward in TOWARD.items():
        for name, entry in judged_lists(records, direction, config.steering.judged_examples).items():
            states_ONLD, _ = read_back(asking, prepare(asking, entry.examples), config.pairs.site, [0])
            reading = detector.read(states_ONLD[0])
            columns: dict[str, Any] = {"direction": direction, "examples": name, "example": range(len(entry.examples))}
            yield pd.DataFrame(columns | _said(reading) | {"acts": reading.acts(toward, GATE)})
