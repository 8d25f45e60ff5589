"""Print the tables of docs/REVIEW.md from a finished run: ``python docs/review.py runs/paper``.

Everything is read from ``results.json``, save the chance that sampling would change an answer, which comes from the
margins in ``records/behaviour.parquet``. Numbers are means over seeds with a 95 % interval (Student's t over seeds).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

DIRECTIONS = {"to_generalized": "generalized", "to_memorized": "memorized"}
CONTROLS = ("random_neurons", "low_correlation", "random_sign", "shuffled_labels", "gaussian")


def number(value: Any, digits: int = 3) -> str:
    """A plain number; a dash where it is undefined."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def ranged(entry: dict[str, Any], digits: int = 3) -> str:
    """An estimate with its interval."""
    if math.isnan(entry["estimate"]):
        return "-"
    low, high = number(entry["low"], digits), number(entry["high"], digits)
    return f"{number(entry['estimate'], digits)} [{low}, {high}]"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table."""
    heads = list(heads)
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def spread(values: Iterable[float]) -> str:
    """The different values that seeds chose."""
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def setting(task: dict[str, Any], direction: str, method: str | None) -> str:
    """Where and how strongly, over the seeds."""
    found = []
    for seed in task["per_seed"].values():
        entry = seed["steering_by_method"][method] if method else seed["steering"]
        chosen = entry[direction]["chosen"]
        found.append((chosen["method"], chosen["site"], ",".join(map(str, chosen["layers"])), chosen["strength"]))
    places = sorted({f"{method} {site} {layers}" for method, site, layers, _ in found})
    return "; ".join(places) + " at " + spread(strength for *_, strength in found)


def formats(tasks: dict[str, Any]) -> None:
    """Point 1."""
    rows = []
    for name, task in tasks.items():
        contrast = task["contrast"]
        rows.append(
            [
                name,
                ", ".join(number(x) for x in contrast["mean_abs_nmd"]),
                ", ".join(number(x, 2) for x in contrast["max_abs_rho"]),
                ranged(task["probe"]["best"]["accuracy"]),
                *(ranged(task["steering"][d]["pairs"]["shift"]) for d in DIRECTIONS),
            ]
        )
    table(["task", "mean abs NMD by layer", "max abs rho by layer", "probe", "to generalized", "to memorized"], rows)


def controls(tasks: dict[str, Any]) -> None:
    """Point 2: the best method beside its controls, and the logit perturbation."""
    rows = []
    for name, task in tasks.items():
        for direction, target in DIRECTIONS.items():
            found = task["steering"][direction]
            beside = found["controls"]
            means = [beside[c]["pairs"]["shift"]["estimate"] for c in CONTROLS]
            draws = {beside[c]["draws"]["pairs"] for c in CONTROLS}
            rows.append(
                [
                    name,
                    target,
                    setting(task, direction, None),
                    ranged(found["pairs"]["shift"]),
                    *(number(mean) for mean in means),
                    number(found["pairs"]["shift"]["estimate"] - np.nanmax(means)),
                    "/".join(str(d) for d in sorted(draws, key=str)),
                ]
            )
    table(["task", "to", "setting", "shift", *CONTROLS, "minus worst", "draws"], rows)
    rows = []
    for name, task in tasks.items():
        for direction, target in DIRECTIONS.items():
            logit = task["logit"][direction]
            cells = [ranged(logit[key]) for key in ("push", "shift", "vector", "vector_minus_logit")]
            rows.append([name, target, *cells])
    table(["task", "to", "push, nats", "logit push alone", "vector", "difference"], rows)


def methods(tasks: dict[str, Any]) -> None:
    """All methods at their best settings."""
    rows = []
    for name, task in tasks.items():
        for method, found in task["steering_by_method"].items():
            for direction, target in DIRECTIONS.items():
                entry = found[direction]
                worst = np.nanmax([entry["controls"][c]["pairs"]["shift"]["estimate"] for c in CONTROLS])
                place = setting(task, direction, method)
                shift, other = ranged(entry["pairs"]["shift"]), number(entry["pairs"]["other"]["estimate"])
                rows.append([name, method, target, place, shift, other, number(worst)])
    table(["task", "method", "to", "setting", "shift on pairs", "other", "worst control"], rows)


def counts(tasks: dict[str, Any]) -> None:
    """Points 3 and 10: seeds, pairs, groups, yield, what the model can do at all."""
    rows = []
    for name, task in tasks.items():
        behaviour, pairs = task["behaviour"], task["pairs"]
        rows.append(
            [
                name,
                str(len(task["seeds"])),
                f"{pairs['pairs']} of {pairs['candidates']}",
                str(pairs["groups"]),
                ranged(pairs["yield"]),
                ranged(behaviour["novel_accuracy"]),
                ranged(behaviour["recall"]),
                *(number(behaviour["conflict"][b]["estimate"]) for b in ("memorized", "generalized", "other")),
                number(behaviour["conflict"]["confabulated"]["estimate"]),
            ]
        )
    heads = ["task", "seeds", "test pairs", "groups", "yield", "novel", "recall", "memorized", "generalized", "other"]
    table([*heads, "confabulated"], rows)


def baselines(tasks: dict[str, Any]) -> None:
    """Point 4."""
    rows = []
    for name, task in tasks.items():
        probe = task["probe"]
        best = probe["best"]
        rows.append(
            [
                name,
                ranged(best["accuracy"]),
                number(probe["input_only"]["estimate"]),
                f"{ranged(best['minus_input_only'])}: {probe['beats_input_only']}",
                number(probe["input_repeats"]["estimate"]),
                f"{ranged(best['minus_input_repeats'])}: {probe['beats_input_repeats']}",
                number(probe["shuffled"]["estimate"]),
                number(probe["baselines"]["entropy"]["estimate"]),
                number(probe["baselines"]["top_gap"]["estimate"]),
            ]
        )
    heads = ["task", "probe", "input only", "probe minus it", "with repeats", "probe minus it", "shuffled"]
    table([*heads, "entropy", "top gap"], rows)
    rows = []
    for name, task in tasks.items():
        offsets = task["probe"]["best_by_offset"]
        cells = ", ".join(f"{offset}: {number(found['accuracy']['estimate'])}" for offset, found in offsets.items())
        rows.append([name, cells, ", ".join(f"{k}: {v:g}" for k, v in task["probe"]["known_from"].items())])
    table(["task", "accuracy by tokens before the decision", "surely above, from"], rows)


def layers(tasks: dict[str, Any]) -> None:
    """Point 5: where it shows, where it acts, the most a place could do."""
    rows = []
    for name, task in tasks.items():
        by_layer = task["by_layer"]
        for direction, target in DIRECTIONS.items():
            entry = by_layer["shift"][direction]
            for method, sites in entry["methods"].items():
                for site, found in sites.items():
                    if method not in ("nmd", "gradient", "learned"):
                        continue
                    shifts = ", ".join(number(x["estimate"], 2) for x in found)
                    rows.append([name, target, f"{method} at {entry['strength']:g}", site, shifts])
            for site, found in task["patch"][direction].items():
                shifts = ", ".join(number(x["shift"]["estimate"], 2) for x in found)
                rows.append([name, target, "patched from the other side", site, shifts])
    table(["task", "to", "what, one layer alone", "site", "shift by layer"], rows)
    rows = []
    for name, task in tasks.items():
        for method, found in task["ablation"].items():
            for direction, target in DIRECTIONS.items():
                best = task["steering"][direction]["chosen"]["method"]
                for share, entry in found[direction].items():
                    if method not in ("nmd", best) or share != "0.1":
                        continue
                    lost = (entry["vector"]["lost"], entry["random_neurons"]["lost"], entry["minus_random"])
                    rows.append([name, method, target, share, *(ranged(x) for x in lost)])
    table(["task", "ranked by", "to", "share", "separation lost, nats", "random neurons", "difference"], rows)


def transfer(results: dict[str, Any]) -> None:
    """Point 6 and the consistency over seeds."""
    rows = []
    for source, targets in results["transfer"].items():
        for target, found in targets.items():
            for direction, name in DIRECTIONS.items():
                for method, entry in found[direction].items():
                    both = (ranged(entry["shift"]), number(entry["gaussian"]["estimate"]))
                    rows.append([source, target, name, method, *both, ranged(found["probe"])])
    table(["fitted on", "on pairs of", "to", "method", "shift", "Gaussian", "probe accuracy"], rows)
    rows = []
    for name, found in results["seeds"].items():
        for row in found:
            place = "all" if row["layer"] == -1 else str(row["layer"])
            start = "same" if row["shared_initialization"] else "own"
            facts = [name, row["what"], place, number(row["top"], 2), start]
            rows.append([*facts, ranged(row["value"]), ranged(row["chance"])])
    table(["task", "two seeds", "layer", "top", "first weights", "value (range)", "chance"], rows)
    rows = []
    for name, task in results["tasks"].items():
        halves = task["consistency"]["halves"]
        tops = ", ".join(
            f"{top}: {number(found['share']['estimate'], 2)} ({number(found['chance']['estimate'], 2)})"
            for top, found in halves["overlap"].items()
        )
        rhos = ", ".join(number(x["estimate"], 2) for x in halves["rho_rank_correlation"])
        rows.append([name, tops, rhos, number(halves["nmd_cosine_all"]["estimate"], 2)])
    table(["task", "halves: overlap by share (chance)", "rank correlation of rho by layer", "cosine of NMD"], rows)


def doses(tasks: dict[str, Any]) -> None:
    """Point 8."""
    rows = []
    for name, task in tasks.items():
        for direction, target in DIRECTIONS.items():
            method = task["steering"][direction]["chosen"]["method"]
            found = task["dose"][method][direction]["vector"]
            margins = ", ".join(f"{dose}: {number(entry['margin']['estimate'], 1)}" for dose, entry in found.items())
            shifts = ", ".join(f"{dose}: {number(entry['shift']['estimate'], 2)}" for dose, entry in found.items())
            rows.append([name, target, method, margins, shifts])
    table(["task", "to", "method", "mean margin by dose, nats", "shift by dose"], rows)


def costs(tasks: dict[str, Any]) -> None:
    """Point 9, and conflicts as they are drawn."""
    rows = []
    for name, task in tasks.items():
        for direction, target in DIRECTIONS.items():
            found = task["steering"][direction]
            unreachable = found.get("pairs_unreachable", {}).get("shift", {"estimate": math.nan})
            conflict = found.get("best_conflict", found)
            rows.append(
                [
                    name,
                    target,
                    *(ranged(found["collateral"][kind]) for kind in ("memory", "novel", "conflict_rest")),
                    ranged(unreachable) if not math.isnan(unreachable["estimate"]) else "-",
                    number(found["pairs"]["confabulated"]["estimate"]),
                    ranged(conflict["conflict"]["shift"]),
                    *(ranged(conflict["collateral_conflict"][kind]) for kind in ("memory", "novel", "conflict_rest")),
                ]
            )
    heads = ["task", "to", "memory", "novel", "already so", "pairs without the key", "confabulated"]
    table([*heads, "conflicts as drawn", "memory then", "novel then", "already so then"], rows)
    rows = []
    for name, task in tasks.items():
        for direction, found in task["prompt"].items():
            rows.append([name, DIRECTIONS[direction], ranged(found["shift"]), ranged(found["other"])])
    table(["task", "asked as the other behaviour is usually asked, to", "shift", "other"], rows)


def sampled(run: Path, tasks: dict[str, Any]) -> None:
    """Point 10: greedy answers are functions of the prompt; how often would one drawn answer of the two differ."""
    rows = []
    for name, task in tasks.items():
        shares, ties = [], 0
        for seed in task["seeds"]:
            read = pd.read_parquet(run / "cells" / f"{name}-{seed}" / "records" / "behaviour.parquet")
            either = read[read["behaviour"].isin(list(DIRECTIONS.values()))]
            towards = np.where(either["behaviour"] == "generalized", either["margin"], -either["margin"])
            shares.append(float((1 / (1 + np.exp(towards))).mean()))
            ties += int(read["tie"].sum())
        rows.append([name, f"{np.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})", str(ties)])
    table(["task", "chance that a draw between the two answers differs from greedy (range of seeds)", "ties"], rows)


def main(run: Path) -> None:
    """Print every table."""
    results = json.loads((run / "results.json").read_text())
    tasks = results["tasks"]
    parts = [
        ("1. Output formats", lambda: formats(tasks)),
        ("2. Controls", lambda: controls(tasks)),
        ("2. Every method", lambda: methods(tasks)),
        ("3 and 10. Counts and what the models can do", lambda: counts(tasks)),
        ("4. Baselines of the probes", lambda: baselines(tasks)),
        ("5. Layers", lambda: layers(tasks)),
        ("6. Seeds, halves, tasks", lambda: transfer(results)),
        ("8. Doses", lambda: doses(tasks)),
        ("9. Costs, conflicts as drawn, wording", lambda: costs(tasks)),
        ("10. Sampling", lambda: sampled(run, tasks)),
    ]
    for title, part in parts:
        print(f"## {title}\n")
        part()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
