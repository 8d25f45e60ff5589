"""Figures of reading the behaviour: what a probe has to beat, how early, from how few pairs, how steady it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.figures import layer_axis
from mnemoscope.report.figures_parts import ROW, Dot, Panel, cells, dot_rows, last_known, line, name_ends, panel
from mnemoscope.report.figures_steering import TITLES
from mnemoscope.report.records import DIRECTIONS
from mnemoscope.report.sentences import known
from mnemoscope.report.style import COLOUR, INK, MUTED, OTHER

R = dict[str, Any]


def evidence(probe: dict[str, Any]) -> list[tuple[str, R]]:
    """(name, accuracy) of the probe with its layer chosen elsewhere, then of all that it has to beat."""
    baselines = probe.get("baselines", {})
    found = [
        ("the state", probe["best"]["accuracy"]),
        ("the input alone", probe["input_only"]),
        ("input, repeats", probe.get("input_repeats")),
        ("entropy", baselines.get("entropy")),
        ("gap of top two", baselines.get("top_gap")),
        ("shuffled labels", probe["shuffled"]),
    ]
    return [(name, value) for name, value in found if value is not None and known(value)]


def reading(task: dict[str, Any]) -> list[Panel]:
    """What the probe has to beat, how early it can tell, and how many pairs it takes; as far as measured."""
    panels = [_evidence_panel(task["probe"])]
    if len(task["probe"].get("best_by_offset", {})) > 1:
        panels.append(_offset_panel(task["probe"]))
    if len(task.get("learning", {}).get("accuracy", {})) > 1:
        panels.append(_learning_panel(task["learning"]))
    return panels


def _evidence_panel(probe: dict[str, Any]) -> Panel:
    dots = [Dot(name, value, INK if not n else OTHER, n > 0) for n, (name, value) in enumerate(evidence(probe))]

    def plot() -> Figure:
        figure, (ax,) = panel(ROW * len(dots) + 58)
        dot_rows(ax, dots)
        ax.axvline(50, color=MUTED, linewidth=1, linestyle=(0, (1, 3)), zorder=0)
        ends = [100 * dot.value["estimate"] for dot in dots]
        ax.set_xlim(min([*ends, 45]) - 3, max([*ends, 60]) + 3)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f} %")
        ax.set_title("right, by what it looks at")
        return figure

    return plot


def _offset_panel(probe: dict[str, Any]) -> Panel:
    by_offset = probe["best_by_offset"]
    offsets = sorted(by_offset, key=int, reverse=True)

    def plot() -> Figure:
        figure, (ax,) = panel(230)
        values = [by_offset[offset]["accuracy"] for offset in offsets]
        line(ax, range(len(offsets)), values, INK)
        ends = [("the state", last_known(values), INK)]
        for name, key, dash in (("input alone", "input_only", "-"), ("repeats", "input_repeats", (0, (4, 2.5)))):
            if key in probe and known(probe[key]):
                ax.axhline(probe[key]["estimate"], color=OTHER, linewidth=1.4, linestyle=dash)
                ends.append((name, probe[key]["estimate"], MUTED))
        _accuracy_axis(ax)
        ax.set_xticks(range(len(offsets)), [f"-{offset}" if int(offset) else "0" for offset in offsets])
        ax.set_xlabel("tokens from the decision")
        ax.grid(axis="x", visible=False)
        name_ends(ax, len(offsets) - 1, ends)
        ax.set_title("how early")
        return figure

    return plot


def _learning_panel(learning: dict[str, Any]) -> Panel:
    keys = list(learning["accuracy"])
    keys.sort(key=lambda key: learning["pairs"][key])

    def plot() -> Figure:
        figure, (ax,) = panel(230)
        line(ax, range(len(keys)), [learning["accuracy"][key] for key in keys], INK)
        _accuracy_axis(ax)
        ax.set_xticks(range(len(keys)), [f"{learning['pairs'][key]:.0f}" for key in keys])
        ax.set_xlabel("fit pairs")
        ax.grid(axis="x", visible=False)
        ax.set_title("from how many pairs")
        return figure

    return plot


def _accuracy_axis(ax: Axes) -> None:
    low, high = ax.get_ylim()
    ax.set_ylim(max(0.0, min(low, 0.48)), min(1.02, max(high, 0.62)))
    ax.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (1, 3)), zorder=0)
    ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")


# --- consistency ---------------------------------------------------------------------------------------------------


def seed_rows(seeds: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Rows of one measure between seeds; where some seeds began alike and some did not, those that began alike."""
    rows = [row for row in seeds if row["what"] == what]
    alike = [row for row in rows if row["shared_initialization"]]
    return alike or rows


def steadiness(task: dict[str, Any], seeds: list[dict[str, Any]]) -> list[Panel]:
    """Overlap of the strongest neurons, and likeness by layer: between halves of the pairs and between seeds."""
    return [_overlap_panel(task, seeds), _likeness_panel(task, seeds)]


