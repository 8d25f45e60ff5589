"""One look for all figures: inline SVG panels of one width, whose colours are CSS variables of the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from threading import Lock
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mnemoscope.report.schema import DIRECTIONS
from mnemoscope.report.words import TOWARDS, UNMEASURED
from mnemoscope.statistics import Estimate

# Stand-ins that no other drawing uses; each becomes a CSS variable in the SVG.
INK, MUTED, RULE, PAPER = "#101112", "#505152", "#d0d1d2", "#fdfcfb"
MEMORIZED, GENERALIZED, OTHER = "#b00b02", "#0b5f02", "#8a8b8c"
COLOUR = {"memorized": MEMORIZED, "generalized": GENERALIZED, "other": OTHER}
VARIABLES = {"ink": INK, "muted": MUTED, "rule": RULE, "paper": PAPER, **COLOUR}
TONE = {direction: COLOUR[target] for direction, (target, _) in DIRECTIONS.items()}
DASHED, DOTTED, FINE = (0, (4, 2.5)), (0, (1, 2)), (0, (1, 3))
WIDTH = 348  # CSS pixels of every panel; a point of the drawing is a pixel of the page
ROW = 27  # pixels of a row of dots

Panel = Callable[[], Figure]
_ALONE = Lock()  # the library's settings are those of the whole process


def draw(name: str, label: str, panels: Sequence[Panel]) -> tuple[str, ...]:
    """SVG of every panel.

    Args:
        name: unique in the page; it seeds the identifiers inside the SVG.
        label: what a screen reader reads in place of the figure.
        panels: functions that make the figures.
    """
    drawn = []
    for number, panel in enumerate(panels, 1):
        with _ALONE, _style(f"{name}-{number}"):
            part = f" (part {number} of {len(panels)})" if len(panels) > 1 else ""
            drawn.append(_svg(panel(), label + part))
    return tuple(drawn)


def canvas(height: float, rows: int = 1, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """An empty panel of ``height`` pixels with its axes from top to bottom; ``heights`` are relative."""
    engine = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72, wspace=0.05, hspace=0.06)
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout=engine)
    return figure, list(figure.subplots(rows, 1, squeeze=False, height_ratios=heights)[:, 0])


# --- rows of dots --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """One row: a name, an estimate with its interval, and how it looks.

    Attributes:
        mark: a second value on the row, such as the worst draw; NaN for none.
        beside: (marker, value) of further points, such as controls.
    """

    name: str
    value: Estimate
    colour: str = INK
    hollow: bool = False
    mark: float = math.nan
    beside: tuple[tuple[str, float], ...] = ()


def dots_panel(
    title: str, dots: Sequence[Dot], reference: float | None = None, legend: Sequence[tuple[str, str]] = ()
) -> Panel:
    """Rows of dots with intervals, in per cent; the number stands at the right end of each.

    Args:
        title: or a direction, which has its own name and colour.
        reference: near what the axis is fitted to the data, with a line there; None: 0 to 100. At 0, numbers are changes.
        legend: (name, marker).
    """

    def plot() -> Figure:
        figure, (ax,) = canvas(ROW * max(1, len(dots)) + 58 + (17 * math.ceil(len(legend) / 2) + 8 if legend else 0))
        for height, dot in enumerate(dots):
            _dot(ax, height, dot, signed=reference == 0)
        name_rows(ax, [dot.name for dot in dots])
        _span(ax, dots, reference)
        entitle(ax, title)
        for name, marker in legend:
            ax.plot([], [], marker, color=OTHER, markersize=6, markeredgewidth=1.6 * (marker == "|"), label=name)
        if legend:
            figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=11, labelcolor=MUTED)
        return figure

    return plot


def entitle(ax: Axes, title: str) -> None:
    """The title of a panel; a direction has its own name and colour."""
    ax.set_title(TOWARDS.get(title, title), color=TONE.get(title, INK))


def name_rows(ax: Axes, names: Sequence[str], heights: Sequence[float] | None = None) -> None:
    """Names of rows from top to bottom, at 0, 1, ... unless ``heights`` are given."""
    places = list(range(len(names))) if heights is None else list(heights)
    ax.set_yticks(places, list(names))
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(max(places, default=0) + 0.6, -0.6)
    ax.grid(visible=False)


def _dot(ax: Axes, height: float, dot: Dot, signed: bool) -> None:
    middle, low, high = (100 * end for end in (dot.value.estimate, dot.value.low, dot.value.high))
    ax.axhline(height, color=RULE, linewidth=0.8, zorder=0)
    for marker, x in dot.beside:
        ax.plot(100 * x, height, marker, color=OTHER, markersize=5, alpha=0.9, markeredgewidth=0)
    if math.isnan(middle):
        ax.annotate(UNMEASURED, (0.02, height), xycoords=("axes fraction", "data"), va="center", color=MUTED)
        return
    ax.plot([low, high], [height, height], color=dot.colour, linewidth=3, alpha=0.45)
    ax.plot(100 * dot.mark, height, "|", color=MUTED, markersize=11, markeredgewidth=1.6)
    ax.plot(middle, height, "o", color=dot.colour, markerfacecolor=PAPER if dot.hollow else dot.colour, markersize=7)
    text = f"{round(middle):+d}" if signed and round(middle) else f"{round(middle)}"
    beside(ax, height, text)


def _span(ax: Axes, dots: Sequence[Dot], reference: float | None) -> None:
    if reference is None:
        ax.set_xlim(-2, 102)
        ax.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        return
    ends = [100 * x for dot in dots for x in (dot.value.low, dot.value.estimate, dot.value.high) if not math.isnan(x)]
    ax.axvline(reference, color=MUTED, linewidth=1, linestyle=FINE, zorder=0)
    ax.set_xlim(min([*ends, reference - 5]) - 2, max([*ends, reference + 5]) + 2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f} %" if reference else f"{x:.0f}")


# --- lines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A named line through estimates (with their intervals as a band) or plain numbers; undefined points are left out.

    Attributes:
        band: whether intervals are drawn.
        fill: whether the area below is.
    """

    name: str
    x: Sequence[float]
    values: Sequence[Estimate] | Sequence[float]
    colour: str = INK
    dash: Any = "-"
    width: float = 2
    band: bool = True
    fill: bool = False

    @property
    def heights(self) -> np.ndarray:
        """The values as numbers, NaN where undefined."""
        return np.array([v.estimate if isinstance(v, Estimate) else v for v in self.values], dtype=float)


