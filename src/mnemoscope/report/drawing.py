"""One look for all figures: inline SVG panels of one width, whose colours are CSS variables of the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from itertools import pairwise, product
from threading import Lock
from typing import Any, Literal

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mnemoscope.report.words import TOWARDS, UNMEASURED
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import Estimate

# Stand-ins that no other drawing uses; each becomes a CSS variable in the SVG.
INK, MUTED, RULE, PAPER = "#101112", "#505152", "#d0d1d2", "#fdfcfb"
MEMORIZED, GENERALIZED, OTHER = "#b00b02", "#0b5f02", "#8a8b8c"
COLOUR = {"memorized": MEMORIZED, "generalized": GENERALIZED, "other": OTHER}
VARIABLES = {"ink": INK, "muted": MUTED, "rule": RULE, "paper": PAPER, **COLOUR}
TONE: dict[str, str] = {toward.direction: COLOUR[toward] for toward in Toward}
DASHED, DOTTED, FINE = (0, (4, 2.5)), (0, (1, 2)), (0, (1, 3))
WIDTH = 348  # CSS pixels of every panel; a point of the drawing is a pixel of the page
ROW = 27  # pixels of a row of dots

Panel = Callable[[], Figure]
_ALONE = Lock()  # the library's settings are those of the whole process


def draw(name: str, label: str, panels: Sequence[Panel], documents: bool = False) -> tuple[str, ...]:
    """SVG of every panel, under a name that no other figure of the page has, with a label for screen readers.

    ``documents``: whether the task quotes some, so that a direction that stands in a title is one to context or memory.
    """
    drawn = []
    for number, panel in enumerate(panels, 1):
        with _ALONE, _style(f"{name}-{number}"):
            part = f" (part {number} of {len(panels)})" if len(panels) > 1 else ""
            drawn.append(_svg(_named(panel(), documents), label + part))
    return tuple(drawn)


def _named(figure: Figure, documents: bool) -> Figure:
    """The figure, in whose titles a direction has its words and its colour."""
    for ax, (direction, words) in product(figure.axes, TOWARDS[documents].items()):
        if direction in (title := ax.get_title(loc="left")):
            ax.set_title(title.replace(direction, words), color=TONE[direction])
    return figure


def png(panels: Sequence[Panel]) -> bytes:
    """Panels one below the other in one picture, on the paper of the light theme."""
    parts = []
    with _ALONE, _style("picture"):
        for panel in panels:
            buffer = io.BytesIO()
            panel().savefig(buffer, format="png", dpi=144, facecolor=PAPER)
            parts.append(matplotlib.image.imread(io.BytesIO(buffer.getvalue())))
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.concatenate(parts), format="png")
    return buffer.getvalue()


def canvas(height: float, title: str = "") -> tuple[Figure, Axes]:
    """An empty panel of ``height`` pixels."""
    engine = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72, wspace=0.05, hspace=0.06)
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout=engine)
    ax = figure.subplots()
    ax.set_title(title)
    return figure, ax


@dataclass(frozen=True)
class Dot:
    """A row: an estimate with its interval; ``mark`` is a tick on it, ``beside`` has (marker, value) of others."""

    name: str
    value: Estimate
    colour: str = INK
    hollow: bool = False
    mark: float = math.nan
    beside: tuple[tuple[str, float], ...] = ()


def against(first: str, found: dict[str, Estimate], colour: str = INK) -> list[Dot]:
    """Rows of what is known: the first named in its colour, what it has to beat hollow and grey."""
    known = {name: value for name, value in found.items() if value.known}
    return [Dot(name, v, *((colour, False) if name == first else (OTHER, True))) for name, v in known.items()]


def dots_panel(
    title: str, dots: Sequence[Dot], reference: float | None = None, legend: Sequence[tuple[str, str]] = ()
) -> Panel:
    """Rows of dots with intervals, in per cent; the number stands at the right end of each.

    Args:
        reference: what the axis is fitted around, with a line there; None: 0 to 100. Around 0, numbers are changes.
        legend: (name, marker).
    """

    def plot() -> Figure:
        height = ROW * max(1, len(dots)) + 58 + (17 * math.ceil(len(legend) / 2) + 8 if legend else 0)
        figure, ax = canvas(height, title)
        for height, dot in enumerate(dots):
            _dot(ax, height, dot, signed=reference == 0)
        name_rows(ax, [dot.name for dot in dots])
        _span(ax, dots, reference)
        for name, marker in legend:
            ax.plot([], [], marker, color=OTHER, markersize=6, markeredgewidth=1.5 * (marker in "x|"), label=name)
        if legend:
            figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=11, labelcolor=MUTED)
        return figure

    return plot


def name_rows(ax: Axes, names: Sequence[str], every: int = 1) -> None:
    """Names of rows from top to bottom; one of ``every`` so many rows has a name."""
    ax.set_yticks(range(0, every * len(names), every), list(names))
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(every * len(names) - 0.4, -0.6)
    ax.grid(visible=False)


def _dot(ax: Axes, height: float, dot: Dot, signed: bool) -> None:
    middle, low, high = (100 * end for end in (dot.value.estimate, dot.value.low, dot.value.high))
    ax.axhline(height, color=RULE, linewidth=0.8, zorder=0)
    for marker, x in dot.beside:
        ax.plot(100 * x, height, marker, color=OTHER, markersize=5, alpha=0.9, markeredgewidth=1.4 * (marker == "x"))
    if math.isnan(middle):
        ax.annotate(UNMEASURED, (0.02, height), xycoords=("axes fraction", "data"), va="center", color=MUTED)
        return
    ax.plot([low, high], [height, height], color=dot.colour, linewidth=3, alpha=0.45)
    ax.plot(100 * dot.mark, height, "|", color=MUTED, markersize=11, markeredgewidth=1.6)
    ax.plot(middle, height, "o", color=dot.colour, markerfacecolor=PAPER if dot.hollow else dot.colour, markersize=7)
    beside(ax, height, f"{round(middle):+d}" if signed and round(middle) else f"{round(middle)}")


def _span(ax: Axes, dots: Sequence[Dot], reference: float | None) -> None:
    if reference is None:
        ax.set_xlim(-2, 102)
        ax.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        return
    ends = [100 * x for dot in dots for x in (dot.value.low, dot.value.estimate, dot.value.high) if not math.isnan(x)]
    ax.axvline(reference, color=MUTED, linewidth=1, linestyle=FINE, zorder=0)
    # Student's t over seeds may leave what a share, or a difference of shares, can be.
    ax.set_xlim(max(reference - 102, min([*ends, reference - 5]) - 2), min(102, max([*ends, reference + 5]) + 2))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f} %" if reference else f"{x:.0f}")


@dataclass(frozen=True)
class Line:
    """A named line through estimates (with their intervals as a ``band``) or numbers; ``fill``: the area below."""

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


def lines_panel(
    title: str,
    lines: Sequence[Line],
    xlabel: str = "layer",
    ylabel: str = "",
    ticks: Mapping[Any, str] | None = None,
    chance: float | None = None,
    axis: Literal["plain", "percent", "share"] = "plain",
) -> Panel:
    """A panel of lines whose names stand at their right ends.

    Args:
        ticks: of the x axis, by place.
        chance: where a dotted horizontal line stands.
        axis: ``percent`` fits per cent to the lines, ``share`` goes from 0 to 100 %; else it begins at 0 where it can.
    """

    def plot() -> Figure:
        figure, ax = canvas(230, title)
        for line in lines:
            _line(ax, line)
        if axis == "share":
            ax.set_ylim(-0.03, 1.03)
            ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        elif axis == "percent":
            low, high = ax.get_ylim()
            ax.set_ylim(max(-0.02, low), min(1.02, high))
        elif ax.dataLim.y0 >= 0:
            ax.set_ylim(bottom=0)
        if axis != "plain":
            ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
        if chance is not None:
            ax.axhline(chance, color=MUTED, linewidth=1, linestyle=FINE, zorder=0)
        x = list(lines[0].x)
        places = ticks or {place: f"{place:g}" for place in x[:: math.ceil(len(x) / 8)]}
        ax.set_xticks(list(places), list(places.values()))
        _name_ends(ax, lines)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.grid(axis="x", visible=False)
        return figure

    return plot


def _line(ax: Axes, line: Line) -> None:
    x, known_N = np.asarray(line.x, dtype=float), ~np.isnan(line.heights)
    if line.band and known_N.any() and isinstance(line.values[0], Estimate):
        ends = np.array([(v.low, v.high) for v in line.values if isinstance(v, Estimate)])[known_N]
        ax.fill_between(x[known_N], ends[:, 0], ends[:, 1], color=line.colour, alpha=0.15, linewidth=0)
    if line.fill:
        ax.fill_between(x, line.heights, color=line.colour, alpha=0.1, linewidth=0)
    looks: dict[str, Any] = {"color": line.colour, "linestyle": line.dash, "linewidth": line.width}
    ax.plot(x[known_N], line.heights[known_N], **looks, marker="o", markersize=3.5 if line.width else 0)


def _name_ends(ax: Axes, lines: Sequence[Line]) -> None:
    """Names right of the last known points, moved up where they would overlap."""
    named = [line for line in lines if line.name and not np.isnan(line.heights).all()]
    places = np.array([line.heights[~np.isnan(line.heights)][-1] for line in named])
    low, high = ax.get_ylim()
    for below, above in pairwise(np.argsort(places, kind="stable")):
        places[above] = max(places[above], places[below] + 15 / 180 * (high - low))
    for line, height in zip(named, places.tolist(), strict=True):
        beside(ax, height, line.name, MUTED if line.colour == OTHER else line.colour)


def beside(ax: Axes, height: float, text: str, colour: str = INK) -> None:
    """Text right of the axes at a height."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    ax.annotate(text, (1, height), (6, 0), va="center", color=colour, annotation_clip=False, **place)


