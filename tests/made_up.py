"""A made-up run folder, as a study would write it, without a model: behaviours come from made-up decision margins."""

from __future__ import annotations

import json
import math
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from mnemoscope.report.rows import Part, parts_of
from mnemoscope.runs.digests import write_marker
from mnemoscope.statistics.contrast import Contrast
from mnemoscope.tasks import Example, build_task, draw

LAYERS, WIDTH = 4, 48
TOPS, STRENGTHS, DOSES = (0.05, 0.2, 1.0), (0.1, 0.4, 0.8), (-1.0, 0.0, 0.5, 1.0, 2.0)
GAINS = {"nmd": 0.6, "gradient": 1.0}
MADE = {"random_neurons": 0.05, "low_correlation": 0.02, "random_sign": 0.1, "shuffled_labels": 0.3, "gaussian": 0.12}
CONTROLS, ROLES = tuple(MADE), {"vector": 1.0, **MADE}
SIDES = ("generalized", "memorized")
SOURCE = {"to_generalized": "memorized", "to_memorized": "generalized"}
TARGET = {"to_generalized": "generalized", "to_memorized": "memorized"}
SIGN = {"to_generalized": 1, "to_memorized": -1}
TEXT = dict.fromkeys(("direction", "method", "site", "layers", "role"), "")


