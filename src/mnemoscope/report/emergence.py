"""How both behaviours emerge while a model trains: the lines of the report, and a picture of its own."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mnemoscope.report import drawing
from mnemoscope.report.drawing import DASHED, GENERALIZED, MEMORIZED, OTHER, Line, Panel
from mnemoscope.runs.files import write_atomically

CURVES = (
    ("novel_accuracy", "new right", GENERALIZED, DASHED),
    ("recall", "facts recalled", MEMORIZED, DASHED),
    ("conflict_generalized", "worked out", GENERALIZED, "-"),
    ("conflict_memorized", "remembered", MEMORIZED, "-"),
    ("conflict_other", "other", OTHER, "-"),
)


FAMILIES = tuple((colour, dash) for dash in ("-", DASHED) for colour in (MEMORIZED, GENERALIZED, OTHER))


def behaviour_panel(table: pd.DataFrame) -> Panel:
    """Accuracies and shares of conflicts by optimizer step; the step whose weights were kept is named."""
    steps = table.step.astype(float).to_list()
    lines = [
        Line(name, steps, table[key].astype(float).to_list(), colour, dash)
        for key, name, colour, dash in CURVES
        if key in table
    ]
    kept = (
        {float(step): f"{step:,.0f}\nkept" for step in table.step[table.kept.astype(bool)]} if "kept" in table else {}
    )
    ticks = {0.0: "0", steps[-1]: f"{steps[-1]:,.0f}", **kept}
    return drawing.lines_panel("while it trains", lines, "optimizer steps", ticks=ticks, axis="share")


def draw_curve(table: pd.DataFrame, path: Path) -> Path:
    """A picture (PNG) of a curve: behaviour, margin, and where there are any, differences by layer.

    Args:
        table: ``emergence.parquet``, or a study's ``training.parquet``.
    """
    steps = table.step.astype(float).to_list()
    ticks = {steps[0]: f"{steps[0]:,.0f}", steps[-1]: f"{steps[-1]:,.0f}"}
    panels = [behaviour_panel(table)]
    by_family = [str(name) for name in table if ":" in str(name) and f"{name}_n" in table]
    if by_family:
        colours = [*FAMILIES] * len(by_family)
        lines = [
            Line(name.partition(":")[2], steps, table[name].astype(float).to_list(), colour, dash)
            for name, (colour, dash) in zip(by_family, colours, strict=False)
        ]
        panels.append(drawing.lines_panel("right, by family", lines, "optimizer steps", ticks=ticks, axis="share"))
    if "margin" in table:
        line = Line("margin", steps, table.margin.astype(float).to_list())
        panels.append(
            drawing.lines_panel("how far apart both answers are", [line], "optimizer steps", "nats", ticks, 0.0)
        )
    of_layers = [str(name) for name in table if str(name).startswith("rho_")]
    if of_layers:
        first, middle, last = of_layers[0], of_layers[len(of_layers) // 2], of_layers[-1]
        lines = [
            Line(f"layer {name.removeprefix('rho_')}", steps, table[name].astype(float).to_list(), colour)
            for name, colour in zip(dict.fromkeys((first, middle, last)), (OTHER, MEMORIZED, GENERALIZED), strict=False)
        ]
        panels.append(drawing.lines_panel("largest correlation of a neuron", lines, "optimizer steps", "", ticks))
    return write_atomically(path, drawing.png(panels))
