"""The report: numbers against independent computations, bytes, and the page itself.

``write_run`` makes a run folder as a study would, without a model: behaviours come from made-up decision margins.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from mnemoscope.executors import in_processes
from mnemoscope.report import build_report
from mnemoscope.report.captions_steering import collateral
from mnemoscope.report.examples import difference
from mnemoscope.report.html import tint
from mnemoscope.report.intervals import mean
from mnemoscope.report.records import read_run
from mnemoscope.report.resampling import shared_mean
from mnemoscope.report.results import compute_results
from mnemoscope.report.sentences import can_it_be_read, can_it_be_turned, interval, percent, points, with_interval
from mnemoscope.tasks import Example, build_task, draw

LAYERS, WIDTH = 4, 48
OFFSETS, BY_LAYER = (0, 2, 8), ("rho_rank_correlation", "nmd_cosine")
TOPS, STRENGTHS, DOSES = (0.05, 0.2, 1.0), (0.1, 0.2, 0.4, 0.8), (-1.0, 0.0, 0.5, 1.0, 2.0)
GAINS = {"nmd": 0.6, "gradient": 1.0}
CONTROLS = ("random_neurons", "low_correlation", "random_sign", "shuffled_labels", "gaussian")
ROLES = {"vector": 1.0, **dict(zip(CONTROLS, (0.05, 0.02, 0.1, 0.3, 0.12), strict=True))}
SIDES = ("generalized", "memorized")
TURNED_NUMBERS = ("shift", "stay", "other", "margin", "margin_sd")
SWEPT = ["layers", "top", "strength", "examples", "n", *TURNED_NUMBERS, "kept"]
STEERED = ["aim", "direction", "method", "site", "layers", "top", "strength", "role", "draw", "split", "examples"]
STEERED += ["example", "group", "family", "before", "after", "margin_before", "margin", "confabulated"]
SOURCE = {"to_generalized": "memorized", "to_memorized": "generalized"}
TARGET = {"to_generalized": "generalized", "to_memorized": "memorized"}


# --- a made-up run -------------------------------------------------------------------------------------------------


def write_run(folder: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    """A run with, per task, ``seeds`` cells; see ``write_cell`` for the other options."""
    folder.mkdir(parents=True, exist_ok=True)
    study = {"study": "made-up", "seeds": 1, "threads": 1, "cells": {name: {"task": name} for name in tasks}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    manifest = {"mnemoscope": "0.1.0", "versions": {"numpy": "2.0"}, "python": "3.11.2", "machine": {"processors": 2}}
    manifest |= {"commit": "0123abc", "dirty": True, "finished": "2026-01-01T00:00:00Z", "seconds": 12.5, "stages": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name, options in tasks.items():
        for seed in range(options.get("seeds", 1)):
            write_cell(folder / "cells" / f"{name}-{seed}", name, seed, **options)
    if len(tasks) > 1:
        (folder / "records").mkdir()
        seeds = {name: options.get("seeds", 1) for name, options in tasks.items()}
        steered, read = transfer_rows(list(tasks))
        for table, rows in (("seeds", seeds_rows(seeds)), ("transfer_steering", steered), ("transfer_probes", read)):
            rows.to_parquet(folder / "records" / f"{table}.parquet")
    return folder


def write_cell(
    folder: Path, name: str, seed: int, *, effect: float = 1.0, size: int = 240, flips: bool = True, **_: Any
):
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
    fit_pairs = int((pairs.is_pair & (pairs.split == "fit")).sum())
    learning_rows(fit_pairs, effect).to_parquet(records / "learning.parquet")
    halves_rows(fit_pairs, effect).to_parquet(records / "halves.parquet")
    sweep_rows(rng, pairs, conflicts, effect).to_parquet(records / "sweep.parquet")
    steering_rows(rng, pairs, conflicts, effect).to_parquet(records / "steering.parquet")
    effects_rows(rng, pairs, effect, prompted=name == "addition").to_parquet(records / "effects.parquet")
    write_json(records / "chosen.json", chosen_settings())
    write_json(folder / "probe.json", {"best_layer": 1})
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
        fields = ("item", "prompt", "kind", "group", "family", "split", "memorized", "generalized", "answer")
        given = {field: getattr(example, field) for field in fields}
        found = {"behaviour": behaviour, "confabulated": confabulated, "margin": margin, "tie": rng.random() < 0.01}
        rows.append({**given, **found})
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
    # What came later has a generator of its own, so that nothing else of the run changes with it.
    rng = np.random.default_rng(len(label))
    kinds = [("input_repeats", -1, 0, 0.2), ("entropy", -1, 0, 0.1), ("top_gap", -1, 0, 0.05)]
    kinds += [("state", n, k, effect * (0.2 + 0.25 * n) / (1 + k)) for k in OFFSETS[1:] for n in range(LAYERS)]
    for kind, layer, offset, pull in kinds:
        score = rng.normal(size=len(label)) + pull * (2 * label - 1)
        columns = {"kind": kind, "layer": layer, "offset": offset, "group": groups, "label": label, "score": score}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True).fillna({"offset": 0}).astype({"offset": "int64"})


def learning_rows(pairs: int, effect: float) -> pd.DataFrame:
    """Draws that come nearer to the end of the curve as pairs are added; nothing without pairs."""
    rng, rows = np.random.default_rng(pairs), []
    for size, draws in [*((n, 5) for n in (25, 50, 100) if n < pairs), *([(pairs, 1)] if pairs else [])]:
        for number in range(draws):
            common = {"pairs": size, "draw": number, "groups": (size + 2) // 3}
            missing = (1 - size / pairs) * rng.uniform(0.8, 1)
            for what, layer, best in (("accuracy", 3, 0.5 + 0.1 * effect), ("nmd_cosine", 3, 1), ("nmd_cosine", -1, 1)):
                value = best - missing * (best - 0.5)
                rows.append({**common, "what": what, "layer": layer, "value": value, "n": size})
    return pd.DataFrame(rows, columns=["pairs", "draw", "groups", "what", "layer", "value", "n"])


def halves_rows(pairs: int, effect: float) -> pd.DataFrame:
    rng, rows = np.random.default_rng(pairs), []
    for halving in range(20 if pairs else 0):
        near = lambda: min(1.0, 0.3 * effect + rng.normal(0, 0.05))  # noqa: E731
        for layer in range(LAYERS):
            rows += [(halving, what, layer, math.nan, near(), *[math.nan] * 3, WIDTH) for what in BY_LAYER]
        rows.append((halving, "nmd_cosine", -1, math.nan, near(), *[math.nan] * 3, LAYERS * WIDTH))
        for top in (0.05, 0.1, 0.3):
            count = math.ceil(top * LAYERS * WIDTH)
            for what, chance in (("overlap", top), ("overlap_in_layers", 1.2 * top)):
                bounds = [max(0.0, chance - 0.1), chance + 0.1]
                rows.append((halving, what, -1, top, max(top, near()), chance, *bounds, count))
    columns = ["halving", "what", "layer", "top", "value", "chance", "chance_low", "chance_high", "n"]
    return pd.DataFrame(rows, columns=columns)


def lists_of(pairs: pd.DataFrame, conflicts: list[Example], split: str) -> dict[str, tuple[pd.Series, float]]:
    """List of examples -> (group of each, how far it is from turning)."""
    paired = pairs[pairs.is_pair & (pairs.split == split)].group.reset_index(drop=True)
    groups = pd.Series([example.group for example in conflicts[:80]], dtype=str)
    return {"pairs": (paired, 1.0), "conflict": (groups, 2.5), "conflict_rest": (groups, -2.5)}


def sweep_rows(rng: np.random.Generator, pairs: pd.DataFrame, conflicts: list[Example], effect: float) -> pd.DataFrame:
    """Every method on all layers and on single ones; ``nmd`` is mapped."""
    lists, rows = lists_of(pairs, conflicts, "tune"), []
    layers = {"0-3": 1.0, **{str(n): 0.3 + 0.2 * n for n in range(LAYERS)}}
    for direction, (method, gain) in product(SOURCE, GAINS.items()):
        for (where, share_), top, strength in product(layers.items(), TOPS, STRENGTHS):
            setting = {"direction": direction, "method": method, "site": "block", "layers": where, "top": top}
            setting["strength"] = strength
            push = effect * gain * 6 * strength * (0.4 + 0.6 * top) * share_
            for examples, (groups, distance) in lists.items():
                if len(groups) and (examples == "pairs" or method == "nmd"):
                    rows.append({**setting, "examples": examples, **swept(rng, groups, distance, direction, push)})
            for examples in ("memory", "novel") if method == "nmd" else ():
                kept = {"n": 80, "kept": max(0.0, 1 - 0.1 * push), **dict.fromkeys(TURNED_NUMBERS, math.nan)}
                rows += [{**setting, "examples": examples, **kept}] * (2 if where == "0-3" else 1)  # by both aims
    return pd.DataFrame(rows, columns=["direction", "method", "site", *SWEPT])


def swept(rng: np.random.Generator, groups: pd.Series, distance: float, direction: str, push: float) -> dict[str, Any]:
    inside = push - distance * np.random.default_rng(len(groups)).gamma(2, 0.5, size=len(groups))
    other = float((rng.random(len(groups)) < 0.02 * push).mean())
    turned = float((inside > 0).mean()) * (1 - other)
    if distance < 0:
        return {"n": len(groups), "kept": turned, **dict.fromkeys(TURNED_NUMBERS, math.nan)}
    sign = 1 if direction == "to_generalized" else -1
    margins = {"margin": sign * float(inside.mean()), "margin_sd": float(inside.std())}
    return {"n": len(groups), "shift": turned, "stay": 1 - turned - other, "other": other, "kept": math.nan, **margins}


def steering_rows(
    rng: np.random.Generator, pairs: pd.DataFrame, conflicts: list[Example], effect: float
) -> pd.DataFrame:
    """Each list of examples has margins of its own; a shift of strength s moves them by s times the role's push."""
    lists, rows = lists_of(pairs, conflicts, "test"), []
    everything = {**lists, "pairs_unreachable": (lists["pairs"][0][:9], 4.0), "kept": (lists["conflict"][0], 0.0)}
    for (method, gain), direction, (aim, more) in product(GAINS.items(), SOURCE, (("pairs", 1.0), ("conflict", 2.0))):
        for role, share_ in ROLES.items():
            for number in range(1 if role == "vector" else 3):
                setting = {"aim": aim, "direction": direction, "method": method, "site": "block", "layers": "0-3"}
                setting |= {"top": 0.2, "strength": 0.4 * more, "role": role, "draw": number, "split": "test"}
                judged = everything if role == "vector" else {aim: lists[aim]}
                steer(rng, rows, judged, effect * gain * share_ * 1.9 * more, setting)
    return pd.DataFrame(rows, columns=STEERED)