def overlaps(task: dict[str, Any], seeds: list[dict[str, Any]]) -> list[tuple[str, float, R, R]]:
    """(between what, share of neurons, overlap, overlap by chance)."""
    halves = task["consistency"]["halves"]["overlap"]
    found = [("halves", float(top), entry["share"], entry["chance"]) for top, entry in halves.items()]
    found += [("seeds", row["top"], row["value"], row["chance"]) for row in seed_rows(seeds, "overlap")]
    return sorted(found, key=lambda entry: (entry[1], entry[0]))


def _overlap_panel(task: dict[str, Any], seeds: list[dict[str, Any]]) -> Panel:
    dots = [
        Dot(f"top {100 * top:g} %, {between}", value, INK, between == "seeds", mark=chance["estimate"])
        for between, top, value, chance in overlaps(task, seeds)
    ]

    def plot() -> Figure:
        figure, (ax,) = panel(ROW * len(dots) + 58)
        dot_rows(ax, dots)
        ax.set_xlim(-2, 102)
        ax.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        ax.set_title("same neurons found again")
        return figure

    return plot


def _likeness_panel(task: dict[str, Any], seeds: list[dict[str, Any]]) -> Panel:
    halves, layers = task["consistency"]["halves"], task["contrast"]["layers"]

    def plot() -> Figure:
        figure, (ax,) = panel(230)
        values = halves["rho_rank_correlation"]
        line(ax, layers, values, INK)
        ends = [("halves", last_known(values), INK)]
        for name, what, dash in (
            ("seeds", "rank_correlation", (0, (4, 2.5))),
            ("aligned", "aligned_cosine", (0, (1, 2))),
        ):
            rows = sorted((row for row in seed_rows(seeds, what) if row["layer"] >= 0), key=lambda row: row["layer"])
            if rows:
                line(ax, [row["layer"] for row in rows], [row["value"] for row in rows], MUTED, dash=dash)
                low, high = ([row["chance"][end] for row in rows] for end in ("low", "high"))
                ax.fill_between([row["layer"] for row in rows], low, high, color=OTHER, alpha=0.15, linewidth=0)
                ends.append((name, last_known([row["value"] for row in rows]), MUTED))
        ax.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (1, 3)))
        ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.03)
        layer_axis(ax, layers)
        name_ends(ax, layers[-1], ends)
        ax.set_title("likeness by layer")
        return figure

    return plot


# --- transfer ------------------------------------------------------------------------------------------------------


def transfer(matrix: dict[str, Any]) -> list[Panel]:
    """Shift in each direction and accuracy of the probe, from each source on each target."""
    labels = sorted({*matrix, *(target for targets in matrix.values() for target in targets)})
    found: list[Panel] = [_matrix_panel(labels, matrix, direction) for direction in DIRECTIONS]
    return [*found, _matrix_panel(labels, matrix, "probe")]


def transferred(matrix: dict[str, Any], source: str, target: str, what: str) -> tuple[R, float] | None:
    """(share turned or accuracy, what it is by chance) in one cell of the matrix; None where it was not measured."""
    entry = matrix.get(source, {}).get(target, {}).get(what)
    if not entry:
        return None
    if what == "probe":
        return (entry, 0.5) if known(entry) else None
    method = "best" if "best" in entry else sorted(entry)[0]
    shift = entry[method]["shift"]
    return (shift, entry[method]["gaussian"]["estimate"]) if known(shift) else None


def _matrix_panel(labels: list[str], matrix: dict[str, Any], what: str) -> Panel:
    colour = COLOUR[DIRECTIONS[what][0]] if what in DIRECTIONS else INK
    size = len(labels)
    # What all names begin with (their one model) says nothing here, and long names would run into one another.
    first = {label.partition("-")[0] + "-" for label in labels}
    common = first.pop() if len(first) == 1 else ""
    shown = [label.removeprefix(common).replace("-", "-\n") for label in labels]
    values, texts = np.full((size, size), np.nan), [[""] * size for _ in labels]
    for row, source in enumerate(labels):
        for column, target in enumerate(labels):
            found = transferred(matrix, source, target, what)
            if found:
                share, by_chance = found[0]["estimate"], found[1]
                # A probe that guesses is right half the time, so its colour begins there.
                values[row, column] = share if what != "probe" else max(0.0, 2 * share - 1)
                texts[row][column] = f"{100 * share:.0f}\n({100 * by_chance:.0f})"

    def plot() -> Figure:
        figure, (ax,) = panel(52 * size + 76)
        cells(ax, values, colour if what in DIRECTIONS else OTHER, texts)
        ax.set_xticks(range(size), shown)
        ax.set_yticks(range(size), shown)
        ax.tick_params(labelcolor=INK)
        ax.set_ylabel("learned on")
        ax.set_xlabel("tried on")
        ax.set_title(TITLES.get(what, "probe, right"), color=colour)
        return figure

    return plot
