"""Choose steering vectors on the tune split and judge them, with their controls, on the test split."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, Batch, Scores, cache_prefixes, mark_confabulations, prepare
from mnemoscope.cells import Cell, git_state
from mnemoscope.contrast import Contrast
from mnemoscope.directions import (
    CONTROLS,
    SOURCE,
    TOWARD,
    Setting,
    Sources,
    choose,
    control_draws,
    margin_gradient,
    shift_rate,
    steered,
)
from mnemoscope.stages.common import Tell, cell_model, cell_task, write_json, write_table
from mnemoscope.steering import SteeringVector
from mnemoscope.tasks import Example, Split

CONTROLLED = ("pairs", "conflict")  # the lists on which controls are drawn


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune pairs; judge them with their controls on the test split."""
    asking, config = cell_model(cell), cell.config.steering
    pairs = pd.read_parquet(cell.records / "pairs.parquet")
    behaviour = pd.read_parquet(cell.records / "behaviour.parquet")
    sources = _sources_of_directions(cell, asking, pairs)
    tables: list[pd.DataFrame] = []
    chosen: dict[str, dict[str, Any]] = {method: {} for method in config.methods}
    best: dict[str, str] = {}
    files: list[Path] = []
    commit = git_state()["commit"] or ""
    for number, direction in enumerate(TOWARD):
        tell(number, len(TOWARD), f"{direction}: choosing on the tune split")
        settings = _swept(
            cell, asking, sources, _source_phrasings(pairs, "tune", direction, config.tune_pairs), direction, tables
        )
        best[direction] = max(settings, key=lambda method: settings[method][1])
        lists = _test_lists(pairs, behaviour, direction, config.judged_examples)
        # Only what is scored again for every control is worth the memory of its caches.
        prepared = {
            name: (_with_prefixes if name in CONTROLLED else prepare)(asking, examples)
            for name, (examples, _) in lists.items()
        }
        for method, (setting, _) in settings.items():
            tell(number + 0.5, len(TOWARD), f"{direction}: {method} beside its controls on the test split")
            vector = setting.vector(sources)
            chosen[method][direction] = _chosen(setting, vector)
            tables += _judged(cell, asking, sources, setting, vector, lists, prepared)
            files += _save_vector(cell, asking, vector, direction, method, commit)
    files.append(write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)))
    files.append(write_json(cell.records / "chosen.json", {"best": best, "methods": chosen}))
    return files


def _sources_of_directions(cell: Cell, asking: Asking, pairs: pd.DataFrame) -> Sources:
    contrast = Contrast.load(cell.folder / "contrast.safetensors")
    examples = [e for d in TOWARD for e in _source_phrasings(pairs, "fit", d, cell.config.steering.gradient_pairs)]
    neurons = contrast.nmd_LD.shape[1]
    gradient_LD = margin_gradient(asking, _with_prefixes(asking, examples), cell.config.pairs.site, neurons)
    return Sources(contrast, gradient_LD)


def _source_phrasings(pairs: pd.DataFrame, split: Split, direction: str, limit: int) -> list[Example]:
    """Of each pair, the phrasing that shows the behaviour to be turned."""
    chosen = pairs[pairs["is_pair"] & (pairs["split"] == split)].head(limit)
    examples = []
    for row in chosen.itertuples():
        side = "a" if row.behaviour_a == SOURCE[direction] else "b"
        prompt, family = getattr(row, f"prompt_{side}"), getattr(row, f"family_{side}")
        examples.append(
            Example(row.item, prompt, "conflict", row.group, family, split, row.memorized, row.generalized)  # type: ignore[arg-type]
        )
    return examples


def _test_lists(
    pairs: pd.DataFrame, behaviour: pd.DataFrame, direction: str, limit: int
) -> dict[str, tuple[list[Example], list[str]]]:
    """The lists that steering is judged on, with the unsteered behaviour of each example."""
    sources = _source_phrasings(pairs, "test", direction, limit)
    lists: dict[str, tuple[list[Example], list[str]]] = {"pairs": (sources, [SOURCE[direction]] * len(sources))}
    conflict = behaviour[behaviour["kind"] == "conflict"]
    parts = {
        "conflict": conflict[conflict["behaviour"] == SOURCE[direction]],
        "conflict_rest": conflict[conflict["behaviour"] == TOWARD[direction]],
        "memory": behaviour[behaviour["kind"] == "memory"],
        "novel": behaviour[behaviour["kind"] == "novel"],
    }
    for name, part in parts.items():
        lists[name] = (
            [Example.from_row(row) for row in part.head(limit).to_dict("records")],
            part["behaviour"].head(limit).tolist(),
        )
    return {name: entry for name, entry in lists.items() if entry[0]}