def write_run(folder: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    """A run with, per task, ``seeds`` cells; see ``write_cell`` for the other options."""
    folder.mkdir(parents=True, exist_ok=True)
    study = {"study": "made-up", "seeds": 1, "threads": 1, "cells": {name: {"task": name} for name in tasks}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    manifest = {"mnemoscope": "0.1.0", "versions": {"numpy": "2.0"}, "python": "3.11.2", "machine": {"processors": 2}}
    write_json(folder / "manifest.json", manifest | {"commit": "0123abc", "dirty": True, "seconds": 12.5})
    for name, options in tasks.items():
        for seed in range(options.get("seeds", 1)):
            write_cell(folder / "cells" / f"{name}-{seed}", name, seed, **options)
    if len(tasks) > 1:
        (folder / "records").mkdir()
        seeds = seeds_rows({name: options.get("seeds", 1) for name, options in tasks.items()})
        for table, rows in {"seeds": seeds, **transfer_rows(list(tasks))}.items():
            rows.to_parquet(folder / "records" / f"{table}.parquet")
    mark(folder)
    return folder


def mark(run: Path) -> None:
    """Write the markers of a made-up run, with the digests that its files have now."""
    written = [*run.glob("*.yaml"), *run.glob("manifest.json"), *run.glob("failed.json"), *run.glob("records/*")]
    write_marker(run, "all", written)
    for cell in run.glob("cells/*"):
        write_marker(cell, "all", [p for p in cell.rglob("*") if p.is_file() and p.parent.name != "stages"])


def results_of(run: Path) -> Part:
    """What ``results.json`` of a run holds."""
    found: Part = parts_of(json.loads((run / "results.json").read_text()))
    return found


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_cell(
    folder: Path, name: str, seed: int, *, effect: float = 1.0, size: int = 240, flips: bool = True, **_: Any
) -> None:
    """One cell. ``effect`` scales how far states and steering separate; without ``flips`` no candidate is a pair."""
    rng, task = np.random.default_rng([seed, len(name)]), build_task(name, {}, seed)
    conflicts = draw(task, rng, size, "conflict", "test")
    records = folder / "records"
    records.mkdir(parents=True)
    info = {"task": name, "label": name, "seed": seed, "layers": LAYERS, "width": WIDTH, "site": "block"}
    write_json(folder / "cell.json", {**info, "memory_is_conflict": task.memory_is_conflict, "trained": True})
    write_json(records / "training_time.json", {"seconds": 61.5 + seed, "steps": 1200})
    behaviour, pairs = behaviour_rows(rng, task, conflicts, size), pair_rows(rng, task, size, flips)
    fit_pairs = int((pairs.is_pair & (pairs.split == "fit")).sum())
    tables = {
        "training": training_rows(),
        "behaviour": behaviour,
        "pairs": pairs,
        "probes": probe_rows(rng, pairs[pairs.is_pair & (pairs.split == "test")], effect),
        "learning": learning_rows(fit_pairs, effect),
        "halves": halves_rows(fit_pairs, effect),
        "sweep": sweep_rows(rng, lists_of(pairs, conflicts, "tune"), effect),
        "steering": steering_rows(rng, lists_of(pairs, conflicts, "test"), effect),
        "effects": effects_rows(rng, pairs, effect, prompted=name == "addition"),
    }
    for table, rows in tables.items():
        rows.to_parquet(records / f"{table}.parquet")
    write_json(records / "chosen.json", chosen_settings())
    write_json(folder / "probe.json", {"site": "block", "best_layer": 1, "layers": []})
    contrast_file(rng, folder, effect if flips else math.nan, fit_pairs)


def training_rows() -> pd.DataFrame:
    step = np.arange(0, 1300, 100)
    rise, late = (1 / (1 + np.exp(-(step - middle) / 90)) for middle in (250, 720))
    memorized, generalized = rise - 0.55 * late, 0.52 * late
    columns = {"step": step, "loss": 3.2 - 2.9 * rise, "novel_accuracy": late, "recall": rise, "met": step >= 900}
    columns |= {"conflict_memorized": memorized, "conflict_generalized": generalized}
    return pd.DataFrame({**columns, "conflict_other": 1 - memorized - generalized, "kept": step == 1200})


def behaviour_rows(rng: np.random.Generator, task: Any, conflicts: list[Example], size: int) -> pd.DataFrame:
    rows = []
    for example in [*conflicts, *draw(task, rng, size, "memory", "test"), *draw(task, rng, size, "novel", "test")]:
        margin, confabulated, behaviour = math.nan, 0.0, "correct" if rng.random() < 0.96 else "wrong"
        if example.kind == "conflict":
            margin = float(rng.normal(0.4, 3))
            behaviour = answered(rng, margin)
            confabulated = math.nan if task.name == "inference" else float(behaviour == "other" and rng.random() < 0.4)
        fields = ("item", "prompt", "kind", "group", "family", "split", "memorized", "generalized", "answer")
        found = {"behaviour": behaviour, "confabulated": confabulated, "margin": margin, "tie": rng.random() < 0.01}
        rows.append({field: getattr(example, field) for field in fields} | found)
    return pd.DataFrame(rows)


def answered(rng: np.random.Generator, margin: float) -> str:
    return "other" if rng.random() < 0.05 else "generalized" if margin > 0 else "memorized"


def pair_rows(rng: np.random.Generator, task: Any, size: int, flips: bool) -> pd.DataFrame:
    rows = []
    for split in ("fit", "tune", "test"):
        for example in draw(task, rng, 2 * size, "conflict", split):
            row = {key: getattr(example, key) for key in ("item", "group", "memorized", "generalized")}
            margin = float(rng.normal(0.4, 2))
            for letter, one in (("a", example), ("b", task.rephrase(example, rng))):
                margin += float(rng.normal(0, 1.4 if flips and letter == "b" else 0))
                behaviour = answered(rng, margin) if flips or letter == "a" else row["behaviour_a"]
                row |= {f"prompt_{letter}": one.prompt, f"family_{letter}": one.family}
                row |= {f"margin_{letter}": margin, f"behaviour_{letter}": behaviour}
            rows.append({**row, "split": split, "is_pair": {row["behaviour_a"], row["behaviour_b"]} == set(SIDES)})
    return pd.DataFrame(rows)


def probe_rows(rng: np.random.Generator, pairs: pd.DataFrame, effect: float) -> pd.DataFrame:
    groups, label = np.repeat(pairs.group.to_numpy(dtype=str), 2), np.tile([1, 0], len(pairs))
    kinds = [("input_only", -1, 0, 0.15), ("input_repeats", -1, 0, 0.2), ("entropy", -1, 0, 0.1)]
    kinds += [("top_gap", -1, 0, 0.05), *(("shuffled", layer, 0, 0.0) for layer in range(LAYERS))]
    kinds += [("state", n, k, effect * (0.2 + 0.25 * n) / (1 + k)) for k in (0, 2, 8) for n in range(LAYERS)]
    parts = []
    for kind, layer, offset, pull in kinds:
        score = rng.normal(size=len(label)) + pull * (2 * label - 1)
        columns = {"kind": kind, "layer": layer, "offset": offset, "group": groups, "label": label, "score": score}
        columns["draw"] = math.nan
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def learning_rows(pairs: int, effect: float) -> pd.DataFrame:
    """Draws that come nearer to the end of the curve as pairs are added; nothing without pairs."""
    rng, rows = np.random.default_rng(pairs), []
    curves = (("accuracy", 3, 0.5 + 0.1 * effect), ("nmd_cosine", 3, 1), ("nmd_cosine", -1, 1))
    sizes = [(size, number) for size in (25, 50, 100) if size < pairs for number in range(5)]
    for size, number in [*sizes, (pairs, 0)] if pairs else []:
        missing = (1 - size / pairs) * rng.uniform(0.8, 1)
        for what, layer, best in curves:
            rows.append((size, number, (size + 2) // 3, what, layer, best - missing * (best - 0.5), size))
    return pd.DataFrame(rows, columns=["pairs", "draw", "groups", "what", "layer", "value", "n"])


def halves_rows(pairs: int, effect: float) -> pd.DataFrame:
    rng, rows = np.random.default_rng(pairs), []
    kinds = [(what, layer, math.nan) for what in ("rho_rank_correlation", "nmd_cosine") for layer in range(LAYERS)]
    kinds += [("nmd_cosine", -1, math.nan), *product(("overlap", "overlap_in_layers"), (-1,), (0.05, 0.3))]
    for halving, (what, layer, top) in product(range(20 if pairs else 0), kinds):
        value, chance = min(1.0, 0.3 * effect + rng.normal(0, 0.05)), top * (1.2 if what == "overlap_in_layers" else 1)
        numbers = (value if math.isnan(top) else max(top, value), chance, max(0.0, chance - 0.1), chance + 0.1)
        rows.append((halving, what, layer, top, *numbers, 1 if math.isnan(top) else math.ceil(top * LAYERS * WIDTH)))
    columns = ["halving", "what", "layer", "top", "value", "chance", "chance_low", "chance_high", "n"]
    return pd.DataFrame(rows, columns=columns)


Lists = dict[str, tuple[pd.Series, float]]


def lists_of(pairs: pd.DataFrame, conflicts: list[Example], split: str) -> Lists:
    """List of examples -> (group of each, how far it is from being steered)."""
    paired = pairs[pairs.is_pair & (pairs.split == split)].group.reset_index(drop=True)
    groups = pd.Series([example.group for example in conflicts[:80]], dtype=str)
    return {"pairs": (paired, 1.0), "conflict": (groups, 2.5), "conflict_rest": (groups, -2.5)}


def places_of(groups: pd.Series, distance: float) -> np.ndarray:
    """Examples are at the same place whatever is done to them, as real ones are."""
    return -distance * np.random.default_rng(len(groups)).gamma(2, 0.5, size=len(groups))


def sweep_rows(rng: np.random.Generator, lists: Lists, effect: float) -> pd.DataFrame:
    """Every method on all layers and on single ones; ``nmd`` is mapped."""
    rows, layers = [], {"0-3": 1.0, **{str(n): 0.3 + 0.2 * n for n in range(LAYERS)}}
    undefined = dict.fromkeys(("shift", "stay", "other", "margin", "margin_sd", "kept"), math.nan)
    for direction, (method, gain), where, top, strength in product(TARGET, GAINS.items(), layers, TOPS, STRENGTHS):
        setting = {"direction": direction, "method": method, "site": "block", "layers": where, "top": top}
        setting |= {"strength": strength, **undefined}
        push = effect * gain * 6 * strength * (0.4 + 0.6 * top) * layers[where]
        for examples, (groups, distance) in lists.items():
            if examples == "conflict_rest" or not len(groups) or (examples == "conflict" and method != "nmd"):
                continue
            inside, other = push + places_of(groups, distance), float((rng.random(len(groups)) < 0.02 * push).mean())
            shift = float((inside > 0).mean()) * (1 - other)
            found = {"shift": shift, "stay": 1 - shift - other, "other": other}
            found |= {"margin": SIGN[direction] * float(inside.mean()), "margin_sd": float(inside.std())}
            rows.append({**setting, "examples": examples, "n": len(groups), **found})
        for examples in ("memory", "novel") if method == "nmd" else ():
            kept = {"examples": examples, "n": 80, "kept": max(0.0, 1 - 0.1 * push)}
            rows += [{**setting, **kept}] * (2 if where == "0-3" else 1)  # by both aims
    return pd.DataFrame(rows)


def steering_rows(rng: np.random.Generator, lists: Lists, effect: float) -> pd.DataFrame:
    """Each list of examples has margins of its own; a shift of strength s moves them by s times the role's push."""
    parts = []
    everything = {**lists, "pairs_unreachable": (lists["pairs"][0][:9], 4.0)}
    everything |= dict.fromkeys(("novel", "memory"), (lists["conflict"][0], 0.0))
    aims = (("pairs", 1.0), ("conflict", 2.0), ("equal_norm", 1.0), ("unpenalized", 1.0))
    for (method, gain), direction, (aim, more) in product(GAINS.items(), SOURCE, aims):
        if aim == "unpenalized" and method != "nmd":
            continue
        setting = {"aim": aim, "direction": direction, "method": method, "site": "block", "layers": "0-3"}
        setting |= {"top": 0.2, "strength": 0.4 * more, "split": "test"}
        for (role, share), number in product(ROLES.items(), range(3)):
            is_vector, push = role == "vector", effect * gain * share * 1.9 * more
            if is_vector and number:
                continue
            own = {aim: lists[aim]} if aim in lists else {"pairs": lists["pairs"]}
            for examples, (groups, distance) in (everything if is_vector and aim in lists else own).items():
                if examples == "pairs_unreachable" and (direction, aim) != ("to_memorized", "pairs"):
                    continue
                found = shifted(rng, groups, (distance, push), direction, examples)
                facts = {**setting, "role": role, "draw": number, "examples": examples, "family": "a"}
                columns = {**facts, "example": np.arange(len(groups)), "group": groups.to_numpy(), **found}
                if not is_vector:
                    columns |= {"margin": math.nan, "confabulated": math.nan}
                parts.append(pd.DataFrame(columns))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def shifted(
    rng: np.random.Generator, groups: pd.Series, strong: tuple[float, float], direction: str, examples: str
) -> dict[str, Any]:
    if examples in ("novel", "memory"):
        before = np.where(rng.random(len(groups)) < 0.96, "correct", "wrong")
        after = np.where(rng.random(len(groups)) < 0.03, "wrong", before)
        nothing = dict.fromkeys(("margin_before", "margin", "confabulated"), math.nan)
        return {"before": before, "after": after, **nothing}
    (distance, push), sign = strong, SIGN[direction]
    place = places_of(groups, distance)
    inside = place + push + rng.normal(0, 0.3, len(groups))
    after = np.where(inside > 0, TARGET[direction], SOURCE[direction])
    after = np.where(rng.random(len(groups)) < 0.02 + 0.01 * push**2, "other", after)
    before = (TARGET if examples == "conflict_rest" else SOURCE)[direction]
    made_up = (after == "other") & (np.arange(len(groups)) % 2 == 1)
    margins = {"margin_before": sign * place, "margin": sign * inside}
    return {"before": before, "after": after, **margins, "confabulated": made_up.astype(float)}


def effects_rows(rng: np.random.Generator, pairs: pd.DataFrame, effect: float, prompted: bool) -> pd.DataFrame:
    """Interventions on both sides of the test pairs; only a task of its own asks in words."""
    groups = pairs[pairs.is_pair & (pairs.split == "test")].group.to_numpy(dtype=str)
    place, parts = np.random.default_rng(len(groups)).gamma(2, 0.5, size=len(groups)), []

    def add(side: str, push: float, **facts: Any) -> None:
        sign = 1 if side == "generalized" else -1
        margin = sign * place + push + rng.normal(0, 0.2, size=len(groups))
        columns = {**TEXT, "dose": math.nan, "draw": 0, **facts, "side": side, "example": np.arange(len(groups))}
        columns |= {"group": groups, "after": np.where(margin > 0, *SIDES), "margin_before": sign * place}
        parts.append(pd.DataFrame({**columns, "margin": margin}))

    for direction, side in SOURCE.items():
        sign = SIGN[direction]
        for method, gain in GAINS.items():
            facts = {"direction": direction, "method": method, "site": "block"}
            for dose, (role, number) in product(DOSES, (("vector", 0), ("gaussian", 0), ("gaussian", 1))):
                push = sign * effect * gain * dose * (1 if role == "vector" else 0.1)
                add(side, push, what="dose", **facts, dose=dose, role=role, draw=number)
            draws = (("vector", 0), ("random_neurons", 0), ("random_neurons", 1))
            for top, (role, number), each in product((0.05, 0.3), draws, SIDES):
                lost = (-1 if each == "generalized" else 1) * effect * gain * top * (3 if role == "vector" else 0.5)
                add(each, lost, what="ablation", **facts, dose=top, role=role, draw=number)
        for site, layer in product(("block", "mlp"), range(LAYERS)):
            add(side, sign * 0.8 * layer, what="patch", direction=direction, site=site, layers=str(layer))
        if prompted:
            add(side, sign * 0.4, what="prompt", direction=direction)
    return pd.concat(parts, ignore_index=True)


def chosen_settings() -> dict[str, Any]:
    """Conflicts are steered to memory by another method than pairs."""
    fixed = {"site": "block", "layers": list(range(LAYERS)), "positions": "decision", "top": 0.2, "alpha": math.nan}
    settings = {}
    for aim, strength in (("pairs", 0.4), ("conflict", 0.8)):
        facts = {**fixed, "strength": strength, "within_limits": aim == "pairs"}
        methods = {method: {d: {"method": method, **facts} for d in SOURCE} for method in GAINS}
        settings[aim] = {"best": dict.fromkeys(SOURCE, "gradient"), "methods": methods}
    settings["conflict"]["best"]["to_memorized"] = "nmd"
    return settings


def seeds_rows(labels: dict[str, int]) -> pd.DataFrame:
    rows = []
    for label, (a, b) in ((label, two) for label, number in labels.items() for two in combinations(range(number), 2)):
        common = {"label": label, "seed_a": a, "seed_b": b, "site": "block", "shared_initialization": a == 0}
        common |= {"chance_low": -0.1, "chance": 0.0, "chance_high": 0.1, "top": math.nan}
        for what, layer in product(("rank_correlation", "aligned_cosine"), range(-1, LAYERS)):
            rows.append({**common, "what": what, "layer": layer, "value": 0.3 + 0.1 * layer})
        named = (("overlap", 0.05), ("overlap", 0.3), ("overlap_in_layers", 0.1))
        rows += [{**common, "what": what, "layer": -1, "top": top, "value": top + 0.2} for what, top in named]
    return pd.DataFrame(rows)


def transfer_rows(labels: list[str]) -> dict[str, pd.DataFrame]:
    rng, steered, read = np.random.default_rng(5), [], []
    groups = [f"g{n % 15}" for n in range(60)]
    for source, target, seed in product(labels, labels, range(2)):
        near, common = 0.8 if source == target else 0.3, {"source": source, "target": target, "seed": seed}
        for direction, method, role in product(SOURCE, ("best", "nmd"), ("vector", "gaussian")):
            hit = rng.random(60) < (near if role == "vector" else 0.05)
            facts = {**common, "direction": direction, "method": method, "role": role, "draw": 0, "group": groups}
            after = np.where(hit, TARGET[direction], SOURCE[direction])
            steered.append(pd.DataFrame({**facts, "example": np.arange(60), "after": after}))
        for layer in range(LAYERS):
            label = np.tile([1, 0], 30)
            score = rng.normal(size=60) + near * layer * (2 * label - 1)
            read.append(pd.DataFrame({**common, "layer": layer, "group": groups, "label": label, "score": score}))
    tables = {"transfer_steering": steered, "transfer_probes": read}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def contrast_file(rng: np.random.Generator, folder: Path, effect: float, pairs: int) -> None:
    nmd = effect * np.linspace(0.05, 1, LAYERS)[:, None] * rng.standard_t(4, size=(LAYERS, WIDTH)) * 0.1
    rho = np.clip(nmd / 1.2, -0.95, 0.95)
    p = np.where(np.isnan(nmd), nmd, np.exp(-np.abs(rho) * 40))
    Contrast("block", pairs, 40, nmd, rho, rho * 2, p, p, np.ones(LAYERS)).save(folder / "contrast.safetensors")
