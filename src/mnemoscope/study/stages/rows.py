"""What is recorded of steering: rows of the sweep, tables of judged examples, and chosen settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Scores
from mnemoscope.interventions import Intervention, SteeringVector
from mnemoscope.interventions.controls import shared_neurons
from mnemoscope.interventions.methods.nmd import alpha

if TYPE_CHECKING:
    from mnemoscope.study.stages.lists import JudgedList, RecordedBench

Row = dict[str, Any]


def columns_of(one: Intervention, bench: RecordedBench) -> Row:
    """A chosen setting as ``chosen.json`` has it."""
    if not isinstance(one, SteeringVector):
        where: Row = {"site": "block", "layers": [], "positions": "all"}
        return where | {"top": 1.0, "strength": 1.0, "alpha": np.nan, "shared": np.nan}
    facts: Row = {name: getattr(one, name) for name in ("site", "positions", "top", "strength")}
    facts |= {"alpha": alpha(bench, one) if one.method == "nmd" else np.nan}
    facts |= {"shared": shared_neurons(one.dense(*bench.sources(one.site).shape_LD))}
    return facts | {"layers": list(one.setting.get("layers", one.layers))}


def judged_table(
    one: Intervention, aim: str, role: tuple[str, int], name: str, entry: JudgedList, found: Scores
) -> pd.DataFrame:
    """One row per steered test example."""
    row: Row = {"aim": aim, **_columns(one), "role": role[0], "draw": role[1], "examples": name}
    row |= {"example": np.arange(len(entry.examples)), "split": "test", "before": entry.before}
    row |= {key: [getattr(example, key) for example in entry.examples] for key in ("group", "family")}
    row |= {"after": found.behaviour_N, "margin_before": entry.margin_N, "margin": found.margin_N}
    return pd.DataFrame(row | {"confabulated": found.confabulated_N})


def sweep_row(name: str, one: Intervention, found: Scores, label: str | None = None) -> Row:
    """A row of the sweep: behaviours under a setting, or the share that keeps its ``label``."""
    row = {"examples": name, "n": len(found.behaviour_N), **_columns(one)}
    row |= dict.fromkeys(("shift", "stay", "other", "kept", "margin", "margin_sd"), np.nan)
    if not row["n"]:  # of few groups none may be left to steer
        return row
    if label is not None:
        return row | {"kept": float(np.mean(found.behaviour_N == label))}
    shares = {"shift": one.toward, "stay": one.toward.opposite, "other": "other"}
    row |= {"margin": float(found.margin_N.mean()), "margin_sd": float(found.margin_N.std())}
    return row | {column: float(np.mean(found.behaviour_N == behaviour)) for column, behaviour in shares.items()}


def _columns(one: Intervention) -> Row:
    """A setting in the columns of the records; layers as ``0-3`` for a range, else between commas."""
    row: Row = {"direction": f"to_{one.toward}", "method": one.method}
    if not isinstance(one, SteeringVector):
        return row | {"site": "", "layers": "", "top": 1.0, "strength": 1.0}
    layers = list(one.setting.get("layers", one.layers)) or [0]
    in_a_row = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    shown = f"{layers[0]}-{layers[-1]}" if in_a_row else ",".join(map(str, layers))
    return row | {"site": one.site, "layers": shown, "top": one.top, "strength": one.strength}
