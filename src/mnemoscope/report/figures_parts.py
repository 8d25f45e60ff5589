"""Parts that several figures share: rows of dots, lines over layers, labels at the end of lines.

An R is an estimate as ``results.json`` holds it. A panel is a figure of the narrow width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.style import INK, MUTED, PAPER, RULE, beside, canvas, spread

R = dict[str, Any]
Panel = Callable[[], Figure]
ROW = 27  # pixels of a row of dots


@dataclass(frozen=True)
class Dot:
    """One row: a name, an estimate with its interval, and how it looks.

    Attributes:
        mark: a second value on the row, such as the worst draw; NaN for none.
    """

    name: str
    value: R
    colour: str = INK
    hollow: bool = False
    mark: float = float("nan")


def panel(height: float, rows: int = 1, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """An empty panel with its axes from top to bottom."""
    figure, axes = canvas(True, height, rows, 1, heights)
    return figure, list(axes[:, 0])


def dot_rows(ax: Axes, dots: Sequence[Dot], unit: float = 100, sign: bool = False) -> None:
    """Rows of dots with their intervals; the number stands at the right end of each."""
    for height, dot in enumerate(dots):
        middle, low, high = (unit * dot.value[key] for key in ("estimate", "low", "high"))
        ax.axhline(height, color=RULE, linewidth=0.8, zorder=0)
        if np.isnan(middle):
            ax.annotate("not measured", (0, height), xycoords=("axes fraction", "data"), va="center", color=MUTED)
            continue
        ax.plot([low, high], [height, height], color=dot.colour, linewidth=3, alpha=0.45)
        ax.plot(unit * dot.mark, height, "|", color=MUTED, markersize=11, markeredgewidth=1.6)
        face = PAPER if dot.hollow else dot.colour
        ax.plot(middle, height, "o", color=dot.colour, markerfacecolor=face, markersize=7)
        _at_right(ax, height, f"{round(middle):+d}" if sign and round(middle) else f"{round(middle)}")
    ax.set_yticks(range(len(dots)), [dot.name for dot in dots])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(len(dots) - 0.4, -0.6)
    ax.grid(visible=False)


def _at_right(ax: Axes, height: float, text: str) -> None:
    ax.annotate(
        text,
        (1, height),
        (6, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color=INK,
        annotation_clip=False,
    )


def line(
    ax: Axes, x: Any, values: Sequence[R], colour: str, *, dash: Any = "-", width: float = 2, band: bool = True
) -> None:
    """A line through estimates, with their intervals as a band; points that are not defined are left out."""
    middle, low, high = (np.array([v[key] for v in values], dtype=float) for key in ("estimate", "low", "high"))
    known = ~np.isnan(middle)
    x = np.asarray(x, dtype=float)
    if band:
        ax.fill_between(x[known], low[known], high[known], color=colour, alpha=0.15, linewidth=0)
    ax.plot(x[known], middle[known], color=colour, linestyle=dash, linewidth=width, marker="o", markersize=3.5)


def name_ends(ax: Axes, x: float, named: Sequence[tuple[str, float, str]], gap: float = 0.085) -> None:
    """Write names right of the ends of lines, moved apart where they would overlap.

    Args:
        named: (name, height of the line's end, colour).
        gap: between two names, as a share of the axis.
    """
    named = [entry for entry in named if not np.isnan(entry[1])]
    low, high = ax.get_ylim()
    heights = spread([entry[1] for entry in named], gap * (high - low), low)
    for (name, _, colour), height in zip(named, heights, strict=True):
        beside(ax, x, height, name, colour, 7)


def last_known(values: Sequence[R]) -> float:
    """The last defined estimate; NaN where none is."""
    return next((v["estimate"] for v in reversed(values) if not np.isnan(v["estimate"])), float("nan"))


def cells(
    ax: Axes,
    values: np.ndarray,
    colour: str,
    texts: Sequence[Sequence[str]] | None = None,
    at: tuple[float, float] = (0.0, 0.0),
) -> None:
    """A map of shares: the stronger the colour, the larger the share; NaN is left empty.

    Args:
        texts: what stands in each cell; by default the share in per cent.
        at: row and column of the first cell, so that several maps fit one axes.
    """
    size = 10 if values.shape[1] < 5 else 8
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        y, x, share = at[0] + row, at[1] + column, float(np.clip(value, 0, 1))
        ax.barh(y, 0.94, left=x - 0.47, height=0.94, color=colour, alpha=0.08 + 0.72 * share, linewidth=0)
        text = texts[row][column] if texts else f"{100 * value:.0f}"
        ax.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)
    ax.set_xlim(-0.5, values.shape[1] - 0.5)
    ax.set_ylim(values.shape[0] - 0.5, -0.5)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines["bottom"].set_visible(False)