def steer(rng: np.random.Generator, rows: list, lists: dict, push: float, setting: dict) -> None:
    source, target = SOURCE[setting["direction"]], TARGET[setting["direction"]]
    sign = 1 if target == "generalized" else -1
    for examples, (groups, distance) in lists.items():
        if examples == "kept":
            keep(rng, rows, groups, setting)
            continue
        if examples == "pairs_unreachable" and (setting["direction"], setting["aim"]) != ("to_memorized", "pairs"):
            continue
        before = target if examples == "conflict_rest" else source
        # Examples sit at the same place whatever is done to them, as real ones do.
        place = -distance * np.random.default_rng(len(groups)).gamma(2, 0.5, size=len(groups))
        for index, group in enumerate(groups):
            inside = place[index] + push + rng.normal(0, 0.3)
            after = "other" if rng.random() < 0.02 + 0.01 * push**2 else target if inside > 0 else source
            is_vector = setting["role"] == "vector"
            row = {"examples": examples, "example": index, "group": group, "family": "a", "before": before}
            row |= {"after": after, "margin_before": sign * place[index]}
            row |= {"margin": sign * inside if is_vector else math.nan}
            row |= {"confabulated": float(after == "other" and index % 2) if is_vector else math.nan}
            rows.append({**setting, **row})


def keep(rng: np.random.Generator, rows: list, groups: pd.Series, setting: dict) -> None:
    for examples in ("novel", "memory"):
        for index, group in enumerate(groups):
            before = "correct" if rng.random() < 0.96 else "wrong"
            after = "wrong" if rng.random() < 0.03 else before
            row = {"examples": examples, "example": index, "group": group, "family": "a", "before": before}
            row |= {"after": after, **dict.fromkeys(("margin_before", "margin", "confabulated"), math.nan)}
            rows.append({**setting, **row})


