"""Figures of training, behaviour, contrast and probes; each function returns a plot for ``style.draw``.

Shapes: L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnemoscope.report.records import Cell, Contrast
from mnemoscope.report.style import (
    COLOUR,
    GENERALIZED,
    INK,
    MEMORIZED,
    MUTED,
    OTHER,
    PAPER,
    PIXEL_GENERALIZED,
    PIXEL_MEMORIZED,
    RULE,
    beside,
    canvas,
    percent_axis,
    spread,
)

Plot = Callable[[bool], Figure]

CURVES = (
    ("novel_accuracy", "new questions right", GENERALIZED, (0, (4, 2.5))),
    ("recall", "facts recalled", MEMORIZED, (0, (4, 2.5))),
    ("conflict_generalized", "conflict: worked out", GENERALIZED, "-"),
    ("conflict_memorized", "conflict: remembered", MEMORIZED, "-"),
    ("conflict_other", "conflict: other", OTHER, "-"),
)
NAMES = {"memorized": "remembered", "generalized": "worked out", "other": "other"}


def emergence(cells: Sequence[Cell]) -> Plot:
    """Accuracy, recall and shares of behaviours while the model trains; the first cell bold, other seeds faint."""
    trained = [cell.training for cell in cells if cell.training is not None]

    def plot(narrow: bool) -> Figure:
        figure, axes = canvas(narrow, 300 if narrow else 330)
        ax: Axes = axes[0, 0]
        for table in trained[1:]:
            for column, _, colour, dash in CURVES:
                ax.plot(table.step, table[column], color=colour, linestyle=dash, linewidth=1, alpha=0.35)
        first = trained[0]
        for column, _, colour, dash in CURVES:
            ax.plot(first.step, first[column], color=colour, linestyle=dash)
        _mark_kept(ax, first)
        _label_ends(ax, first, narrow)
        ax.set_ylim(-0.03, 1.16)
        percent_axis(ax)
        ax.set_xlabel("optimizer steps")
        ax.grid(axis="x", visible=False)
        return figure

    return plot


def _mark_kept(ax: Axes, table: Any) -> None:
    met = table[table.met.astype(bool)]
    ax.plot(met.step, np.full(len(met), 1.1), "o", color=MUTED, markersize=3, linestyle="none")
    if len(met):
        ax.annotate(
            "stop rule met", (met.step.iloc[0], 1.1), (-8, 0), textcoords="offset points", ha="right", va="center"
        )
    kept = table[table.kept.astype(bool)]
    if len(kept):
        ax.plot([kept.step.iloc[0]] * 2, [0, 1.16], color=INK, linewidth=1)
        ax.annotate(
            "kept", (kept.step.iloc[0], 1.16), (0, 3), textcoords="offset points", ha="center", annotation_clip=False
        )


def _label_ends(ax: Axes, table: Any, narrow: bool) -> None:
    """Names at the right end of the lines, moved apart where they would overlap."""
    known = [(*curve, float(table[curve[0]].iloc[-1])) for curve in CURVES if not np.isnan(table[curve[0]].iloc[-1])]
    heights = spread([curve[-1] for curve in known], 0.075)
    x = table.step.iloc[-1]
    for (_, name, colour, _, _), height in zip(known, heights, strict=True):
        text = name.replace(": ", ":\n").replace(" questions", "\n") if narrow else name
        text = name.replace("conflict: ", "").replace("new questions right", "new right") if narrow else text
        beside(ax, x, height, text, colour)


def behaviour_bars(behaviour: dict[str, Any]) -> Plot:
    """Three bars: new questions, memory questions, and what conflicts are answered with."""
    rows = (
        ("New questions", [("right", behaviour["novel_accuracy"], GENERALIZED)]),
        ("Facts to recall", [("right", behaviour["recall"], MEMORIZED)]),
        ("Conflicts", [(NAMES[key], behaviour["conflict"][key], COLOUR[key]) for key in NAMES]),
    )

    def plot(narrow: bool) -> Figure:
        figure, axes = canvas(narrow, 200 if narrow else 190)
        ax: Axes = axes[0, 0]
        for row, (_, parts) in enumerate(rows):
            ax.barh(row, 1, height=0.62, color=RULE, alpha=0.45)
            _stack(ax, row, [(name, share["estimate"], colour) for name, share, colour in parts], narrow)
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.tick_params(axis="y", labelcolor=INK)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(0, 1)
        percent_axis(ax, "x")
        ax.grid(visible=False)
        return figure

    return plot


def _stack(ax: Axes, row: float, parts: list[tuple[str, float, str]], narrow: bool) -> None:
    """One stacked bar; a part names itself where it is long enough for the words."""
    start = 0.0
    for name, share, colour in parts:
        if np.isnan(share):
            ax.text(0.02, row, "not measured", va="center", color=MUTED)
            return
        ax.barh(row, share, left=start, height=0.62, color=colour, edgecolor=PAPER, linewidth=1)
        text = f"{name} {100 * share:.0f} %"
        if share * (230 if narrow else 580) > 7 * len(text):
            ax.text(start + share / 2, row, text, ha="center", va="center", color=PAPER)
        start += share


def margins(cells: Sequence[Cell]) -> Plot:
    """How decided the model is on each conflict: log odds of the two answers, coloured by what it answered."""
    conflict = [
        cell.behaviour[(cell.behaviour.kind == "conflict") & (cell.behaviour.split == "test")] for cell in cells
    ]
    parts = {
        key: np.concatenate([rows.margin[rows.behaviour == key].to_numpy(float) for rows in conflict]) for key in NAMES
    }
    everything = np.concatenate(list(parts.values()))
    everything = everything[np.isfinite(everything)]

    def plot(narrow: bool) -> Figure:
        figure, axes = canvas(narrow, 250)
        ax: Axes = axes[0, 0]
        reach = max(float(np.quantile(np.abs(everything), 0.99)), 1e-6) if len(everything) else 1.0
        bins = np.linspace(-reach, reach, 25 if narrow else 45)  # an odd number of edges: one of them is 0
        values = [np.clip(part[np.isfinite(part)], -reach, reach) for part in parts.values()]
        ax.hist(
            values,
            bins=bins.tolist(),
            stacked=True,
            color=[COLOUR[key] for key in parts],
            edgecolor=PAPER,
            linewidth=0.6,
        )
        ax.axvline(0, color=INK, linewidth=1)
        ax.set_ylabel("conflicts")
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("nats towards the answer worked out" if narrow else "log p(worked out) - log p(remembered), nats")
        ax.grid(axis="x", visible=False)
        return figure

    return plot


def heatmap(contrast: Contrast) -> Plot:
    """NMD, one strip per layer, neurons sorted within the layer; colour is transparent at 0."""
    nmd_LD = np.sort(contrast.nmd, axis=1)
    reach = heatmap_reach(contrast)
    layers, neurons = nmd_LD.shape
    largest = max(float(np.nanmax(np.nanmean(np.abs(nmd_LD), axis=1))), 1e-9)
    digits = max(0, 1 - int(np.floor(np.log10(largest))))  # two that count, for the largest

    def plot(narrow: bool) -> Figure:
        strip = min(34, max(9, 300 / layers))
        every = int(np.ceil(16 / strip))  # a line of text takes 16 pixels
        figure, axes = canvas(narrow, strip * layers + 96, 2, 1, [strip * layers + 40, 14])
        ax, scale = axes[:, 0]
        for layer, row in enumerate(nmd_LD):
            ax.imshow(
                diverging(row[None] / reach),
                aspect="auto",
                interpolation="none",
                extent=(0, neurons, layer + 0.42, layer - 0.42),
            )
            if layer % every == 0:
                beside(ax, neurons, layer, f"{np.nanmean(np.abs(row)):.{digits}f}", MUTED, 6)
        ax.annotate(
            "mean |NMD|",
            (1, 1),
            (6, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            color=MUTED,
            annotation_clip=False,
        )
        ax.set_yticks(range(0, layers, every), [f"layer {n}" for n in range(0, layers, every)])
        ax.set_ylim(layers - 0.4, -0.6)
        ax.set_xlim(0, neurons)
        ax.set_xticks([0, neurons], ["lowest NMD", "highest NMD"])
        _align_ends(ax)
        ax.grid(visible=False)
        ax.spines["bottom"].set_visible(False)
        _scale(scale, reach)
        return figure

    return plot


def heatmap_reach(contrast: Contrast) -> float:
    """The |NMD| at which colour is full: 99.5 % of all neurons lie below."""
    known = np.abs(contrast.nmd[~np.isnan(contrast.nmd)])
    return max(float(np.quantile(known, 0.995)), 1e-12) if len(known) else 1.0


def diverging(values: np.ndarray) -> np.ndarray:
    """RGBA of values in -1 .. 1: the colour of remembering below 0, of working out above, clear at 0 and for NaN."""
    values = np.clip(np.nan_to_num(values), -1, 1)
    pixels = np.empty((*values.shape, 4))
    pixels[..., :3] = np.where(values[..., None] < 0, PIXEL_MEMORIZED, PIXEL_GENERALIZED)
    pixels[..., 3] = np.abs(values) ** 0.75
    return pixels


def _align_ends(ax: Axes) -> None:
    """Keep the outer labels of an axis within its width."""
    labels = ax.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")


def _scale(ax: Axes, reach: float) -> None:
    ax.imshow(diverging(np.linspace(-1, 1, 101)[None]), aspect="auto", interpolation="none", extent=(-1, 1, 0, 1))
    ax.set_yticks([])
    ax.set_xticks([-1, 0, 1], [f"remembering {reach:.2g}", "0", f"{reach:.2g} working it out"])
    _align_ends(ax)
    ax.grid(visible=False)


QUANTILES = ((0.5, "median"), (0.9, "90 %"), (0.99, "99 %"))


def correlations(contrast: Contrast) -> Plot:
    """|rho| by layer: the strongest neuron and the quantiles of all."""
    rho_LD = np.abs(contrast.rho)
    layers = np.arange(len(rho_LD))
    top = _quantile(rho_LD, 1)

    def plot(narrow: bool) -> Figure:
        figure, axes = canvas(narrow, 270)
        ax: Axes = axes[0, 0]
        lines = [(top, "strongest neuron", INK, 2.2)]
        lines += [(_quantile(rho_LD, q), name, OTHER, 1.4) for q, name in reversed(QUANTILES)]
        for number, (heights, _, colour, width) in enumerate(lines):
            ax.fill_between(layers, heights, color=colour, alpha=0.10 if number else 0.12, linewidth=0)
            ax.plot(layers, heights, color=colour, linewidth=width, marker="o", markersize=4)
        gap = float(np.nanmax(top)) * 0.085
        ends = spread([float(heights[-1]) for heights, *_ in lines], gap)
        for (_, name, colour, _), height in zip(lines, ends, strict=True):
            text = name.replace(" neuron", "") if narrow else name
            shade = MUTED if colour == OTHER else colour
            beside(ax, layers[-1], height, text, shade)
        ax.set_ylim(0, float(np.nanmax(top)) * 1.08)
        ax.set_ylabel("|rho|")
        layer_axis(ax, layers)
        return figure

    return plot


def _quantile(values_LD: np.ndarray, q: float) -> np.ndarray:
    """Quantile of each layer's defined values, shape (L,); a neuron that never changes has no correlation."""
    known = [row[~np.isnan(row)] for row in values_LD]
    return np.array([np.quantile(row, q) if len(row) else np.nan for row in known])


