"""One look for all figures: inline SVG whose colours are CSS variables, so that it follows the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from threading import Lock

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Stand-ins that no other drawing uses; each becomes a CSS variable in the SVG.
INK, MUTED, RULE, PAPER = "#101112", "#505152", "#d0d1d2", "#fdfcfb"
MEMORIZED, GENERALIZED, OTHER = "#b00b02", "#0b5f02", "#8a8b8c"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--paper",
    MEMORIZED: "--memorized",
    GENERALIZED: "--generalized",
    OTHER: "--other",
}
COLOUR = {"memorized": MEMORIZED, "generalized": GENERALIZED, "other": OTHER}
# Middle tones that read on light and on dark paper, for pixels, which CSS cannot reach.
PIXEL_MEMORIZED, PIXEL_GENERALIZED = (0.85, 0.45, 0.13), (0.16, 0.53, 0.78)

WIDE, NARROW = 720, 348  # CSS pixels; a point of the drawing is a pixel of the page

_ALONE = Lock()  # the library's settings are those of the whole process


@dataclass(frozen=True)
class Drawing:
    """A figure, in two layouts of which the page shows the one that fits, or in panels that it sets in a grid."""

    wide: str = ""
    narrow: str = ""
    panels: tuple[str, ...] = ()


def draw(name: str, label: str, plot: Callable[[bool], Figure]) -> Drawing:
    """Make a figure in both layouts.

    Args:
        name: unique in the page; it seeds the identifiers inside the SVG.
        label: what a screen reader says in place of the figure.
        plot: makes the figure; its argument is whether the narrow layout is wanted.
    """
    drawn = []
    for layout, narrow in (("wide", False), ("narrow", True)):
        with _ALONE, style(f"{name}-{layout}"):
            drawn.append(_svg(plot(narrow), label))
    return Drawing(wide=drawn[0], narrow=drawn[1])


def draw_panels(name: str, label: str, plots: Sequence[Callable[[], Figure]]) -> Drawing:
    """Make a figure of narrow panels, each drawn once; see ``draw`` for the arguments."""
    drawn = []
    for number, plot in enumerate(plots, 1):
        with _ALONE, style(f"{name}-{number}"):
            drawn.append(_svg(plot(), f"{label} (part {number} of {len(plots)})"))
    return Drawing(panels=tuple(drawn))


def style(name: str) -> AbstractContextManager[None]:
    """The settings of every figure; ``name`` salts the identifiers, which must not repeat in a page."""
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "font.size": 12,
            "axes.titlesize": 13,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.labelsize": 12,
            "text.color": INK,
            "axes.labelcolor": MUTED,
            "axes.titlecolor": INK,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "xtick.color": RULE,
            "ytick.color": RULE,
            "axes.edgecolor": RULE,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": RULE,
            "grid.linewidth": 0.8,
            "ytick.major.size": 0,
            "lines.linewidth": 2.2,
            "lines.solid_capstyle": "round",
            "figure.facecolor": "none",
            "axes.facecolor": "none",
        }
    )


def canvas(
    narrow: bool, height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None
) -> tuple[Figure, np.ndarray]:
    """A figure of the layout's width and ``height`` pixels, with its axes as an array of shape (rows, columns).

    Args:
        heights: of the rows, relative to each other; equal by default.
    """
    width = NARROW if narrow else WIDE
    engine = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72, wspace=0.05, hspace=0.06)
    figure = Figure(figsize=(width / 72, height / 72), layout=engine)
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=heights)


def percent_axis(axes: Axes, which: str = "y", top: float = 1.0) -> None:
    """Mark an axis of shares in whole per cent, from 0 to ``top``."""
    step = 0.25 if top > 0.6 else 0.1 if top > 0.25 else 0.05
    ticks = np.arange(0, top + 1e-9, step)
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_ticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])


def beside(ax: Axes, x: float, y: float, text: str, colour: str, gap: float = 8) -> None:
    """Write ``text`` to the right of a point, also where that is outside the axes."""
    ax.annotate(text, (x, y), (gap, 0), textcoords="offset points", va="center", color=colour, annotation_clip=False)


def spread(heights: Sequence[float], gap: float, lowest: float = -np.inf) -> list[float]:
    """Heights of labels that were to stand at ``heights``, moved apart until neighbours keep ``gap``.

    Args:
        lowest: no label is moved below this.
    """
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, dtype=np.float64)[order]
    for _ in range(50):
        overlaps = gap - np.diff(placed)
        if (overlaps <= 1e-6).all():
            break
        for i in np.flatnonzero(overlaps > 0):
            placed[i] -= overlaps[i] / 2
            placed[i + 1] += overlaps[i] / 2
    # The lowest label may stand at ``lowest``, the next one a gap above it, and so on: no gap is lost again.
    placed = np.maximum(placed, lowest + gap * np.arange(len(placed)))
    result = np.empty(len(heights))
    result[order] = placed
    return result.tolist()


def _svg(figure: Figure, label: str) -> str:
    """The drawing as an inline ``<svg>``: no prologue, no style sheet, no names that repeat, theme colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")  # HTML knows both names
    text = re.sub(
        r'font-family: [^;"]*[;]?|font: ([\d.]+px) [^;"]*', lambda m: f"font-size: {m[1]}" if m[1] else "", text
    )
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)  # a hundredth of a pixel will do
    width = round(figure.get_figwidth() * 72)
    head = f'<svg class="plot" role="img" aria-label="{escape(label, quote=True)}" style="width:{width}px"'
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf"{head} \1", text, count=1).strip()