def effects_rows(rng: np.random.Generator, pairs: pd.DataFrame, effect: float, prompted: bool) -> pd.DataFrame:
    """Interventions on both sides of the test pairs; only a task of its own asks in words."""
    groups = pairs[pairs.is_pair & (pairs.split == "test")].group.to_numpy(dtype=str)
    place = np.random.default_rng(len(groups)).gamma(2, 0.5, size=len(groups))
    parts: list[pd.DataFrame] = []

    def add(side: str, push: float, **facts: Any) -> None:
        sign = 1 if side == "generalized" else -1
        margin = sign * place + push + rng.normal(0, 0.2, size=len(groups))
        columns = {**dict.fromkeys(("direction", "method", "site", "layers", "role"), ""), "dose": math.nan, "draw": 0}
        columns |= {**facts, "side": side, "example": np.arange(len(groups)), "group": groups}
        columns |= {"after": np.where(margin > 0, "generalized", "memorized"), "margin_before": sign * place}
        parts.append(pd.DataFrame({**columns, "margin": margin}))

    for direction in SOURCE:
        side, sign = SOURCE[direction], 1 if direction == "to_generalized" else -1
        for method, gain in GAINS.items():
            facts = {"direction": direction, "method": method, "site": "block"}
            for dose, (role, draws) in product(DOSES, (("vector", 1), ("gaussian", 2))):
                for draw_ in range(draws):
                    push = sign * effect * gain * dose * (1 if role == "vector" else 0.1)
                    add(side, push, what="dose", **facts, dose=dose, role=role, draw=draw_)
            for top, (role, draws), each in product((0.05, 0.3), (("vector", 1), ("random_neurons", 2)), SIDES):
                for draw_ in range(draws):
                    lost = (-1 if each == "generalized" else 1) * effect * gain * top * (3 if role == "vector" else 0.5)
                    add(each, lost, what="ablation", **facts, dose=top, role=role, draw=draw_)
        for site, layer in product(("block", "mlp"), range(LAYERS)):
            add(side, sign * 0.8 * layer, what="patch", direction=direction, site=site, layers=str(layer))
        if prompted:
            add(side, sign * 0.4, what="prompt", direction=direction)
    return pd.concat(parts, ignore_index=True)


def chosen_settings() -> dict[str, Any]:
    """Conflicts are turned to memory by another method than pairs."""
    fixed = {"site": "block", "layers": list(range(LAYERS)), "positions": "decision", "top": 0.2}
    settings = {}
    for aim, strength in (("pairs", 0.4), ("conflict", 0.8)):
        facts = {**fixed, "strength": strength, "alpha": math.nan, "within_limits": aim == "pairs"}
        methods = {method: {d: {"method": method, **facts} for d in SOURCE} for method in GAINS}
        settings[aim] = {"best": dict.fromkeys(SOURCE, "gradient"), "methods": methods}
    settings["conflict"]["best"]["to_memorized"] = "nmd"
    return settings


def seeds_rows(labels: dict[str, int]) -> pd.DataFrame:
    rows = []
    for label, count_ in labels.items():
        for a, b in combinations(range(count_), 2):
            common = {"label": label, "seed_a": a, "seed_b": b, "site": "block", "shared_initialization": a == 0}
            by_chance = {"chance_low": -0.1, "chance": 0.0, "chance_high": 0.1}
            for what, layer in product(("rank_correlation", "aligned_cosine"), range(-1, LAYERS)):
                value = 0.3 + 0.1 * layer + 0.01 * b
                rows.append({**common, "what": what, "layer": layer, "top": math.nan, "value": value, **by_chance})
            for top in (0.05, 0.3):
                rows.append({**common, "what": "overlap", "layer": -1, "top": top, "value": top + 0.2, **by_chance})
    return pd.DataFrame(rows)


def transfer_rows(labels: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng, steered, read = np.random.default_rng(5), [], []
    for source, target, seed in product(labels, labels, range(2)):
        near = 0.8 if source == target else 0.3
        common = {"source": source, "target": target, "seed": seed}
        groups = [f"g{n % 15}" for n in range(60)]
        for direction, method, role in product(SOURCE, ("best", "nmd"), ("vector", "gaussian")):
            hit = rng.random(60) < (near if role == "vector" else 0.05)
            after = np.where(hit, TARGET[direction], SOURCE[direction])
            facts = {**common, "direction": direction, "method": method, "role": role, "draw": 0}
            steered.append(pd.DataFrame({**facts, "example": np.arange(60), "group": groups, "after": after}))
        for layer in range(LAYERS):
            label = np.tile([1, 0], 30)
            score = rng.normal(size=60) + near * layer * (2 * label - 1)
            read.append(pd.DataFrame({**common, "layer": layer, "group": groups, "label": label, "score": score}))
    return pd.concat(steered, ignore_index=True), pd.concat(read, ignore_index=True)


def contrast_file(rng: np.random.Generator, folder: Path, effect: float, pairs: int) -> None:
    depth = np.linspace(0.05, 1, LAYERS)[:, None]
    nmd = effect * depth * rng.standard_t(4, size=(LAYERS, WIDTH)) * 0.1
    rho = np.clip(nmd / 1.2, -0.95, 0.95)
    p = np.where(np.isnan(nmd), nmd, np.exp(-np.abs(rho) * 40))
    arrays = {"nmd": nmd, "rho": rho, "effect_size": rho * 2, "p_family_wise": p, "p_false_discovery": p}
    arrays["state_norm"] = np.linspace(3, 9, LAYERS)
    save_file(arrays, folder / "contrast.safetensors", metadata={"site": "block", "pairs": str(pairs), "groups": "40"})


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one task, and one of another; reported."""
    tasks = {"inference": {"seeds": 2, "size": 120}, "addition": {"effect": 2.5, "size": 120}}
    folder = write_run(tmp_path_factory.mktemp("report") / "run", tasks)
    assert build_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def nothing_flips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a single pair; reported."""
    folder = write_run(tmp_path_factory.mktemp("report") / "nothing", {"inference": {"flips": False, "size": 60}})
    build_report(folder)
    return folder


def tasks_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())["tasks"]


def rows_of(run: Path, cell: str, table: str) -> list[dict[str, Any]]:
    return pd.read_parquet(run / "cells" / cell / "records" / f"{table}.parquet").to_dict("records")


def share(rows: list[dict[str, Any]], test: Callable[[dict[str, Any]], bool]) -> float:
    return sum(test(row) for row in rows) / len(rows)


def agrees(entry: dict[str, Any], value: float, n: int) -> None:
    """The estimate is ``value``, rests on ``n`` and lies within its interval."""
    assert entry["estimate"] == pytest.approx(value, abs=1e-12)
    assert entry["n"] == n
    assert entry["low"] <= value <= entry["high"]


def test_behaviour_and_pairs_are_counted_on_the_test_split(run: Path) -> None:
    task, rows = tasks_of(run)["addition"], rows_of(run, "addition-0", "behaviour")
    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("conflict", "memory", "novel")}
    for key, kind in (("recall", "memory"), ("novel_accuracy", "novel")):
        agrees(task["behaviour"][key], share(of_kind[kind], lambda r: r["behaviour"] == "correct"), len(of_kind[kind]))
    for behaviour in ("memorized", "generalized", "other"):
        expected = share(of_kind["conflict"], lambda r, b=behaviour: r["behaviour"] == b)
        agrees(task["behaviour"]["conflict"][behaviour], expected, len(of_kind["conflict"]))
    confabulated = sum(row["confabulated"] for row in of_kind["conflict"]) / len(of_kind["conflict"])
    agrees(task["behaviour"]["conflict"]["confabulated"], confabulated, len(of_kind["conflict"]))
    pairs = rows_of(run, "addition-0", "pairs")
    for split, counts in task["pairs"]["by_split"].items():
        part = [row for row in pairs if split in ("all", row["split"])]
        assert (counts["candidates"], counts["pairs"]) == (len(part), sum(row["is_pair"] for row in part))
        assert counts["groups"] == len({row["group"] for row in part if row["is_pair"]})
        agrees(counts["yield"], share(part, lambda r: r["is_pair"]), len(part))
    assert (
        task["pairs"]["pairs"] == task["pairs"]["by_split"]["test"]["pairs"] < task["pairs"]["by_split"]["all"]["pairs"]
    )