def _style(name: str) -> AbstractContextManager[None]:
    """The settings of every figure; ``name`` salts the identifiers, which must not repeat in a page."""
    sizes = {"font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "lines.linewidth": 2.2, "grid.linewidth": 0.8}
    colours = dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED)
    colours |= dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), RULE)
    colours |= dict.fromkeys(("text.color", "axes.titlecolor"), INK)
    colours |= dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")
    axes: dict[str, Any] = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    axes |= {"axes.titlelocation": "left", "axes.titleweight": "bold", "axes.axisbelow": True}
    axes |= {"axes.grid": True, "axes.grid.axis": "y", "ytick.major.size": 0, "lines.solid_capstyle": "round"}
    axes["text.parse_math"] = False  # names are texts, whatever signs they have
    looks: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, **sizes, **colours, **axes}
    return matplotlib.rc_context(looks)


def _svg(figure: Figure, label: str) -> str:
    """The drawing as an inline ``<svg>``: no prologue, no style sheet, no names that repeat, theme colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # savefig would draw everything twice
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    nothing_new = r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>| xmlns(?::xlink)?=\"[^\"]*\""
    text = re.sub(nothing_new, "", text, flags=re.DOTALL).replace("xlink:href", "href")  # HTML knows both names
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text))
    for variable, colour in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)  # a hundredth of a pixel will do
    head = f'<svg class="plot" role="img" aria-label="{escape(label, quote=True)}" style="width:{WIDTH}px"'
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf"{head} \1", text, count=1).strip()
