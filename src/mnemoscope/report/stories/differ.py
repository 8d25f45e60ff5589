"""Do the behaviours differ: which neurons, and how strongly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mnemoscope.report import drawing
from mnemoscope.report.drawing import INK, OTHER, Line, Panel
from mnemoscope.report.page import TOO_FEW, Answer, Chapter, Exhibit, View, not_measured
from mnemoscope.report.records import Cell
from mnemoscope.report.rows import Part
from mnemoscope.report.words import ANSWERED, NBSP, argmax, count, interval, percent
from mnemoscope.statistics import LEAST_GROUPS, Estimate
from mnemoscope.statistics.contrast import Contrast

SIGNIFICANT = 0.05
# Middle tones that read on light and on dark paper, for pixels, which CSS cannot reach.
PIXEL_MEMORIZED, PIXEL_GENERALIZED = (0.85, 0.45, 0.13), (0.16, 0.53, 0.78)
QUANTILES = ((1.0, "strongest", INK), (0.99, "99 %", OTHER), (0.9, "90 %", OTHER), (0.5, "median", OTHER))
BINS = 24


def measure(cell: Cell) -> dict[str, Any]:
    """Per layer: mean |NMD|, the largest |rho| and the share of neurons that differ, family-wise."""
    contrast, p_LD = cell.contrast, cell.contrast.p_family_wise_LD
    significant_LD = np.where(np.isnan(p_LD), np.nan, p_LD <= SIGNIFICANT)
    mean_L = [_of_known(np.mean, row) for row in np.abs(contrast.nmd_LD)]
    share = Estimate(_of_known(np.mean, significant_LD), math.nan, math.nan, int((~np.isnan(p_LD)).sum()))
    return {
        "contrast": {
            "site": contrast.site,
            "layers": list(range(len(p_LD))),
            "mean_abs_nmd": mean_L,
            "in_norms": [mean / norm for mean, norm in zip(mean_L, contrast.state_norm_L.tolist(), strict=True)],
            "max_abs_rho": [_of_known(np.max, row) for row in np.abs(contrast.rho_LD)],
            "significant_fraction": [_of_known(np.mean, row) for row in significant_LD],
            "significant": share,
            "pairs": contrast.pairs,
            "groups": contrast.groups,
        }
    }


def _of_known(function: Any, values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(function(known)) if len(known) else math.nan


def chapter(view: View) -> Chapter:
    """The map of NMD, and rho by layer."""
    contrast = view.cells[0].contrast
    if argmax(view.task.contrast.mean_abs_nmd) is None:
        return Chapter(answer(view.task))
    panels = [_heatmap_panel(contrast, ANSWERED[view.task.documents])]
    if not np.isnan(contrast.rho_LD).all():
        lines = []
        for q, name, colour in QUANTILES:  # of the neurons that change: others have no correlation
            heights = [_of_known(partial(np.quantile, q=q), row) for row in np.abs(contrast.rho_LD)]
            lines.append(Line(name, range(len(heights)), heights, colour, fill=True))
        panels.append(drawing.lines_panel("|rho| by layer", lines))
    return Chapter(answer(view.task), [Exhibit("neurons", panels)])


def answer(task: Part) -> Answer:
    """Whether any neuron differs for certain, all tested together."""
    contrast, question = task.contrast, "Do they differ?"
    share, best = contrast.significant, argmax(contrast.significant_fraction)
    if best is None:
        return not_measured("differ", question, task)
    notes = [
        f"Family-wise p \u2264 {SIGNIFICANT}, {count(contrast.pairs, 'pair')} of {count(contrast.groups, 'group')}."
    ]
    if not math.isnan(share.low):
        notes.append(f"95{NBSP}% interval over seeds: {interval(share)}.")
    if share.estimate > 0 and task.probe.input_only.low > 0.5:
        notes.append(f"The wordings differ too: the input alone gives {percent(task.probe.input_only.estimate)}.")
    each = [one.contrast.significant.estimate for one in task.per_seed.values()]  # a p-value holds in its own seed
    verdict = "No neuron surely differs"
    if each and min(each) > 0:
        verdict = f"Neurons differ, most in layer {contrast.layers[best]}"
    if max(each, default=0.0) > 0 and min(each) == 0:
        verdict = "Neurons differ in some seeds"
    verdict = TOO_FEW if contrast.groups < LEAST_GROUPS else verdict
    neurons = share.n // len(task.seeds)
    sentence = f"of {neurons:,} neurons ({percent(share.estimate)}) differ when all are tested together."
    return Answer("differ", question, verdict, f"{share.estimate * neurons:,.0f}", sentence, " ".join(notes))


def _heatmap_panel(contrast: Contrast, answered: Mapping[str, str]) -> Panel:
    """NMD, one strip per layer, neurons sorted within the layer; colour is transparent at 0."""
    nmd_LD = np.sort(contrast.nmd_LD, axis=1)
    reach = float(np.nanquantile(np.abs(nmd_LD), 0.995)) or 1.0  # where colour is full: 99.5 % of all neurons lie below
    layers, neurons = nmd_LD.shape
    ends = [(*PIXEL_MEMORIZED, 1), (*PIXEL_MEMORIZED, 0), (*PIXEL_GENERALIZED, 0), (*PIXEL_GENERALIZED, 1)]
    cmap = LinearSegmentedColormap.from_list("nmd", list(zip((0, 0.5, 0.5, 1), ends, strict=True)))
    strip = min(34, max(9, 300 / layers))
    every = int(np.ceil(16 / strip))  # a line of text takes 16 pixels

    def plot() -> Figure:
        figure, ax = drawing.canvas(strip * layers + 72, "NMD by neuron, sorted")
        for layer, row in enumerate(nmd_LD):
            place = (0, neurons, layer + 0.42, layer - 0.42)
            ax.imshow(row[None], cmap, aspect="auto", interpolation="none", extent=place, vmin=-reach, vmax=reach)
            if layer % every == 0:
                drawing.beside(ax, layer, f"{_of_known(np.mean, np.abs(row)):.2g}", drawing.MUTED)
        drawing.name_rows(ax, [f"layer {n}" for n in range(0, layers, every)], every)
        ax.set_ylim(layers - 0.4, -0.6)
        ax.set_xlim(0, neurons)
        ax.set_xticks([0, neurons], [f"{answered['memorized']} {reach:.2g}", f"{reach:.2g} {answered['generalized']}"])
        ax.get_xticklabels()[0].set_horizontalalignment("left")
        ax.get_xticklabels()[1].set_horizontalalignment("right")
        ax.spines["bottom"].set_visible(False)
        return figure

    return plot


def draw_neuron(generalized_P: np.ndarray, memorized_P: np.ndarray, label: str) -> str:
    """SVG of one neuron's activations at the decision position under both phrasings of P pairs, and its label."""

    def plot() -> Figure:
        figure, ax = drawing.canvas(220)
        both = np.concatenate([generalized_P, memorized_P])
        edges = np.histogram_bin_edges(both, BINS)
        for values_P, behaviour in ((memorized_P, "memorized"), (generalized_P, "generalized")):
            colour, mean = drawing.COLOUR[behaviour], values_P.mean()
            ax.hist(values_P, edges.tolist(), histtype="stepfilled", color=colour, alpha=0.28)
            ax.hist(values_P, edges.tolist(), histtype="step", color=colour, linewidth=2)
            ax.axvline(mean, color=colour, linestyle=drawing.DASHED, linewidth=1.5)
            # Above its mean, on the side where the other one is not.
            side = "right" if mean < both.mean() else "left"
            ax.text(mean, 1.02, behaviour, ha=side, color=colour, transform=ax.get_xaxis_transform())
        ax.set(xlabel="activation", ylabel="phrasings")
        return figure

    return drawing.draw("neuron", label, [plot])[0]
