"""Figures of how a shift works: by degrees, by layer, by setting, and whether its neurons are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.figures import layer_axis
from mnemoscope.report.figures_parts import Panel, cells, last_known, line, name_ends, panel
from mnemoscope.report.figures_steering import TITLES
from mnemoscope.report.records import AIMS, DIRECTIONS
from mnemoscope.report.style import COLOUR, INK, MUTED, OTHER, percent_axis

DASHED = (0, (4, 2.5))
PAPERS = "nmd"  # the paper's own method


def dose(task: dict[str, Any]) -> list[Panel]:
    """By direction: mean margin above and share turned below, against multiples of the chosen strength.

    A direction without pairs to turn has no panel.
    """
    return [_dose_panel(task, direction) for direction in DIRECTIONS if any(dose_lines(task, direction).values())]


def dose_lines(task: dict[str, Any], direction: str) -> dict[str, dict[str, Any]]:
    """Name -> dose -> numbers: the best method, the paper's, and Gaussian shifts of the best one's norm."""
    best = task["steering"][direction]["chosen"]["method"]
    found = {method: task["dose"].get(method, {}).get(direction, {}) for method in dict.fromkeys((best, PAPERS))}
    lines = {method: roles["vector"] for method, roles in found.items() if "vector" in roles}
    return {**lines, **({"Gaussian": found[best]["gaussian"]} if "gaussian" in found[best] else {})}


def _dose_panel(task: dict[str, Any], direction: str) -> Panel:
    target = DIRECTIONS[direction][0]
    lines = dose_lines(task, direction)
    looks = dict(zip(lines, (COLOUR[target], *[INK] * len(lines)), strict=False)) | {"Gaussian": OTHER}

    def plot() -> Figure:
        figure, axes = panel(330, 2, [3, 2])
        for ax, key in zip(axes, ("margin", "shift"), strict=True):
            ends = []
            for name, by_dose in lines.items():
                x = sorted(by_dose, key=float)
                values = [by_dose[d][key] for d in x]
                line(ax, [float(d) for d in x], values, looks[name], dash=DASHED if name == "Gaussian" else "-")
                ends.append((name, last_known(values), looks[name]))
            ax.axvline(0, color=MUTED, linewidth=1, zorder=0)
            if key == "shift":
                ax.set_ylim(-0.03, 1.03)
                percent_axis(ax)
            name_ends(ax, max(float(d) for by in lines.values() for d in by), ends, 0.1 if key == "margin" else 0.16)
            ax.grid(axis="x", visible=False)
        axes[0].axhline(0, color=INK, linewidth=1)
        axes[0].set_ylabel("margin, nats")
        axes[1].set_ylabel("turned")
        axes[1].set_xlabel("times the chosen shift")
        axes[0].set_title(TITLES[direction], color=COLOUR[target])
        return figure

    return plot


def depth(task: dict[str, Any]) -> list[Panel]:
    """By layer: where the difference shows (|rho|, NMD), and where a shift of that layer alone turns pairs."""
    by_layer = task["by_layer"]
    shows = [
        _depth_panel(by_layer, key, name)
        for key, name in (("max_abs_rho", "strongest |rho|"), ("mean_abs_nmd", "mean |NMD|"))
    ]
    return [*shows, *(_acts_panel(task, direction) for direction in DIRECTIONS)]


def _depth_panel(by_layer: dict[str, Any], key: str, name: str) -> Panel:
    def plot() -> Figure:
        figure, (ax,) = panel(190)
        ax.fill_between(by_layer["layers"], by_layer[key], color=INK, alpha=0.1, linewidth=0)
        ax.plot(by_layer["layers"], by_layer[key], color=INK, marker="o", markersize=4)
        ax.set_ylim(0, max([x for x in by_layer[key] if not np.isnan(x)] or [1]) * 1.1)
        layer_axis(ax, by_layer["layers"])
        ax.set_title(f"shows: {name}")
        return figure

    return plot


def _acts_panel(task: dict[str, Any], direction: str) -> Panel:
    layers, target = task["by_layer"]["layers"], DIRECTIONS[direction][0]
    found = task["by_layer"]["shift"][direction]
    best = task["steering"][direction]["chosen"]["method"]

    def plot() -> Figure:
        figure, (ax,) = panel(230)
        ends = []
        for method, sites in found["methods"].items():
            site = best_site(sites)
            colour = COLOUR[target] if method == best else INK if method == PAPERS else OTHER
            line(ax, layers, sites[site], colour, band=False, width=1.6)
            ends.append((method if len(sites) == 1 else f"{method}, {site}", last_known(sites[site]), colour))
        for shares in [task["patch"].get(direction, {}).get("block")]:
            if shares:
                line(ax, layers, [s["shift"] for s in shares], MUTED, dash=DASHED, band=False, width=1.4)
                ends.append(("state put in", last_known([s["shift"] for s in shares]), MUTED))
        ax.set_ylim(-0.03, 1.03)
        percent_axis(ax)
        layer_axis(ax, layers)
        name_ends(ax, layers[-1], ends)
        ax.set_title(f"acts: {TITLES[direction]}", color=COLOUR[target])
        return figure

    return plot


def best_site(sites: dict[str, list[dict[str, Any]]]) -> str:
    """The site at which one layer alone turns most; the others are in ``results.json``."""
    return max(sites, key=lambda site: max(np.nan_to_num(shift["estimate"], nan=-1.0) for shift in sites[site]))


def patches(task: dict[str, Any]) -> list[Panel]:
    """By direction: share of pairs turned by the other side's state at one layer, a line for each site."""
    return [_patch_panel(task["patch"][d], d) for d in DIRECTIONS if task["patch"].get(d)]


