"""The report: numbers against independent computations, bytes, and the page itself.

``write_run`` makes a run folder as the study would, without a model: behaviours come from a made-up decision margin.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import save_file

from mnemoscope.report import build_report
from mnemoscope.tasks import Example, build_task, draw

LAYERS, WIDTH = 4, 48
TOPS, STRENGTHS = (0.05, 0.2, 1.0), (0.1, 0.2, 0.4, 0.8)
SOURCE = {"to_generalized": "memorized", "to_memorized": "generalized"}
TARGET = {"to_generalized": "generalized", "to_memorized": "memorized"}


# --- a made-up run -------------------------------------------------------------------------------------------------


def write_run(folder: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    """A run with, per task, ``seeds`` cells; see ``write_cell`` for the other options."""
    folder.mkdir(parents=True, exist_ok=True)
    study = {"name": "made-up", "tasks": [{"kind": name, "options": {}} for name in tasks], "seeds": 1}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    versions = {"mnemoscope": "0.1.0", "numpy": np.__version__, "torch": "2.0"}
    manifest = {"versions": versions, "commit": "0123abc", "dirty": False, "machine": {"cpus": 2}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name, options in tasks.items():
        for seed in range(options.get("seeds", 1)):
            write_cell(folder / "cells" / f"{name}-{seed}", name, seed, **options)
    return folder


def write_cell(folder: Path, name: str, seed: int, *, effect: float = 1.0, size: int = 240, flips: bool = True, **_: Any):
    """One cell. ``effect`` scales how far states and steering separate; without ``flips`` no candidate is a pair."""
    rng = np.random.default_rng([seed, len(name)])
    task = build_task(name, {}, seed)
    conflicts = draw(task, rng, size, "conflict", "test")
    records = folder / "records"
    records.mkdir(parents=True)
    write_json(folder / "cell.json", cell_info(name, seed, task))
    write_json(records / "training_time.json", {"seconds": 61.5 + seed, "steps": 1200})
    training_rows(rng).to_parquet(records / "training.parquet")
    behaviour_rows(rng, task, conflicts, size).to_parquet(records / "behaviour.parquet")
    pairs = pair_rows(rng, task, size, flips)
    pairs.to_parquet(records / "pairs.parquet")
    test_pairs = pairs[pairs.is_pair & (pairs.split == "test")]
    probe_rows(rng, test_pairs, effect).to_parquet(records / "probes.parquet")
    steering_rows(rng, pairs, conflicts, effect).to_parquet(records / "steering.parquet")
    write_json(records / "chosen.json", chosen_settings())
    contrast_file(rng, folder, effect if flips else math.nan, len(pairs[pairs.is_pair & (pairs.split == "fit")]))


def cell_info(name: str, seed: int, task: Any) -> dict[str, Any]:
    info = {"task": name, "label": name, "seed": seed, "layers": LAYERS, "width": WIDTH, "site": "block"}
    return {**info, "memory_is_conflict": task.memory_is_conflict, "trained": True}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def training_rows(rng: np.random.Generator) -> pd.DataFrame:
    step = np.arange(0, 1300, 100)
    rise = lambda middle: 1 / (1 + np.exp(-(step - middle) / 90))  # noqa: E731
    memorized = np.clip(rise(200) - 0.55 * rise(700), 0, 1)
    generalized = np.clip(0.52 * rise(720), 0, 1)
    columns = {"step": step, "loss": 3.2 - 2.9 * rise(400), "novel_accuracy": rise(450), "recall": rise(220)}
    columns |= {"conflict_memorized": memorized, "conflict_generalized": generalized}
    columns |= {"conflict_other": 1 - memorized - generalized, "met": step >= 900, "kept": step == 1200}
    return pd.DataFrame(columns)


def behaviour_rows(rng: np.random.Generator, task: Any, conflicts: list[Example], size: int) -> pd.DataFrame:
    rows = []
    for example in [*conflicts, *draw(task, rng, size, "memory", "test"), *draw(task, rng, size, "novel", "test")]:
        margin, confabulated = math.nan, 0.0
        if example.kind == "conflict":
            margin = float(rng.normal(0.4, 3))
            behaviour = answered(rng, margin)
            confabulated = float(behaviour == "other" and rng.random() < 0.4)
            confabulated = math.nan if task.name == "inference" else confabulated
        else:
            behaviour = "correct" if rng.random() < 0.96 else "wrong"
        given = {key: getattr(example, key) for key in "item prompt kind group family split".split()}
        answers = {key: getattr(example, key) for key in ("memorized", "generalized", "answer")}
        found = {"behaviour": behaviour, "confabulated": confabulated, "margin": margin, "tie": rng.random() < 0.01}
        rows.append({**given, **answers, **found})
    return pd.DataFrame(rows)


def answered(rng: np.random.Generator, margin: float) -> str:
    if rng.random() < 0.05:
        return "other"
    return "generalized" if margin > 0 else "memorized"


def pair_rows(rng: np.random.Generator, task: Any, size: int, flips: bool) -> pd.DataFrame:
    rows = []
    for split in ("fit", "tune", "test"):
        for example in draw(task, rng, 2 * size, "conflict", split):
            again = task.rephrase(example, rng)
            margin_a = float(rng.normal(0.4, 2))
            margin_b = margin_a + float(rng.normal(0, 1.4 if flips else 0))
            a, b = answered(rng, margin_a), answered(rng, margin_b)
            b = b if flips else a
            row = {"item": example.item, "group": example.group, "split": split}
            row |= {"memorized": example.memorized, "generalized": example.generalized}
            row |= {"prompt_a": example.prompt, "family_a": example.family, "behaviour_a": a, "margin_a": margin_a}
            row |= {"prompt_b": again.prompt, "family_b": again.family, "behaviour_b": b, "margin_b": margin_b}
            rows.append({**row, "is_pair": {a, b} == {"memorized", "generalized"}})
    return pd.DataFrame(rows)


def probe_rows(rng: np.random.Generator, pairs: pd.DataFrame, effect: float) -> pd.DataFrame:
    groups = np.repeat(pairs.group.to_numpy(dtype=str), 2)
    label = np.tile([1, 0], len(pairs))
    kinds = [("input_only", -1, 0.15), *(("shuffled", n, 0.0) for n in range(LAYERS))]
    kinds += [("state", n, effect * (0.2 + 0.25 * n)) for n in range(LAYERS)]
    parts = []
    for kind, layer, pull in kinds:
        score = rng.normal(size=len(label)) + pull * (2 * label - 1)
        parts.append(pd.DataFrame({"kind": kind, "layer": layer, "group": groups, "label": label, "score": score}))
    return pd.concat(parts, ignore_index=True)


def steering_rows(rng: np.random.Generator, pairs: pd.DataFrame, conflicts: list[Example], effect: float) -> pd.DataFrame:
    """Each list of examples has margins of its own; a shift of strength s moves them by s times the role's push."""
    rows: list[dict[str, Any]] = []
    for method, gain in (("nmd", 0.6), ("nmd-relative", 1.0)):
        for direction in SOURCE:
            sign = 1 if direction == "to_generalized" else -1
            lists = {"pairs": (pairs[pairs.is_pair & (pairs.split == "tune")].group, 1.0)}
            for top in TOPS:
                for strength in STRENGTHS:
                    setting = {"purpose": "sweep", "split": "tune", "method": method, "direction": direction}
                    setting |= {"role": "vector", "draw": 0, "top": top, "strength": strength}
                    steer(rng, rows, lists, sign, effect * gain * 6 * strength * (0.4 + 0.6 * top), setting)
            test = pairs[pairs.is_pair & (pairs.split == "test")].group
            names = pd.Series([example.group for example in conflicts[:80]], dtype=str)
            lists = {"pairs": (test, 1.0), "conflict": (names, 2.5), "conflict_rest": (names, -2.5)}
            for role, draws, share in (("vector", 1, 1.0), ("random_neurons", 5, 0.05), ("gaussian", 5, 0.12)):
                for number in range(draws):
                    setting = {"purpose": "final", "split": "test", "method": method, "direction": direction}
                    setting |= {"role": role, "draw": number, "top": 0.2, "strength": 0.4}
                    steer(rng, rows, lists, sign, effect * gain * share * 1.9, setting)
                    if role == "vector":
                        keep(rng, rows, names, setting)
    return pd.DataFrame(rows, columns=STEERING_COLUMNS)