def test_contrast_and_probes_by_layer(run: Path) -> None:
    task, arrays = tasks_of(run)["addition"], load_file(run / "cells" / "addition-0" / "contrast.safetensors")
    for layer in range(LAYERS):
        nmd = [abs(x) for x in arrays["nmd"][layer].tolist()]
        assert task["contrast"]["mean_abs_nmd"][layer] == pytest.approx(sum(nmd) / len(nmd))
        assert task["contrast"]["max_abs_rho"][layer] == max(abs(x) for x in arrays["rho"][layer].tolist())
        passed = [p <= 0.05 for p in arrays["p_family_wise"][layer].tolist()]
        assert task["contrast"]["significant_fraction"][layer] == pytest.approx(sum(passed) / len(passed))
    rows = rows_of(run, "addition-0", "probes")
    right = {
        (kind, layer): [
            (row["score"] > 0) == (row["label"] == 1)
            for row in rows
            if (row["kind"], row["layer"], row["offset"]) == (kind, layer, 0)
        ]
        for kind, layer in {(row["kind"], row["layer"]) for row in rows}
    }
    alone, probe = right["input_only", -1], task["probe"]
    agrees(probe["input_only"], sum(alone) / len(alone), len(alone))
    blind = [hit for (kind, _), hits in right.items() if kind == "shuffled" for hit in hits]
    agrees(probe["shuffled"], sum(blind) / len(blind), len(blind))
    for layer in range(LAYERS):
        state = right["state", layer]
        agrees(probe["accuracy"][layer], sum(state) / len(state), len(state))
        agrees(probe["minus_input_only"][layer], (sum(state) - sum(alone)) / len(state), len(state))
        scored = [row for row in rows if (row["kind"], row["layer"], row["offset"]) == ("state", layer, 0)]
        above, below = ([row["score"] for row in scored if row["label"] == label] for label in (1, 0))
        wins = sum((a > b) + (a == b) / 2 for a in above for b in below)
        agrees(probe["auroc"][layer], wins / len(above) / len(below), len(scored))
    assert set(probe["best"]["picked"]) <= set(range(LAYERS))


def test_best_layer_is_not_chosen_on_what_it_is_scored_on(tmp_path: Path) -> None:
    """With layers that are coins, the best of many is above one half, and the cross-fitted score is not."""
    run = write_run(tmp_path / "coins", {"inference": {"size": 120}})
    path = run / "cells" / "inference-0" / "records" / "probes.parquet"
    table = pd.read_parquet(path)
    table["score"] = np.random.default_rng(3).normal(size=len(table))
    table.to_parquet(path)
    probe = compute_results(read_run(run))["tasks"]["inference"]["probe"]
    best = max(entry["estimate"] for entry in probe["accuracy"])
    assert probe["best"]["accuracy"]["estimate"] < best
    assert probe["best"]["accuracy"]["low"] < 0.5 < probe["best"]["accuracy"]["high"]


@pytest.mark.parametrize("direction", list(SOURCE))
@pytest.mark.parametrize("examples", ["pairs", "conflict"])
def test_steering_shares_controls_and_differences(run: Path, direction: str, examples: str) -> None:
    block = tasks_of(run)["addition"]["steering"][direction]
    assert (block["chosen"]["method"], block["chosen"]["strength"]) == ("gradient", 0.4)
    assert block["chosen_conflict"]["strength"] == 0.8
    wanted = {"aim": examples, "method": "gradient", "direction": direction, "examples": examples}
    rows = [r for r in rows_of(run, "addition-0", "steering") if all(r[key] == value for key, value in wanted.items())]
    by_role = {role: [row for row in rows if row["role"] == role] for role in ROLES}
    for role, part in by_role.items():
        shares = block[examples] if role == "vector" else block["controls"][role][examples]
        for key, after in (("shift", TARGET[direction]), ("stay", SOURCE[direction]), ("other", "other")):
            agrees(shares[key], share(part, lambda r, a=after: r["after"] == a), len(part))
    shift = block[examples]["shift"]["estimate"]
    for role in CONTROLS:
        draws = [[row for row in by_role[role] if row["draw"] == draw_] for draw_ in range(3)]
        each = [share(part, lambda r: r["after"] == TARGET[direction]) for part in draws]
        control = block["controls"][role]
        assert control["worst"][examples]["shift"]["estimate"] == pytest.approx(max(each))
        agrees(block["minus_control"][role][examples], shift - sum(each) / 3, len(by_role["vector"]))


def test_the_worst_draw_of_several_seeds_is_the_worst_of_all(run: Path) -> None:
    task = tasks_of(run)["inference"]
    assert len(task["seeds"]) > 1
    for direction, control, aim in product(SOURCE, CONTROLS, ("pairs", "conflict")):
        blocks = [task, *task["per_seed"].values()]
        worst, *each = (
            b["steering"][direction]["controls"][control]["worst"][aim]["shift"]["estimate"] for b in blocks
        )
        assert worst == max(each)


@pytest.mark.parametrize("direction", list(SOURCE))
@pytest.mark.parametrize(("key", "aim"), [("collateral", "pairs"), ("collateral_conflict", "conflict")])
def test_collateral_is_a_paired_change_and_undefined_where_memory_is_the_conflict(
    run: Path, direction: str, key: str, aim: str
) -> None:
    for name in ("inference", "addition"):
        block = tasks_of(run)[name]["per_seed"]["0"]["steering"][direction][key]
        wanted = {"aim": aim, "method": "gradient", "direction": direction, "role": "vector"}
        rows = [
            r for r in rows_of(run, f"{name}-0", "steering") if all(r[key] == value for key, value in wanted.items())
        ]
        for examples, good in (("novel", "correct"), ("memory", "correct"), ("conflict_rest", TARGET[direction])):
            part = [row for row in rows if row["examples"] == examples]
            change = share(part, lambda r, g=good: r["after"] == g) - share(part, lambda r, g=good: r["before"] == g)
            if (name, examples, direction) == ("addition", "memory", "to_generalized"):
                assert math.isnan(block[examples]["estimate"])
            else:
                agrees(block[examples], change, len(part))
    assert "its memory examples are the conflicts themselves" in (run / "report.html").read_text()