def layer_axis(ax: Axes, layers: Sequence[int] | np.ndarray) -> None:
    """Mark the layers, not more than about eight of them."""
    every = int(np.ceil(len(layers) / 8))
    ax.set_xticks(list(layers)[::every], [str(layer) for layer in list(layers)[::every]])
    ax.set_xlabel("layer")
    ax.grid(axis="x", visible=False)


def probes(probe: dict[str, Any]) -> Plot:
    """Accuracy of the probe by layer with intervals, beside the input alone, shuffled labels and chance."""
    layers = np.array(probe["layers"])

    def plot(narrow: bool) -> Figure:
        figure, axes = canvas(narrow, 300)
        ax: Axes = axes[0, 0]
        alone = probe["input_only"]
        if not np.isnan(alone["low"]):
            ax.axhspan(alone["low"], alone["high"], color=OTHER, alpha=0.18, linewidth=0)
        ax.axhline(alone["estimate"], color=OTHER, linewidth=1.5)
        ax.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (1, 3)))
        dots(ax, layers, probe["shuffled_by_layer"], OTHER, hollow=True)
        dots(ax, layers, probe["accuracy"], INK, hollow=False)
        _limits(ax, probe)
        layer_axis(ax, layers)
        ax.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
        _name_lines(ax, probe)
        return figure

    return plot


