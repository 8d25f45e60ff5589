"""Figures that set the ways of turning side by side: methods at equal norm, cost, simpler ways."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.figures_parts import ROW, Dot, Panel, dot_rows, panel
from mnemoscope.report.figures_steering import TITLES, control_name
from mnemoscope.report.records import CONTROLS, DIRECTIONS
from mnemoscope.report.sentences import NAMES, SHORT_NAMES, known, strongest_control
from mnemoscope.report.style import COLOUR, INK, MUTED, OTHER

MARKERS = dict(zip(CONTROLS, ("o", "v", "s", "^", "D"), strict=True))


def methods(task: dict[str, Any], aim: str) -> list[Panel]:
    """By direction: each method's shift as a dot, its five controls as small marks, the worst draw of any as a tick."""
    return [_methods_panel(task["steering_by_method"], direction, aim) for direction in DIRECTIONS]


def _methods_panel(by_method: dict[str, Any], direction: str, aim: str) -> Panel:
    blocks = {method: found[direction] for method, found in by_method.items() if direction in found}
    order = sorted(blocks, key=lambda m: -np.nan_to_num(blocks[m][aim]["shift"]["estimate"], nan=-1))
    target = DIRECTIONS[direction][0]

    def plot() -> Figure:
        figure, (ax,) = panel(ROW * len(order) + 128)
        dots = [Dot(m, blocks[m][aim]["shift"], COLOUR[target], mark=_worst(blocks[m], aim)) for m in order]
        for height, method in enumerate(order):
            for name, marker in MARKERS.items():
                x = 100 * blocks[method]["controls"][name][aim]["shift"]["estimate"]
                ax.plot(x, height, marker, color=OTHER, markersize=5, alpha=0.9, markeredgewidth=0)
        dot_rows(ax, dots)
        _shares_axis(ax)
        ax.set_title(TITLES[direction], color=COLOUR[target])
        for name, marker in MARKERS.items():
            ax.plot([], [], marker, color=OTHER, markersize=5, markeredgewidth=0, label=control_name(name))
        ax.plot([], [], "|", color=MUTED, markersize=10, markeredgewidth=1.6, label="worst draw of any")
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=11, labelcolor=MUTED)
        return figure

    return plot


def _shares_axis(ax: Axes) -> None:
    ax.set_xlim(-2, 102)
    ax.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])


def _worst(block: dict[str, Any], aim: str) -> float:
    shifts = [control["worst"][aim]["shift"]["estimate"] for control in block["controls"].values()]
    return float(np.nanmax(shifts)) if not np.isnan(shifts).all() else float("nan")


def cost(task: dict[str, Any]) -> list[Panel]:
    """By direction: change in what should stay as it is, under the setting for pairs and under that for conflicts."""
    return [_cost_panel(task["steering"][direction], direction) for direction in DIRECTIONS]


def _cost_panel(block: dict[str, Any], direction: str) -> Panel:
    groups = (("pairs", block["collateral"], False), ("conflicts", block["collateral_conflict"], True))
    dots = [
        Dot(NAMES[key], changes[key], INK if key in _counted(direction) else OTHER, hollow)
        for key in NAMES
        for _, changes, hollow in groups
    ]

    def plot() -> Figure:
        figure, (ax,) = panel(ROW * len(dots) + 84)
        dot_rows(ax, dots, sign=True)
        ax.set_yticks([0.5 + 2 * n for n in range(len(NAMES))], list(SHORT_NAMES.values()))
        ax.axvline(0, color=INK, linewidth=1, zorder=0)
        ends = [100 * dot.value[end] for dot in dots for end in ("low", "high") if not np.isnan(dot.value[end])]
        low, high = min([*ends, -5]), max([*ends, 2])
        ax.set_xlim(low - 1, high + 1)
        ax.set_xlabel("points of accuracy")
        ax.set_title(TITLES[direction], color=COLOUR[DIRECTIONS[direction][0]])
        ax.plot([], [], "o", color=INK, markersize=7, label="set for pairs")
        ax.plot([], [], "o", color=INK, markersize=7, markerfacecolor="none", label="set for conflicts")
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=11, labelcolor=MUTED)
        return figure

    return plot


def _counted(direction: str) -> tuple[str, ...]:
    """What counts as damage: towards remembering, new questions have nothing to remember."""
    return tuple(NAMES) if direction == "to_generalized" else ("memory", "conflict_rest")


def simpler(task: dict[str, Any]) -> list[Panel]:
    """By direction: the vector beside what a uniform push, words or a whole state put in would do."""
    return [_simpler_panel(task, direction) for direction in DIRECTIONS]


def _simpler_panel(task: dict[str, Any], direction: str) -> Panel:
    colour = COLOUR[DIRECTIONS[direction][0]]
    dots = [
        Dot(name, value, colour if number == 0 else OTHER, number > 0)
        for number, (name, value) in enumerate(ways(task, direction))
    ]

    def plot() -> Figure:
        figure, (ax,) = panel(ROW * len(dots) + 58)
        dot_rows(ax, dots)
        _shares_axis(ax)
        ax.set_title(TITLES[direction], color=colour)
        return figure

    return plot


def ways(task: dict[str, Any], direction: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, share of test pairs turned) of the vector and of what it can be held against, as far as measured."""
    block = task["steering"][direction]
    found = [("the vector", block["pairs"]["shift"])]
    control = strongest_control(block)
    if control:
        found.append((control_name(control), block["controls"][control]["pairs"]["shift"]))
    found.append(("same push to all", task["logit"][direction]["shift"]))
    if direction in task["prompt"]:
        found.append(("asked in words", task["prompt"][direction]["shift"]))
    for weight, shares in task.get("context_aware", {}).get(direction, {}).items():
        found.append((f"context-aware, {float(weight):+g}", shares["shift"]))
    bound = patch_bound(task, direction)
    if bound:
        found.append(("whole state put in", bound[2]))
    return [(name, value) for name, value in found if known(value)]


def elsewhere(task: dict[str, Any]) -> list[Panel]:
    """By direction: test pairs turned, beside those of what was held out; no panel where nothing was."""
    found = []
    for direction, (target, _) in DIRECTIONS.items():
        block = task["steering"][direction]
        held_out = {
            name: shares["shift"] for name, shares in block.get("held_out", {}).items() if known(shares["shift"])
        }
        if held_out:
            dots = [Dot("as fitted", block["pairs"]["shift"], COLOUR[target])]
            dots += [Dot(f"another {name}", shift, COLOUR[target], True) for name, shift in held_out.items()]
            found.append(_elsewhere_panel(dots, direction))
    return found


def _elsewhere_panel(dots: list[Dot], direction: str) -> Panel:
    def plot() -> Figure:
        figure, (ax,) = panel(ROW * len(dots) + 58)
        dot_rows(ax, dots)
        _shares_axis(ax)
        ax.set_title(TITLES[direction], color=COLOUR[DIRECTIONS[direction][0]])
        return figure

    return plot


def patch_bound(task: dict[str, Any], direction: str) -> tuple[str, int, dict[str, Any]] | None:
    """(site, layer, shift) where putting in the other side's state turns most pairs; None where nothing was patched."""
    found = [
        (site, layer, shares["shift"])
        for site, layers in task["patch"].get(direction, {}).items()
        for layer, shares in enumerate(layers)
        if known(shares["shift"])
    ]
    return max(found, key=lambda entry: entry[2]["estimate"], default=None)