@dataclass(frozen=True)
class Frame:
    """What surrounds lines: titles and axes.

    Attributes:
        title: or a direction, which has its own name and colour.
        ticks: of the x axis, by place; by default the layers.
        share: the y axis goes from 0 to 100 %.
        percent: the y axis is in per cent, fitted to the lines.
        chance: where a dotted horizontal line stands.
        gap: between two names at the ends of lines, as a share of the axis.
    """

    title: str = ""
    xlabel: str = "layer"
    ylabel: str = ""
    ticks: dict[float, str] | None = None
    share: bool = False
    percent: bool = False
    chance: float | None = None
    floor: float | None = None
    gap: float = 0.085


def lines_panel(lines: Sequence[Line], frame: Frame, height: float = 230) -> Panel:
    """A panel of lines whose names stand at their right ends."""

    def plot() -> Figure:
        figure, (ax,) = canvas(height)
        draw_lines(ax, lines, frame)
        return figure

    return plot


def draw_lines(ax: Axes, lines: Sequence[Line], frame: Frame) -> None:
    """The lines of a panel, on axes of its own."""
    for line in lines:
        x, known_N = np.asarray(line.x, dtype=float), ~np.isnan(line.heights)
        if line.band and known_N.any() and isinstance(line.values[0], Estimate):
            ends = np.array([(v.low, v.high) for v in line.values if isinstance(v, Estimate)])[known_N]
            ax.fill_between(x[known_N], ends[:, 0], ends[:, 1], color=line.colour, alpha=0.15, linewidth=0)
        if line.fill:
            ax.fill_between(x, line.heights, color=line.colour, alpha=0.1, linewidth=0)
        looks: dict[str, Any] = {"color": line.colour, "linestyle": line.dash, "linewidth": line.width}
        ax.plot(x[known_N], line.heights[known_N], **looks, marker="o", markersize=3.5 if len(x) < 40 else 0)
    if frame.share:
        ax.set_ylim(-0.03, 1.03)
        share_axis(ax.yaxis)
    if frame.percent:
        ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    if frame.floor is not None:
        ax.set_ylim(bottom=frame.floor if ax.dataLim.y0 >= frame.floor else None)
    if frame.chance is not None:
        ax.axhline(frame.chance, color=MUTED, linewidth=1, linestyle=FINE, zorder=0)
    ticks = frame.ticks
    if ticks is None and lines:
        every = math.ceil(len(lines[0].x) / 8)
        ticks = {x: f"{x:.0f}" for x in list(lines[0].x)[::every]}
    if ticks:
        ax.set_xticks(list(ticks), list(ticks.values()))
    _name_ends(ax, lines, frame.gap)
    ax.set(xlabel=frame.xlabel, ylabel=frame.ylabel)
    ax.grid(axis="x", visible=False)
    entitle(ax, frame.title)


