"""Figures of steering; each function returns a plot for ``style.draw``."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.figures import Plot
from mnemoscope.report.records import AIMS, DIRECTIONS
from mnemoscope.report.style import COLOUR, INK, MUTED, OTHER, PAPER, canvas, percent_axis

TITLES = {"to_generalized": "towards working it out", "to_memorized": "towards remembering"}
EXAMPLES = {"pairs": "Pairs", "conflict": "Any conflict"}
CONTROL_NAMES = {
    "random_neurons": "random neurons",
    "gaussian": "Gaussian",
    "low_correlation": "low-|rho| neurons",
    "random_sign": "random signs",
    "shuffled_labels": "shuffled labels",
}


def control_name(name: str) -> str:
    return CONTROL_NAMES.get(name, name.replace("_", " "))


def steering_bars(task: dict[str, Any]) -> Plot:
    """Shift, other and stay as stacked bars: the vector, then its controls, on pairs and on any conflict."""
    steering = task["steering"]
    blocks = [steering[direction] for direction in DIRECTIONS]
    names = [name for name in blocks[0]["controls"] if any(_is_known(block, name) for block in blocks)]

    def plot(narrow: bool) -> Figure:
        height = 30 * len(AIMS) * (len(names) + 1) + 74
        shape = (2, 1) if narrow else (1, 2)
        figure, axes = canvas(narrow, height * shape[0], *shape)
        for number, direction in enumerate(DIRECTIONS):
            ax = axes.ravel()[number]
            _turn(ax, direction, _rows(steering[direction], names))
            if len(task["seeds"]) > 1:
                _seed_dots(ax, [seed["steering"][direction] for seed in task["per_seed"].values()], len(names))
            if number and not narrow:
                ax.set_yticklabels([])
        return figure

    return plot


def _is_known(block: dict[str, Any], name: str) -> bool:
    controls = block["controls"].get(name, {})
    return any(not np.isnan(controls[examples]["shift"]["estimate"]) for examples in AIMS if examples in controls)


def _rows(block: dict[str, Any], names: list[str]) -> list[tuple[float, str, dict[str, Any]]]:
    """(height, name, shares) from top to bottom, with a gap between pairs and conflicts."""
    rows: list[tuple[float, str, dict[str, Any]]] = []
    for number, examples in enumerate(AIMS):
        top = number * (len(names) + 1.5)
        rows.append((top, EXAMPLES[examples], block[examples]))
        for i, name in enumerate(names, 1):
            control = block["controls"][name]
            worst = control["worst"][examples]["shift"]["estimate"]
            rows.append((top + i, control_name(name), {**control[examples], "worst": worst}))
    return rows


def _turn(ax: Axes, direction: str, rows: list[tuple[float, str, dict[str, Any]]]) -> None:
    target, source = DIRECTIONS[direction]
    for height, name, shares in rows:
        is_vector = name in EXAMPLES.values()
        strong = 1.0 if is_vector else 0.45
        shift, other, stay = (shares[key]["estimate"] for key in ("shift", "other", "stay"))
        if np.isnan(shift):
            ax.text(0.02, height, "not measured", va="center", color=MUTED)
            continue
        ax.barh(height, shift, height=0.74, color=COLOUR[target], alpha=strong, linewidth=0)
        ax.barh(height, other, left=shift, height=0.74, color=OTHER, alpha=0.75 * strong, linewidth=0)
        ax.barh(height, stay, left=shift + other, height=0.74, color=COLOUR[source], alpha=0.22, linewidth=0)
        low, high = (np.clip(shares["shift"][end], 0, 1) for end in ("low", "high"))
        ax.plot([low, high], [height, height], color=INK, linewidth=1.4)
        ax.plot(shares.get("worst", np.nan), height, "|", color=INK, markersize=12, markeredgewidth=1.6)
        ax.annotate(
            f"{100 * shift:.0f} %",
            (1, height),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontweight="bold" if is_vector else "normal",
            annotation_clip=False,
        )
    ax.set_yticks([height for height, *_ in rows], [name for _, name, _ in rows])
    for tick, (_, name, _) in zip(ax.get_yticklabels(), rows, strict=True):
        if name in EXAMPLES.values():
            tick.set(color=INK, fontweight="bold")
    ax.set_ylim(rows[-1][0] + 0.6, -0.6)
    ax.set_xlim(0, 1)
    percent_axis(ax, "x")
    ax.set_title(TITLES[direction], color=COLOUR[target])
    ax.grid(visible=False)


def _seed_dots(ax: Axes, blocks: list[dict[str, Any]], controls: int) -> None:
    """Every seed's own shift under the vector, on the bars of pairs and of conflicts."""
    for number, examples in enumerate(AIMS):
        shifts = [block[examples]["shift"]["estimate"] for block in blocks]
        height = number * (controls + 1.5)
        ax.plot(shifts, [height] * len(shifts), "o", color=PAPER, markeredgecolor=INK, markersize=5, linestyle="none")