STEERING_COLUMNS = (
    "purpose direction method role draw top strength examples example group split before after margin".split()
)


def steer(rng: np.random.Generator, rows: list, lists: dict, sign: int, push: float, setting: dict) -> None:
    for examples, (groups, distance) in lists.items():
        source, target = SOURCE[setting["direction"]], TARGET[setting["direction"]]
        before = target if examples == "conflict_rest" else source
        # Examples sit at the same place whatever is done to them, as real ones do.
        place = np.random.default_rng(len(groups)).gamma(2, 0.5, size=len(groups))
        for index, group in enumerate(groups):
            inside = -distance * place[index] + push + rng.normal(0, 0.3)
            after = "other" if rng.random() < 0.02 + 0.01 * push**2 else target if inside > 0 else source
            rows.append(
                {**setting, "examples": examples, "example": index, "group": group, "before": before, "after": after}
                | {"margin": sign * inside}
            )


def keep(rng: np.random.Generator, rows: list, groups: pd.Series, setting: dict) -> None:
    for examples in ("novel", "memory"):
        for index, group in enumerate(groups):
            before = "correct" if rng.random() < 0.96 else "wrong"
            after = "wrong" if rng.random() < 0.03 else before
            row = {"examples": examples, "example": index, "group": group, "before": before, "after": after}
            rows.append({**setting, **row, "margin": math.nan})


def chosen_settings() -> dict[str, Any]:
    fixed = {"site": "block", "layers": list(range(LAYERS)), "positions": "decision", "top": 0.2, "strength": 0.4}
    methods = {m: {d: {"method": m, **fixed} for d in SOURCE} for m in ("nmd", "nmd-relative")}
    return {"best": dict.fromkeys(SOURCE, "nmd-relative"), "methods": methods}


def contrast_file(rng: np.random.Generator, folder: Path, effect: float, pairs: int) -> None:
    depth = np.linspace(0.05, 1, LAYERS)[:, None]
    nmd = effect * depth * rng.standard_t(4, size=(LAYERS, WIDTH)) * 0.1
    rho = np.clip(nmd / 1.2, -0.95, 0.95)
    p = np.where(np.isnan(nmd), nmd, np.exp(-np.abs(rho) * 40))
    arrays = {"nmd": nmd, "rho": rho, "effect_size": rho * 2, "p_family_wise": p, "p_false_discovery": p}
    arrays["state_norm"] = np.linspace(3, 9, LAYERS)
    save_file(arrays, folder / "contrast.safetensors", metadata={"site": "block", "pairs": str(pairs), "groups": "40"})