def _name_ends(ax: Axes, lines: Sequence[Line], gap: float) -> None:
    named = [(line, line.heights[~np.isnan(line.heights)][-1]) for line in lines if not np.isnan(line.heights).all()]
    named = [entry for entry in named if entry[0].name]
    low, high = ax.get_ylim()
    heights = apart([float(end) for _, end in named], gap * (high - low), low)
    for (line, _), height in zip(named, heights, strict=True):
        beside(ax, height, line.name, MUTED if line.colour == OTHER else line.colour)


def beside(ax: Axes, height: float, text: str, colour: str = INK) -> None:
    """Text right of the axes at a height."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    ax.annotate(text, (1, height), (6, 0), va="center", color=colour, annotation_clip=False, **place)


def share_axis(axis: Any) -> None:
    """Mark an axis of shares in whole per cent."""
    axis.set_ticks(np.arange(0, 1.01, 0.25), [f"{25 * quarter} %" for quarter in range(5)])


def apart(heights: Sequence[float], gap: float, lowest: float = -np.inf) -> list[float]:
    """Heights of labels that were to stand at ``heights``, moved until neighbours keep ``gap``, none below ``lowest``."""
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


# --- maps ----------------------------------------------------------------------------------------------------------


def draw_cells(
    ax: Axes, values: np.ndarray, colour: str, texts: Any = None, at: tuple[float, float] = (0.0, 0.0)
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


# --- SVG -----------------------------------------------------------------------------------------------------------


def _style(name: str) -> AbstractContextManager[None]:
    """The settings of every figure; ``name`` salts the identifiers, which must not repeat in a page."""
    sizes = {"font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "lines.linewidth": 2.2, "grid.linewidth": 0.8}
    colours = dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED)
    colours |= dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), RULE)
    colours |= dict.fromkeys(("text.color", "axes.titlecolor"), INK)
    colours |= dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")
    axes = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    axes |= {"axes.titlelocation": "left", "axes.titleweight": "bold", "axes.axisbelow": True}
    axes |= {"axes.grid": True, "axes.grid.axis": "y", "ytick.major.size": 0, "lines.solid_capstyle": "round"}
    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, **sizes, **colours, **axes})


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
    for variable, colour in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)  # a hundredth of a pixel will do
    head = f'<svg class="plot" role="img" aria-label="{escape(label, quote=True)}" style="width:{WIDTH}px"'
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf"{head} \1", text, count=1).strip()
