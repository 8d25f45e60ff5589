"""Figures of steering; each function returns a plot for ``style.draw``."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.figures import Plot
from mnemoscope.report.measures import DIRECTIONS, TURNED
from mnemoscope.report.style import COLOUR, INK, MUTED, OTHER, PAPER, beside, canvas, percent_axis, spread

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
        height = 30 * len(TURNED) * (len(names) + 1) + 74
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
    return any(not np.isnan(controls[examples]["shift"]["estimate"]) for examples in TURNED if examples in controls)


def _rows(block: dict[str, Any], names: list[str]) -> list[tuple[float, str, dict[str, Any]]]:
    """(height, name, shares) from top to bottom, with a gap between pairs and conflicts."""
    rows: list[tuple[float, str, dict[str, Any]]] = []
    for number, examples in enumerate(TURNED):
        top = number * (len(names) + 1.5)
        rows.append((top, EXAMPLES[examples], block[examples]))
        rows += [(top + i, control_name(name), block["controls"][name][examples]) for i, name in enumerate(names, 1)]
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
    for number, examples in enumerate(TURNED):
        shifts = [block[examples]["shift"]["estimate"] for block in blocks]
        height = number * (controls + 1.5)
        ax.plot(shifts, [height] * len(shifts), "o", color=PAPER, markeredgecolor=INK, markersize=5, linestyle="none")


def sweep_rows(task: dict[str, Any], direction: str, examples: str = "pairs") -> list[dict[str, Any]]:
    """The vector's rows of the sweep, of the method that was chosen, in one direction."""
    method = task["steering"][direction]["chosen"]["method"]
    wanted = {"direction": direction, "method": method, "role": "vector", "examples": examples}
    return [row for row in task["sweep"] if all(row[key] == value for key, value in wanted.items())]


def sweep(task: dict[str, Any]) -> Plot:
    """Shift (above) and other (below) against strength, a line for each share of neurons; tune split."""
    rows = [row for direction in DIRECTIONS for row in sweep_rows(task, direction)]
    tops = {key: 1.0 if max(row[key]["estimate"] for row in rows) > 0.48 else 0.5 for key in ("shift", "other")}

    def plot(narrow: bool) -> Figure:
        if narrow:
            figure, axes = canvas(narrow, 760, 4, 1, [2, 1, 2, 1])
            grid = [(axes[0, 0], axes[1, 0]), (axes[2, 0], axes[3, 0])]
        else:
            figure, axes = canvas(narrow, 400, 2, 2, [2, 1])
            grid = [(axes[0, 0], axes[1, 0]), (axes[0, 1], axes[1, 1])]
        for direction, (above, below) in zip(DIRECTIONS, grid, strict=True):
            _sweep_lines(above, task, direction, "shift", tops["shift"])
            _sweep_lines(below, task, direction, "other", tops["other"])
            above.set_title(TITLES[direction], color=COLOUR[DIRECTIONS[direction][0]])
            above.set_ylabel("shift")
            below.set_ylabel("other")
            below.set_xlabel("strength")
        return figure

    return plot


def _sweep_lines(ax: Axes, task: dict[str, Any], direction: str, share: str, reach: float) -> None:
    rows = sweep_rows(task, direction)
    chosen = task["steering"][direction]["chosen"]
    colour = COLOUR[DIRECTIONS[direction][0]] if share == "shift" else OTHER
    tops = sorted({row["top"] for row in rows})
    strengths = sorted({row["strength"] for row in rows})
    ends = []
    for number, top in enumerate(tops):
        line = sorted((row["strength"], row[share]["estimate"]) for row in rows if row["top"] == top)
        x = [strengths.index(strength) for strength, _ in line]
        y = [estimate for _, estimate in line]
        ax.plot(
            x,
            y,
            color=colour,
            marker="o",
            markersize=3.5,
            alpha=0.35 + 0.65 * (number + 1) / len(tops),
            linewidth=1 + 1.4 * (number + 1) / len(tops),
        )
        ends.append((x[-1], y[-1], f"{100 * top:g} %" if top < 1 else "all"))
        if np.isclose(top, chosen["top"]) and chosen["strength"] in strengths:
            ax.plot(
                strengths.index(chosen["strength"]),
                dict(line)[chosen["strength"]],
                "o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=INK,
                markeredgewidth=1.5,
                clip_on=False,
            )
    if share == "shift":
        for (x_end, _, text), height in zip(ends, spread([end[1] for end in ends], 0.09 * reach, 0), strict=True):
            beside(ax, x_end, height, text, MUTED, 10)
    ax.set_ylim(-0.03 * reach, 1.03 * reach)
    percent_axis(ax, top=reach)
    ax.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    ax.grid(axis="x", visible=False)


def dose(task: dict[str, Any]) -> Plot:
    """Mean margin against strength at the chosen share of neurons: above 0 the worked-out answer is likelier."""

    def plot(narrow: bool) -> Figure:
        figure, axes = canvas(narrow, 290)
        ax: Axes = axes[0, 0]
        ax.axhline(0, color=INK, linewidth=1)
        for direction, (target, _) in DIRECTIONS.items():
            top = task["steering"][direction]["chosen"]["top"]
            rows = [row for row in sweep_rows(task, direction) if np.isclose(row["top"], top)]
            line = {0.0: task["unsteered_margin"][direction], **{row["strength"]: row["margin"] for row in rows}}
            x = np.array(sorted(line))
            middle, low, high = (np.array([line[s][key] for s in x]) for key in ("estimate", "low", "high"))
            ax.fill_between(x, low, high, color=COLOUR[target], alpha=0.15, linewidth=0)
            ax.plot(x, middle, color=COLOUR[target], marker="o", markersize=4)
            text = TITLES[direction].replace("towards ", "towards\n") if narrow else TITLES[direction]
            beside(ax, x[-1], middle[-1], text, COLOUR[target])
        ax.set_xlabel("strength")
        ax.set_ylabel("mean margin, nats")
        ax.grid(axis="x", visible=False)
        return figure

    return plot