def dots(ax: Axes, x: np.ndarray, estimates: list[dict[str, Any]], colour: str, *, hollow: bool) -> None:
    """Points with their intervals, joined by a thin line."""
    middle, low, high = (np.array([e[key] for e in estimates], dtype=float) for key in ("estimate", "low", "high"))
    small = len(x) > 12
    ax.plot(x, middle, color=colour, linewidth=1.2, alpha=0.6)
    if not (small and hollow):
        ax.vlines(x, low, high, color=colour, linewidth=1.2 if hollow else 1.6 if small else 3, alpha=0.7)
        size = 4 if small else 7
        ax.plot(x, middle, "o", color=colour, markersize=size, markerfacecolor=PAPER if hollow else colour)


def _name_lines(ax: Axes, probe: dict[str, Any]) -> None:
    named = [
        ("the state", probe["accuracy"][-1]["estimate"], INK),
        ("the input alone", probe["input_only"]["estimate"], MUTED),
        ("shuffled labels", probe["shuffled_by_layer"][-1]["estimate"], MUTED),
    ]
    named = [entry for entry in named if not np.isnan(entry[1])]
    low, high = ax.get_ylim()
    for (name, _, colour), height in zip(
        named, spread([entry[1] for entry in named], 0.07 * (high - low)), strict=True
    ):
        ax.annotate(
            name,
            (1, height),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def _limits(ax: Axes, probe: dict[str, Any]) -> None:
    ends = [
        e[key]
        for e in [*probe["accuracy"], *probe["shuffled_by_layer"], probe["input_only"]]
        for key in ("low", "high")
    ]
    known = [end for end in ends if not np.isnan(end)] or [0.4, 1.0]
    low, high = max(0, min(known) - 0.03), min(1.0, max(known) + 0.03)
    ax.set_ylim(low, high + 0.005)
    step = 0.1 if high - low > 0.25 else 0.05
    ticks = np.arange(np.ceil(low / step), np.floor(high / step + 1e-9) + 1) * step
    ax.set_yticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])