def test_what_is_judged_apart(run: Path) -> None:
    """Conflicts under the setting for pairs, phrasings that lost the stored key, and the best method for conflicts."""
    steering = tasks_of(run)["addition"]["steering"]
    rows = [row for row in rows_of(run, "addition-0", "steering") if row["role"] == "vector"]
    for direction, block in steering.items():
        ours = [r for r in rows if (r["aim"], r["method"], r["direction"]) == ("pairs", "gradient", direction)]
        of_list = {
            name: [r for r in ours if r["examples"] == name] for name in ("pairs", "conflict", "pairs_unreachable")
        }
        expected = share(of_list["conflict"], lambda r, d=direction: r["after"] == TARGET[d])
        agrees(block["conflict_at_chosen"]["shift"], expected, len(of_list["conflict"]))
        made_up = sum(row["confabulated"] for row in of_list["pairs"]) / len(of_list["pairs"])
        agrees(block["confabulated"], made_up, len(of_list["pairs"]))
        lost = block["pairs_unreachable"]["shift"]
        assert lost["n"] == len(of_list["pairs_unreachable"]) == (9 if direction == "to_memorized" else 0)
        assert math.isnan(lost["estimate"]) == (direction == "to_generalized")
        other_best = block.get("best_conflict", {}).get("chosen_conflict", {}).get("method")
        assert other_best == ("nmd" if direction == "to_memorized" else None)


@pytest.mark.parametrize("direction", list(SOURCE))
def test_a_uniform_push_is_the_mean_effect_given_to_every_pair(run: Path, direction: str) -> None:
    found, sign = tasks_of(run)["addition"]["logit"][direction], 1 if direction == "to_generalized" else -1
    wanted = {"aim": "pairs", "method": "gradient", "direction": direction, "role": "vector", "examples": "pairs"}
    rows = [r for r in rows_of(run, "addition-0", "steering") if all(r[key] == value for key, value in wanted.items())]
    push = sum(row["margin"] - row["margin_before"] for row in rows) / len(rows)
    agrees(found["push"], push, len(rows))
    agrees(found["shift"], share(rows, lambda r: sign * (r["margin_before"] + push) > 0), len(rows))
    agrees(found["vector"], share(rows, lambda r: sign * r["margin"] > 0), len(rows))
    beyond = found["vector"]["estimate"] - found["shift"]["estimate"]
    assert found["vector_minus_logit"]["estimate"] == pytest.approx(beyond)


@pytest.mark.parametrize("direction", list(SOURCE))
def test_doses_patches_and_words(run: Path, direction: str) -> None:
    task, rows = tasks_of(run)["addition"], pd.read_parquet(run / "cells/addition-0/records/effects.parquet")
    rows = rows[rows.direction == direction]
    for dose, role in product(DOSES, ("vector", "gaussian")):
        part = rows[(rows.what == "dose") & (rows.method == "nmd") & (rows.dose == dose) & (rows.role == role)]
        found = task["dose"]["nmd"][direction][role][f"{dose:g}"]
        agrees(found["margin"], part.margin.mean(), len(part))
        agrees(found["shift"], (part.after == TARGET[direction]).mean(), len(part))
    for site, layer in product(("block", "mlp"), range(LAYERS)):
        part = rows[(rows.what == "patch") & (rows.site == site) & (rows.layers == str(layer))]
        shift = task["patch"][direction][site][layer]["shift"]
        agrees(shift, (part.after == TARGET[direction]).mean(), len(part))
    part = rows[rows.what == "prompt"]
    agrees(task["prompt"][direction]["shift"], (part.after == TARGET[direction]).mean(), len(part))
    assert tasks_of(run)["inference"]["prompt"] == {}


def test_ablation_is_the_separation_lost_pair_by_pair(run: Path) -> None:
    found = tasks_of(run)["addition"]["ablation"]["gradient"]["to_memorized"]["0.3"]
    rows = pd.read_parquet(run / "cells/addition-0/records/effects.parquet")
    rows = rows[(rows.what == "ablation") & (rows.method == "gradient") & (rows.direction == "to_memorized")]
    rows = rows[rows.dose == 0.3]
    lost = {}
    for role in ("vector", "random_neurons"):
        sides = {side: rows[(rows.role == role) & (rows.side == side)] for side in SIDES}
        apart = {c: sides["generalized"][c].mean() - sides["memorized"][c].mean() for c in ("margin_before", "margin")}
        lost[role] = apart["margin_before"] - apart["margin"]
        pairs = sides["memorized"].example.nunique()
        agrees(found[role]["before"], apart["margin_before"], pairs)
        agrees(found[role]["after"], apart["margin"], pairs)
        agrees(found[role]["lost"], lost[role], pairs)
        for side, part in sides.items():
            agrees(found[role]["kept"][side], (part.after == side).mean(), len(part))
    assert found["minus_random"]["estimate"] == pytest.approx(lost["vector"] - lost["random_neurons"])


def test_a_sweep_has_a_row_per_setting_and_list_and_the_seeds_that_tried_it(run: Path) -> None:
    keys = ["direction", "method", "site", "layers", "top", "strength", "examples"]
    rows = {tuple(row[key] for key in keys): row for row in tasks_of(run)["inference"]["sweep"]}
    tables = [pd.read_parquet(run / f"cells/inference-{seed}/records/sweep.parquet") for seed in (0, 1)]
    settings = {tuple(row[key] for key in keys) for table in tables for row in table.to_dict("records")}
    assert set(rows) == settings
    for examples, number in (("pairs", "margin"), ("memory", "kept")):
        place = ("to_memorized", "nmd", "block", "0-3", 0.2, 0.8, examples)
        each = [table[(table[keys] == list(place)).all(axis=1)].iloc[0] for table in tables]
        found = rows[place]
        assert found[number]["estimate"] == pytest.approx(sum(row[number] for row in each) / 2)
        assert (found["seeds"], found[number]["n"]) == (2, sum(row["n"] for row in each))
        assert ("shift" in found) != ("kept" in found)


def test_layers_are_compared_at_one_strength(run: Path) -> None:
    task = tasks_of(run)["addition"]
    found = task["by_layer"]["shift"]["to_generalized"]
    table = pd.read_parquet(run / "cells/addition-0/records/sweep.parquet")
    table = table[
        (table.direction == "to_generalized") & (table.examples == "pairs") & (table.strength == found["strength"])
    ]
    for method, layer in product(GAINS, range(LAYERS)):
        best = table[(table.method == method) & (table.layers == str(layer))]["shift"].max()
        assert found["methods"][method]["block"][layer]["estimate"] == best
    assert task["by_layer"]["max_abs_rho"] == task["contrast"]["max_abs_rho"]