def _patch_panel(sites: dict[str, Any], direction: str) -> Panel:
    target = DIRECTIONS[direction][0]
    looks = (("-", 2.4), (DASHED, 1.8), ((0, (1, 2)), 2.2), ((0, (6, 2, 1, 2)), 1.8))

    def plot() -> Figure:
        figure, (ax,) = panel(250)
        ends, layers = [], range(len(next(iter(sites.values()))))
        for (site, shares), (dash, width) in zip(sites.items(), looks, strict=False):
            shifts = [entry["shift"] for entry in shares]
            line(ax, layers, shifts, COLOUR[target], dash=dash, width=width, band=False)
            ends.append((site, last_known(shifts), COLOUR[target]))
        ax.set_ylim(-0.03, 1.03)
        percent_axis(ax)
        layer_axis(ax, layers)
        name_ends(ax, layers[-1], ends)
        ax.set_title(TITLES[direction], color=COLOUR[target])
        return figure

    return plot


def ablation(task: dict[str, Any]) -> list[Panel]:
    """By direction: what is left of the separation of the two sides while neurons are held at their mean."""
    found = {d: task["ablation"].get(task["steering"][d]["chosen"]["method"], {}).get(d) for d in DIRECTIONS}
    return [_ablation_panel(shares, direction) for direction, shares in found.items() if shares]


def _ablation_panel(shares: dict[str, Any], direction: str) -> Panel:
    target = DIRECTIONS[direction][0]
    x = sorted(shares, key=float)

    def plot() -> Figure:
        figure, (ax,) = panel(230)
        before = shares[x[0]]["vector"]["before"]
        ends = []
        for name, role, colour in (("its neurons", "vector", COLOUR[target]), ("random", "random_neurons", OTHER)):
            values = [before, *(shares[top][role]["after"] for top in x)]
            line(ax, [0, *(100 * float(top) for top in x)], values, colour)
            ends.append((name, last_known(values), colour))
        ax.axhline(0, color=INK, linewidth=1)
        ax.set_ylim(min(0, ax.get_ylim()[0]), max(0, ax.get_ylim()[1]))
        name_ends(ax, 100 * float(x[-1]), ends)
        ax.set_ylabel("separation, nats")
        ax.set_xlabel("neurons held, %")
        ax.grid(axis="x", visible=False)
        ax.set_title(f"ranked {TITLES[direction]}", color=COLOUR[target])
        return figure

    return plot


# --- the sweep as maps ---------------------------------------------------------------------------------------------

MAPS = (("shift", "turned"), ("other", "neither"), ("lost", "lost"))


def mapped_method(task: dict[str, Any]) -> str | None:
    """The method whose whole sweep was measured on what should stay; the paper's before others."""
    found = sorted(
        {row["method"] for row in task["sweep"] if row["examples"] not in AIMS}, key=lambda m: (m != PAPERS, m)
    )
    return found[0] if found else None


def sweep(task: dict[str, Any], most: int = 6) -> list[Panel]:
    """By direction: maps of the mapped method, three in a row for each site and set of layers."""
    method = mapped_method(task)
    by_direction = {
        d: [row for row in task["sweep"] if (row["method"], row["direction"]) == (method, d)] for d in DIRECTIONS
    }
    return [
        _map_panel(task, _places(rows, task["steering_by_method"][method][direction]["chosen"])[:most], direction)
        for direction, rows in by_direction.items()
        if any(row["examples"] == "pairs" for row in rows)
    ]