def _with_prefixes(asking: Asking, examples: Sequence[Example]) -> list[Batch]:
    batches = prepare(asking, examples)
    cache_prefixes(asking, batches)
    return batches


def _swept(
    cell: Cell,
    asking: Asking,
    sources: Sources,
    examples: list[Example],
    direction: str,
    tables: list[pd.DataFrame],
) -> dict[str, tuple[Setting, float]]:
    """Try every setting on tune pairs; per method the chosen one and its margin over the worst control."""
    config = cell.config.steering
    batches = _with_prefixes(asking, examples)
    chosen: dict[str, tuple[Setting, float]] = {}
    for method in config.methods:
        rated = []
        for top in config.tops:
            for strength in config.strengths[method]:
                setting = Setting(direction, method, top, strength)
                scores = steered(asking, batches, setting.vector(sources))
                rated.append((setting, shift_rate(scores, direction)))
                before = [SOURCE[direction]] * len(examples)
                tables.append(_steering_table("sweep", setting, ("vector", 0), "pairs", examples, before, scores))
        chosen[method] = choose(asking, batches, sources, rated, control_limit=config.control_limit, seed=[cell.seed])
    return chosen


def _judged(
    cell: Cell,
    asking: Asking,
    sources: Sources,
    setting: Setting,
    vector: SteeringVector,
    lists: dict[str, tuple[list[Example], list[str]]],
    prepared: dict[str, list[Batch]],
) -> Iterator[pd.DataFrame]:
    """A chosen vector on every list, and its controls on pairs and conflicts."""
    has_format = getattr(cell_task(cell), "has_memorized_format", None)
    for name, (examples, before) in lists.items():
        scores = steered(asking, prepared[name], vector)
        if has_format and name in CONTROLLED:
            mark_confabulations(asking, examples, scores, has_format, partial(vector.apply, asking.model))
        yield _steering_table("final", setting, ("vector", 0), name, examples, before, scores)
    for control in CONTROLS:
        seed = [cell.seed, zlib.crc32(f"{setting.direction}/{setting.method}/{control}".encode())]
        for number, drawn in control_draws(
            control, vector, sources.gradient_LD.shape, cell.config.steering.draws, seed
        ):
            for name in CONTROLLED:
                if name in lists:
                    scores = steered(asking, prepared[name], drawn, margins=False)
                    yield _steering_table("final", setting, (control, number), name, *lists[name], scores)


def _steering_table(
    purpose: str,
    setting: Setting,
    role: tuple[str, int],
    name: str,
    examples: Sequence[Example],
    before: Sequence[str],
    scores: Scores,
) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "purpose": purpose,
            "direction": setting.direction,
            "method": setting.method,
            "role": role[0],
            "draw": role[1],
            "top": setting.top,
            "strength": setting.strength,
            "examples": name,
            "example": np.arange(len(examples)),
            "group": [example.group for example in examples],
            "split": "tune" if purpose == "sweep" else "test",
            "before": before,
            "after": scores.behaviour_N,
            "margin": scores.margin_N,
            "confabulated": scores.confabulated_N,
        }
    )
    words = ["purpose", "direction", "method", "role", "examples", "group", "split", "before", "after"]
    return table.astype({word: "str" for word in words})


def _chosen(setting: Setting, vector: SteeringVector) -> dict[str, Any]:
    return {
        "method": setting.method,
        "site": vector.site,
        "layers": vector.layers,
        "positions": vector.positions,
        "top": setting.top,
        "strength": setting.strength,
    }


def _save_vector(
    cell: Cell, asking: Asking, vector: SteeringVector, direction: str, method: str, commit: str
) -> list[Path]:
    bound = replace(vector.bound_to(asking.model, asking.tokenizer), task=cell.label, commit=commit)
    folder = cell.folder / "vectors"
    folder.mkdir(exist_ok=True)
    path, temporary = folder / f"{direction}-{method}.safetensors", folder / f".{direction}-{method}.tmp.safetensors"
    try:
        bound.save(temporary)
        for suffix in (".json", ".safetensors"):
            temporary.with_suffix(suffix).replace(path.with_suffix(suffix))
    finally:
        for suffix in (".json", ".safetensors"):
            temporary.with_suffix(suffix).unlink(missing_ok=True)
    return [path, path.with_suffix(".json")]
