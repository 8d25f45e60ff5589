"""How both behaviours emerge while a model trains: the lines of the report, and a picture of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from mnemoscope.report.drawing import DASHED, GENERALIZED, MEMORIZED, OTHER, Line, Panel, lines_panel, png
from mnemoscope.runs.files import write_atomically

CURVES = {
    "novel_accuracy": ("new right", GENERALIZED, DASHED),
    "recall": ("facts recalled", MEMORIZED, DASHED),
    "conflict_generalized": ("worked out", GENERALIZED, "-"),
    "conflict_memorized": ("remembered", MEMORIZED, "-"),
    "conflict_other": ("other", OTHER, "-"),
}
FAMILIES = tuple((colour, dash) for dash in ("-", DASHED) for colour in (MEMORIZED, GENERALIZED, OTHER))


def _panel(table: pd.DataFrame, title: str, looks: dict[str, Any], ticks: Iterable[float], **axes: Any) -> Panel:
    """Columns of a curve by optimizer step; ``looks``: of each its name, colour and dash, as far as given."""
    steps = table.step.astype(float).to_list()
    lines = [Line(look[0], steps, table[key].astype(float).to_list(), *look[1:]) for key, look in looks.items()]
    named = {step: f"{step:,.0f}" for step in ticks} | axes.pop("kept", {})
    return lines_panel(title, lines, "optimizer steps", ticks=named, **axes)


def behaviour_panel(table: pd.DataFrame) -> Panel:
    """Accuracies and shares of conflicts by optimizer step; the step whose weights were kept is named."""
    looks = {key: look for key, look in CURVES.items() if key in table}
    steps = table.step[table.kept.astype(bool)] if "kept" in table else ()
    kept = {float(step): f"{step:,.0f}\nkept" for step in steps}
    return _panel(table, "while it trains", looks, (0.0, float(table.step.iloc[-1])), kept=kept, axis="share")


def draw_curve(table: pd.DataFrame, path: Path) -> Path:
    """A picture (PNG) of a curve: behaviour, margin, and where there are any, differences by layer.

    Args:
        table: ``emergence.parquet``, or a study's ``training.parquet``.
    """
    ends, columns = [float(table.step.iloc[place]) for place in (0, -1)], [str(name) for name in table]
    panels = [behaviour_panel(table)]
    by_family = [name for name in columns if ":" in name and f"{name}_n" in columns]
    if by_family:
        colours = [*FAMILIES] * len(by_family)
        looks = {name: (name.partition(":")[2], *look) for name, look in zip(by_family, colours, strict=False)}
        panels.append(_panel(table, "right, by family", looks, ends, axis="share"))
    if "margin" in table:
        panels.append(
            _panel(table, "how far apart both answers are", {"margin": ["margin"]}, ends, ylabel="nats", chance=0)
        )
    of_layers = [name for name in columns if name.startswith("rho_")]
    if of_layers:
        shown = dict.fromkeys((of_layers[0], of_layers[len(of_layers) // 2], of_layers[-1]))
        tones = zip(shown, (OTHER, MEMORIZED, GENERALIZED), strict=False)
        layers = {name: (f"layer {name.removeprefix('rho_')}", tone) for name, tone in tones}
        panels.append(_panel(table, "largest correlation of a neuron", layers, ends))
    return write_atomically(path, png(panels))