def _places(rows: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Rows by site and set of layers: where the chosen setting is, then sets of several layers, then single ones."""
    by_place: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_place.setdefault((row["layers"], row["site"]), []).append(row)

    def order(place: tuple[str, str]) -> tuple[bool, bool, int, str]:
        layers, site = place
        single = layers.isdigit()
        return _place(by_place[place][0]) != _place_of(chosen), single, int(layers) if single else 0, site

    swept = (place for place in by_place if any(row["examples"] == "pairs" for row in by_place[place]))
    return [by_place[place] for place in sorted(swept, key=order)]


def _map_panel(task: dict[str, Any], places: list[list[dict[str, Any]]], direction: str) -> Panel:
    """All maps share one axes, which is many times faster to lay out than one for each."""
    target = DIRECTIONS[direction][0]
    looks = {"shift": COLOUR[target], "other": OTHER, "lost": OTHER}
    tops, strengths = (sorted({row[name] for rows in places for row in rows}) for name in ("top", "strength"))
    chosen = task["steering_by_method"][places[0][0]["method"]][direction]["chosen"]
    down, across = len(tops) + 1.1, len(strengths) + 0.6

    def plot() -> Figure:
        figure, (ax,) = panel(22 * down * len(places) + 62)
        for number, rows in enumerate(places):
            for column, key in enumerate(looks):
                at = (number * down, column * across)
                cells(ax, _map(rows, key, tops, strengths), looks[key], at=at)
                if _place(rows[0]) == _place_of(chosen):
                    _frame(ax, at, tops.index(chosen["top"]), strengths.index(chosen["strength"]))
            ax.text(-0.5, number * down - 0.8, f"{rows[0]['site']} {rows[0]['layers']}", color=INK, va="center")
        for column, (_, name) in enumerate(MAPS):
            ax.text(column * across - 0.5, -1.7, name, color=INK, va="center")
        _name_cells(ax, tops, strengths, (down, across), len(places))
        ax.set_title(TITLES[direction], color=COLOUR[target])
        return figure

    return plot


def _name_cells(ax: Axes, tops: list[float], strengths: list[float], step: tuple[float, float], rows: int) -> None:
    """Shares of neurons down the side, strengths along the bottom, and room around the maps."""
    down, across = step
    heights = [number * down + n for number in range(rows) for n in range(len(tops))]
    ax.set_yticks(heights, [f"{100 * top:g} %" for top in tops] * rows, fontsize=10)
    places = [column * across + n for column in range(len(MAPS)) for n in range(len(strengths))]
    ax.set_xticks(places, [f"{s:g}".lstrip("0") for s in strengths] * len(MAPS), fontsize=9)
    ax.set_xlim(-0.6, 2 * across + len(strengths) - 0.4)
    ax.set_ylim(rows * down - 1.4, -2.2)


def _place(row: dict[str, Any]) -> tuple[str, list[int]]:
    """Site and layers of a row of the sweep, whose layers are text such as ``0-3``, ``2`` or ``0,2``."""
    parts = [[int(end) for end in part.split("-")] for part in row["layers"].split(",")]
    return row["site"], [layer for ends in parts for layer in range(ends[0], ends[-1] + 1)]


def _place_of(chosen: dict[str, Any]) -> tuple[str, list[int]]:
    return chosen["site"], sorted(chosen["layers"])


def _frame(ax: Axes, at: tuple[float, float], row: int, column: int) -> None:
    """Around the chosen setting."""
    ax.barh(at[0] + row, 0.94, left=at[1] + column - 0.47, height=0.94, fill=False, edgecolor=INK, linewidth=1.6)


def _map(rows: Sequence[dict[str, Any]], key: str, tops: list[float], strengths: list[float]) -> np.ndarray:
    """Shares by top and strength; ``lost`` is the larger loss of facts to recall and new questions."""
    values = np.full((len(tops), len(strengths)), np.nan)
    for row in rows:
        at = tops.index(row["top"]), strengths.index(row["strength"])
        if key == "lost" and row["examples"] in ("memory", "novel"):
            values[at] = np.fmax(values[at], 1 - row["kept"]["estimate"])
        elif key != "lost" and row["examples"] == "pairs":
            values[at] = row[key]["estimate"]
    return values