def test_seeds_and_transfer_are_set_beside_chance(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    rows = pd.read_parquet(run / "records" / "seeds.parquet")
    assert list(results["seeds"]) == ["inference"]
    for row in results["seeds"]["inference"]:
        part = rows[(rows.what == row["what"]) & (rows.layer == row["layer"])]
        part = part if math.isnan(row["top"]) else part[part.top == row["top"]]
        assert row["value"]["estimate"] == pytest.approx(part.value.mean())
        assert (row["chance"]["low"], row["chance"]["high"]) == pytest.approx((-0.1, 0.1))
    rows = pd.read_parquet(run / "records" / "transfer_steering.parquet")
    rows = rows[(rows.source == "inference") & (rows.target == "addition") & (rows.method == "best")]
    found = results["transfer"]["inference"]["addition"]
    for direction, (name, role) in product(SOURCE, (("shift", "vector"), ("gaussian", "gaussian"))):
        part = rows[(rows.direction == direction) & (rows.role == role)]
        assert found[direction]["best"][name]["estimate"] == pytest.approx((part.after == TARGET[direction]).mean())
    states = pd.read_parquet(run / "records" / "transfer_probes.parquet")
    # The layer that the tune split chose where the probe comes from.
    part = states[(states.source == "inference") & (states.target == "addition") & (states.layer == 1)]
    assert found["probe_layer"] == 1
    assert found["probe"]["estimate"] == pytest.approx(((part.score > 0) == (part.label == 1)).mean())


def test_means_that_share_resamples_have_the_intervals_of_those_that_do_not() -> None:
    rng = np.random.default_rng(0)
    groups, values = rng.integers(0, 40, 300), rng.random(300) < 0.3
    ours, theirs = shared_mean(values, groups, "a"), mean(values, groups, "b")
    assert (ours.estimate, ours.n) == (theirs.estimate, theirs.n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert shared_mean(np.zeros(300), groups, "a") == mean(np.zeros(300), groups, "a")
    assert math.isnan(shared_mean([], [], "a").estimate)


def test_seeds_are_averaged_and_their_counts_add_up(run: Path) -> None:
    task = tasks_of(run)["inference"]
    seeds = [task["per_seed"][str(seed)] for seed in task["seeds"]]
    assert task["seeds"] == [0, 1]
    assert task["training"] == {"seconds": [61.5, 62.5], "steps": [1200, 1200]}
    for path in (
        ("behaviour", "conflict", "memorized"),
        ("pairs", "yield"),
        ("steering", "to_memorized", "pairs", "shift"),
    ):
        whole, parts = task, seeds
        for key in path:
            whole, parts = whole[key], [part[key] for part in parts]
        assert whole["estimate"] == pytest.approx(sum(part["estimate"] for part in parts) / 2)
        assert whole["n"] == sum(part["n"] for part in parts)
        half = 12.7062047 * abs(parts[0]["estimate"] - parts[1]["estimate"]) / 2  # t at 0.975, one degree of freedom
        assert whole["high"] == pytest.approx(whole["estimate"] + half)
    assert task["pairs"]["pairs"] == sum(part["pairs"]["pairs"] for part in seeds)
    nmd = np.mean([part["contrast"]["mean_abs_nmd"] for part in seeds], axis=0)
    assert task["contrast"]["mean_abs_nmd"] == pytest.approx(nmd.tolist())


R, NUMBERS, TEXT = {"estimate", "low", "high", "n"}, (int, float), str
S = {"shift": R, "stay": R, "other": R}
D = {
    "chosen": {"method": TEXT, "site": TEXT, "layers": list, "positions": TEXT, "top": float, "strength": float},
    "pairs": S,
    "conflict": S,
    "controls": {name: {"pairs": S, "conflict": S, "worst": {"pairs": S, "conflict": S}} for name in CONTROLS},
    "minus_control": {name: {"pairs": R, "conflict": R} for name in CONTROLS},
    **{key: {"novel": R, "memory": R, "conflict_rest": R} for key in ("collateral", "collateral_conflict")},
    "pairs_unreachable": S,
    "conflict_at_chosen": S,
    "confabulated": R,
}
D["chosen_conflict"] = D["chosen"] = {**D["chosen"], "alpha": float, "within_limits": bool}
M = {"to_generalized": D, "to_memorized": D}
SCHEMA = {
    "seeds": [int],
    "training": {"seconds": [NUMBERS], "steps": [NUMBERS]},
    "behaviour": {
        "recall": R,
        "novel_accuracy": R,
        "conflict": dict.fromkeys(("memorized", "generalized", "other", "confabulated"), R),
    },
    "pairs": {"candidates": int, "pairs": int, "yield": R, "groups": int},
    "contrast": {
        "site": TEXT,
        "layers": [int],
        "mean_abs_nmd": [float],
        "max_abs_rho": [float],
        "significant_fraction": [float],
    },
    "probe": {"site": TEXT, "layers": [int], "accuracy": [R], "auroc": [R], "input_only": R, "shuffled": R},
    "steering": M,
    "steering_by_method": dict.fromkeys(GAINS, M),
}


def conforms(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, dict):
        for key, inner in schema.items():
            assert key in value, f"{where}.{key}"
            conforms(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, set):
        assert set(value) == schema, where
        assert all(isinstance(value[key], NUMBERS) for key in schema), where
        assert isinstance(value["n"], int), where
    elif isinstance(schema, list):
        assert value, where
        for inner in value:
            conforms(inner, schema[0], f"{where}[]")
    else:
        assert isinstance(value, schema), where


def test_results_have_the_keys_that_checks_read(run: Path, nothing_flips: Path) -> None:
    for folder in (run, nothing_flips):
        results = json.loads((folder / "results.json").read_text())
        assert (results["schema"], results["study"]) == (1, "made-up")
        for name, task in results["tasks"].items():
            conforms(task, SCHEMA, name)
    assert list(tasks_of(run)) == ["inference", "addition"]  # as the study orders them


# --- bytes, errors, imports ----------------------------------------------------------------------------------------


def test_equal_records_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "elsewhere" / "again")
    before = [(again / name).read_bytes() for name in ("results.json", "report.html")]
    manifest = json.loads((again / "manifest.json").read_text())
    write_json(again / "manifest.json", manifest | {"finished": "2031-01-01T00:00:00Z", "seconds": 99.0})
    for name in ("results.json", "report.html"):
        (again / name).unlink()
    build_report(again)
    assert [(again / name).read_bytes() for name in ("results.json", "report.html")] == before
    assert not list(again.glob(".*.tmp"))


def test_processes_in_parallel_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    for name in ("results.json", "report.html"):
        (again / name).unlink()
    with in_processes(2) as parallel:
        build_report(again, parallel)
    for name in ("results.json", "report.html"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


RECORDS = ("training", "behaviour", "pairs", "probes", "learning", "halves", "sweep", "steering", "effects")
BROKEN = [f"records/{name}.parquet" for name in RECORDS]
BROKEN += ["records/chosen.json", "records/training_time.json", "contrast.safetensors", "cell.json"]


@pytest.mark.parametrize(
    ("file", "damage"),
    [(file, damage) for file in BROKEN for damage in ("cut", "gone") if (file, damage) != ("cell.json", "gone")],
)
def test_a_damaged_record_is_named_in_one_line(run: Path, tmp_path: Path, file: str, damage: str) -> None:
    broken = shutil.copytree(run, tmp_path / "broken")
    path = broken / "cells" / "addition-0" / file
    before = (broken / "report.html").read_bytes()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=re.escape(file)) as error:
        build_report(broken)
    assert "\n" not in str(error.value)
    assert (broken / "report.html").read_bytes() == before


def test_cells_that_are_only_trained_are_no_part_of_the_report(run: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(run, tmp_path / "mine", ignore=shutil.ignore_patterns("inference-1", "html"))
    donor = mine / "cells" / "inference-0"
    write_json(donor / "cell.json", json.loads((donor / "cell.json").read_text()) | {"analysed": False})
    shutil.rmtree(donor / "records")
    shutil.rmtree(mine / "records")
    results = compute_results(read_run(mine))
    assert (list(results["tasks"]), results["seeds"], results["transfer"]) == (["addition"], {}, {})


def test_a_missing_column_is_named(run: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(run, tmp_path / "broken")
    path = broken / "cells" / "addition-0" / "records" / "pairs.parquet"
    pd.read_parquet(path).drop(columns="margin_b").to_parquet(path)
    with pytest.raises(ValueError, match=r"pairs\.parquet: column 'margin_b' is missing"):
        build_report(broken)


def test_probes_of_other_states_are_refused(run: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(run, tmp_path / "broken")
    path = broken / "cells" / "addition-0" / "records" / "probes.parquet"
    table = pd.read_parquet(path)
    table.drop(index=table.index[(table.kind == "state") & (table.layer == 2)][0]).to_parquet(path)
    with pytest.raises(ValueError, match=r"probes\.parquet: the states of layer 2, offset 0 are not those of 'inp"):
        build_report(broken)


def test_nothing_of_torch_is_imported(nothing_flips: Path) -> None:
    code = (
        "import sys, pathlib; from mnemoscope.report import build_report; build_report(pathlib.Path(sys.argv[1])); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(nothing_flips)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every opening tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(params=["run", "nothing_flips"])
def page(request: pytest.FixtureRequest) -> tuple[str, Page]:
    text = (request.getfixturevalue(request.param) / "report.html").read_text()
    return text, Page(text)


def test_the_page_loads_nothing(page: tuple[str, Page]) -> None:
    text, parsed = page
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    assert re.findall(r"@import|url\((?!#)|https?:", text) == []


def test_the_page_can_be_read_aloud_and_linked(page: tuple[str, Page]) -> None:
    _, parsed = page
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    identifiers = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))
    links = {str(attributes["href"])[1:] for tag, attributes in parsed.tags if tag == "a"}
    assert links
    assert links <= set(identifiers)
    drawings = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    assert drawings
    assert all(a.get("role") == "img" and len(a.get("aria-label") or "") > 30 for a in drawings)
    assert all(attributes.get("scope") for tag, attributes in parsed.tags if tag == "th")


def test_undefined_numbers_say_why(nothing_flips: Path) -> None:
    text = (nothing_flips / "report.html").read_text()
    assert text.count("None of 360\u00a0candidates flipped, so there are no pairs to compare.") >= 3
    assert not re.findall(r"\bnan\b", re.sub(r"<[^>]*>", " ", text), flags=re.IGNORECASE)


def test_a_users_own_file_on_a_model_that_was_not_trained_here(run: Path, tmp_path: Path) -> None:
    """Conflicts only, all neurons chosen: what does not exist is NaN in the numbers and said in words on the page."""
    mine = tmp_path / "mine"
    shutil.copytree(run, mine, ignore=shutil.ignore_patterns("inference-*"))
    cell = mine / "cells" / "addition-0"
    write_json(
        cell / "cell.json",
        json.loads((cell / "cell.json").read_text()) | {"task": "jsonl", "label": "capitals", "trained": False},
    )
    for name in ("training.parquet", "training_time.json"):
        (cell / "records" / name).unlink()
    for name, column, gone in (
        ("behaviour", "kind", ["novel", "memory"]),
        ("steering", "examples", ["novel", "memory"]),
        ("steering", "role", ["random_neurons"]),
    ):
        path = cell / "records" / f"{name}.parquet"
        table = pd.read_parquet(path)
        table[~table[column].isin(gone)].to_parquet(path)
    text = build_report(mine).read_text()
    task = tasks_of(mine)["capitals"]
    block = task["steering"]["to_memorized"]
    absent = [task["behaviour"]["recall"], task["behaviour"]["novel_accuracy"], block["collateral"]["novel"]]
    absent += [block["controls"]["random_neurons"]["pairs"]["shift"], block["minus_control"]["random_neurons"]["pairs"]]
    absent += [block["controls"]["random_neurons"]["worst"]["conflict"]["other"]]
    assert all(math.isnan(entry["estimate"]) for entry in absent)
    assert not math.isnan(block["controls"]["gaussian"]["pairs"]["shift"]["estimate"])
    assert math.isnan(task["training"]["seconds"][0])
    assert "This model was loaded, not trained here" in text
    assert ">capitals</h2>" in text
    assert not re.findall(r"\bnan\b", re.sub(r"<[^>]*>", " ", text), flags=re.IGNORECASE)


def test_what_a_record_holds_is_text_and_never_markup(run: Path, tmp_path: Path) -> None:
    hostile = shutil.copytree(run, tmp_path / "hostile", ignore=shutil.ignore_patterns("inference-*"))
    path = hostile / "cells" / "addition-0" / "records" / "pairs.parquet"
    table = pd.read_parquet(path)
    table["prompt_a"] = "<script>alert(1)</script> " + table["prompt_a"]
    table.to_parquet(path)
    text = build_report(hostile).read_text()
    assert "<script" not in text
    assert "&lt;" in text
    assert "<mem-" not in text
    assert tint("<b> remembered") == '&lt;b&gt; <span class="memorized">remembered</span>'


@pytest.mark.parametrize(
    ("a", "b", "moved"),
    [
        ("A is red . B is blue . who ?", "B is blue . A is red . who ?", ["A is red", "B is blue"]),
        ("123+456=", "456+123=", ["123", "456"]),
        ("12+34=", "12 plus 34 is ", ["+", "="]),
    ],
)
def test_what_differs_between_two_phrasings(a: str, b: str, moved: list[str]) -> None:
    first, second = difference(a, b)
    assert ("".join(text for text, _ in first), "".join(text for text, _ in second)) == (a, b)
    assert [text for text, what in first if what] == moved


def estimate(middle: float, low: float, high: float, n: int = 100) -> dict[str, Any]:
    return {"estimate": middle, "low": low, "high": high, "n": n}


def test_numbers_in_words() -> None:
    assert [percent(x) for x in (0.634, 0.004, 0.9961, 0.0001, 1.0)] == [
        "63\u00a0%",
        "0.4\u00a0%",
        "99.6\u00a0%",
        "under 0.1\u00a0%",
        "100\u00a0%",
    ]
    assert percent(math.nan) == "could not be measured"
    assert (
        interval(estimate(0.9, 0.6, 1.2)) == "60\u00a0to\u00a0100\u00a0%"
    )  # t over seeds may leave what a share can be
    assert interval(estimate(0.009, 0.006, 0.012)) == "0.6\u00a0to\u00a01.2\u00a0%"
    assert interval(estimate(0.9, math.nan, math.nan)) == "no interval"
    assert with_interval(estimate(0.339, 0.333, 0.347)) == "33.9\u00a0% (33.3\u00a0to\u00a034.7\u00a0%)"
    assert [points(x) for x in (0.01, -0.004, 0.094)] == ["1\u00a0point", "0\u00a0points", "9\u00a0points"]


@pytest.mark.parametrize(
    ("accuracy", "beyond", "verdict"),
    [
        ((0.63, 0.60, 0.66), (0.09, 0.06, 0.12), "Yes, beyond the input"),
        ((0.63, 0.60, 0.66), (0.01, -0.02, 0.04), "Yes, but not surely beyond the input"),
        ((0.63, 0.60, 0.66), (-0.04, -0.06, -0.02), "Yes, but better from the input alone"),
        ((0.51, 0.47, 0.55), (-0.09, -0.12, -0.06), "Not that it shows"),
    ],
)
def test_verdict_of_reading(accuracy: tuple[float, ...], beyond: tuple[float, ...], verdict: str) -> None:
    best = {"accuracy": estimate(*accuracy), "minus_input_only": estimate(*beyond), "picked": [3]}
    answer = can_it_be_read({"probe": {"best": best, "input_only": estimate(0.54, 0.5, 0.58)}})
    assert answer.verdict == verdict
    assert ("more" if beyond[0] >= 0 else "fewer") in answer.sentence


def test_reading_is_held_against_the_stronger_view_of_the_input() -> None:
    best = {"accuracy": estimate(0.6, 0.57, 0.63), "minus_input_only": estimate(0.05, 0.02, 0.08), "picked": [3]}
    probe = {"best": best, "input_only": estimate(0.55, 0.5, 0.6), "input_repeats": estimate(0.7, 0.65, 0.75)}
    assert can_it_be_read({"probe": probe}).verdict == "Yes, beyond the input"
    best["minus_input_repeats"] = estimate(-0.1, -0.13, -0.07)
    answer = can_it_be_read({"probe": probe})
    assert answer.verdict == "Yes, but better from the input alone"
    assert "10\u00a0points fewer" in answer.sentence


def test_damage_in_words() -> None:
    hurt, unsure, undefined = estimate(-0.29, -0.32, -0.27), estimate(-0.01, -0.03, 0.01), estimate(*[math.nan] * 3)
    found = {"novel": hurt, "memory": undefined, "conflict_rest": unsure}
    task = {"steering": {direction: {"collateral": found} for direction in SOURCE}}
    lost = "lose 29\u00a0points (-32\u00a0to\u00a0-27)."
    assert collateral(task, "to_generalized") == f"Towards working it out, new questions {lost}"
    apart = f"New questions, which have nothing to remember, {lost}"
    assert collateral(task, "to_memorized") == f"Towards remembering, no sure damage was seen. {apart}"
    nothing = {"steering": {"to_memorized": {"collateral": dict.fromkeys(found, undefined)}}}
    assert "could not be measured" in collateral(nothing, "to_memorized")


@pytest.mark.parametrize(
    ("shifts", "beyond", "verdict"),
    [
        ((0.8, 0.7), ((0.5, 0.4, 0.6), (0.4, 0.3, 0.5)), "Yes, both ways"),
        ((0.3, 0.7), ((0.1, 0.05, 0.2), (0.4, 0.3, 0.5)), "In part, both ways"),
        ((0.3, 0.7), ((0.0, -0.1, 0.1), (0.4, 0.3, 0.5)), "Yes, towards remembering"),
        ((0.9, 0.9), ((0.0, -0.1, 0.1), (0.1, -0.1, 0.3)), "Not that it shows"),
    ],
)
def test_verdict_of_turning_is_held_against_the_control(shifts: tuple, beyond: tuple, verdict: str) -> None:
    steering = {}
    for direction, shift, difference_ in zip(SOURCE, shifts, beyond, strict=True):
        control = {"pairs": {"shift": estimate(shift - difference_[0], 0, 1)}}
        steering[direction] = {"pairs": {"shift": estimate(shift, shift - 0.05, shift + 0.05)}}
        steering[direction]["collateral"] = {"memory": estimate(-0.02, -0.04, 0), "novel": estimate(-0.5, -0.6, -0.4)}
        steering[direction]["collateral"]["conflict_rest"] = estimate(*[math.nan] * 3)
        steering[direction] |= {
            "controls": {"gaussian": control},
            "minus_control": {"gaussian": {"pairs": estimate(*difference_)}},
        }
    answer = can_it_be_turned({"steering": steering})
    assert answer.verdict == verdict
    # Towards remembering, new questions do not count.
    assert answer.note.endswith("cost: -50\u00a0points of new questions and -2\u00a0points of facts to recall")
    # Of both ways, the harder one is told first.
    assert answer.number == f"{100 * min(shifts):.0f}\u00a0%"
    assert "the harder way; the strongest control turns" in answer.sentence


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_both_themes() -> None:
    """WCAG 2.1, 1.4.3: a ratio of at least 4.5."""
    light, dark = re.findall(
        r":root \{(.*?)\}", (files("mnemoscope.report") / "style.css").read_text(), flags=re.DOTALL
    )
    for theme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        on_softened = [("generalized", "generalized-soft"), ("ink", "mark"), ("generalized", "mark")]
        for text, ground in [
            (t, g) for t in ("ink", "muted", "memorized", "generalized") for g in ("paper", "card")
        ] + on_softened:
            light_, dark_ = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light_ + 0.05) / (dark_ + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_the_page_fits_the_screen(run: Path, browser: Any, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto((run / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    for where, share_ in ((".panels svg.plot", 1), (".wide svg.plot, .narrow svg.plot", 1 / 2)):  # one of two layouts
        found = f"[...document.querySelectorAll('{where}')]"
        shown = tab.evaluate(f"{found}.filter(s => s.getClientRects().length).length")
        assert shown == tab.locator(where).count() * share_ > 0
    tab.close()
