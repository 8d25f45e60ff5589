"""Figures of a detector: its ranking by family, its reliability, and what a gate makes of the chosen vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mnemoscope.report.figures_parts import ROW, Dot, Panel, dot_rows, last_known, line, name_ends, panel
from mnemoscope.report.figures_steering import TITLES
from mnemoscope.report.records import DIRECTIONS
from mnemoscope.report.sentences import known
from mnemoscope.report.style import COLOUR, INK, MUTED, OTHER

R = dict[str, Any]
SCORES = {
    "p_memorized": "the detector",
    "input_only": "the input alone",
    "input_repeats": "input, repeats",
    "entropy": "entropy",
    "top_gap": "gap of top two",
}
# What a gated vector is to turn, and what it should leave alone.
TURNED = {"pairs": "pairs", "conflict": "any conflict"}
KEPT = {"memory": "facts to recall", "novel": "new questions"}


def detector(detection: dict[str, Any]) -> list[Panel]:
    """Ranking of all conflicts beside baselines, family by family, and how often what is said comes true."""
    rows = [(name, detection["auroc"][score], score) for score, name in SCORES.items()]
    panels = [_ranking_panel([r for r in rows if known(r[1])], "ranked right, all conflicts")]
    families = ranked_families(detection)
    if len(families) > 1:
        panels.append(_ranking_panel(families, "within one phrasing"))
    return [*panels, _reliability_panel(detection["reliability"])]


def ranked_families(detection: dict[str, Any]) -> list[tuple[str, R, str]]:
    """(name, area under the curve, score) of the detector in each family and in what was held out, as far as known."""
    found = [(family, entry["p_memorized"], "p_memorized") for family, entry in detection["by_family"].items()]
    found += [(f"held out: {k}", entry["p_memorized"], "p_memorized") for k, entry in detection["held_out"].items()]
    return [entry for entry in found if known(entry[1])]


def _ranking_panel(rows: list[tuple[str, R, str]], title: str) -> Panel:
    dots = [
        Dot(name, value, INK if score == "p_memorized" else OTHER, score != "p_memorized")
        for name, value, score in rows
    ]

    def plot() -> Figure:
        figure, (ax,) = panel(ROW * max(1, len(dots)) + 58)
        dot_rows(ax, dots)
        ax.axvline(50, color=MUTED, linewidth=1, linestyle=(0, (1, 3)), zorder=0)
        lowest = min([100 * dot.value["low"] for dot in dots if not np.isnan(dot.value["low"])], default=45)
        ax.set_xlim(min(45, lowest - 3), 101)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f} %")
        ax.set_title(title)
        return figure

    return plot


def _reliability_panel(bins: list[dict[str, R]]) -> Panel:
    filled = [entry for entry in bins if known(entry["memorized"])]

    def plot() -> Figure:
        figure, (ax,) = panel(250)
        ax.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (1, 3)), zorder=0)
        for entry in filled:
            x = 100 * entry["said"]["estimate"]
            middle, low, high = (100 * entry["memorized"][key] for key in ("estimate", "low", "high"))
            ax.plot([x, x], [low, high], color=COLOUR["memorized"], linewidth=3, alpha=0.45)
            ax.plot(x, middle, "o", color=COLOUR["memorized"], markersize=7)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda x, _: f"{x:.0f} %")
        ax.set_xlim(-3, 103)
        ax.set_ylim(-3, 103)
        ax.set_xlabel("P(memorized) that was said")
        ax.set_title("of those, remembered", color=COLOUR["memorized"])
        return figure

    return plot


def neutral(found: dict[str, Any]) -> list[Panel]:
    """By direction: divergence by dose, at the steered token and behind it, with the gate and without."""
    return [_neutral_panel(found[direction], direction) for direction in DIRECTIONS if direction in found]


def _neutral_panel(by_dose: dict[str, Any], direction: str) -> Panel:
    colour = COLOUR[DIRECTIONS[direction][0]]
    doses = sorted(by_dose, key=float)
    lines = (
        ("first", "steered token", colour, "-"),
        ("next", "tokens behind it", colour, (0, (4, 2.5))),
        ("first_gated", "gated", INK, "-"),
    )

    def plot() -> Figure:
        figure, (ax,) = panel(230)
        ends = []
        for key, name, tone, dash in lines:
            values = [by_dose[dose][key] for dose in doses]
            if any(known(value) for value in values):
                line(ax, [float(dose) for dose in doses], values, tone, dash=dash)
                ends.append((name, last_known(values), tone))
        ax.set_ylim(bottom=0)
        ax.set_xlabel("multiples of the chosen strength")
        ax.set_title("nats a token", color=colour)
        name_ends(ax, float(doses[-1]), ends)
        return figure

    return plot


def gated(task: dict[str, Any]) -> list[Panel]:
    """By direction: what the vector turns and costs by itself and behind the gate."""
    return [_gated_panel(task["steering"][d], d) for d in DIRECTIONS if "gated" in task["steering"][d]]


def _gated_panel(block: dict[str, Any], direction: str) -> Panel:
    colour = COLOUR[DIRECTIONS[direction][0]]
    plain = {"pairs": block["pairs"]["shift"], "conflict": block["conflict_at_chosen"]["shift"]}
    dots = []
    for name, said in TURNED.items():
        if name in block["gated"]["shift"]:
            dots += [Dot(f"{said}: turned", plain[name], colour, True)]
            dots += [Dot("behind the gate", block["gated"]["shift"][name], colour)]
    for name, said in KEPT.items():
        if name in block["gated"]["collateral"] and known(block["collateral"][name]):
            dots += [Dot(f"{said}: change", block["collateral"][name], INK, True)]
            dots += [Dot("behind the gate", block["gated"]["collateral"][name], INK)]

    def plot() -> Figure:
        figure, (ax,) = panel(ROW * max(1, len(dots)) + 58)
        dot_rows(ax, dots)
        ax.axvline(0, color=INK, linewidth=1, zorder=0)
        lowest = min([100 * dot.value["low"] for dot in dots if not np.isnan(dot.value["low"])], default=0)
        ax.set_xlim(min(-4, lowest - 2), 102)
        ax.set_title(TITLES[direction], color=colour)
        return figure

    return plot
