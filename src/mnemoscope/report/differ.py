"""Do the behaviours differ: which neurons, and how strongly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.drawing import (
    GENERALIZED,
    INK,
    MEMORIZED,
    MUTED,
    OTHER,
    Frame,
    Line,
    Panel,
    beside,
    canvas,
    draw,
    lines_panel,
)
from mnemoscope.report.page import Answer, Chapter, Exhibit, View, not_measured
from mnemoscope.report.records import Contrast
from mnemoscope.report.schema import Contrasts, TaskResults
from mnemoscope.report.words import NBSP, argmax, count, interval, percent
from mnemoscope.statistics import Estimate

SIGNIFICANT = 0.05
# Middle tones that read on light and on dark paper, for pixels, which CSS cannot reach.
PIXEL_MEMORIZED, PIXEL_GENERALIZED = (0.85, 0.45, 0.13), (0.16, 0.53, 0.78)
QUANTILES = ((1.0, "strongest"), (0.99, "99 %"), (0.9, "90 %"), (0.5, "median"))
BINS = 24


def measure_contrast(contrast: Contrast) -> Contrasts:
    """Per layer: mean |NMD|, the largest |rho| and the share of neurons that differ, family-wise."""
    p_LD = contrast.p_family_wise
    significant_LD = np.where(np.isnan(p_LD), np.nan, p_LD <= SIGNIFICANT)
    n = int((~np.isnan(p_LD)).sum())
    return Contrasts(
        site=contrast.site,
        layers=list(range(len(p_LD))),
        mean_abs_nmd=[_of_known(np.mean, row) for row in np.abs(contrast.nmd)],
        max_abs_rho=[_of_known(np.max, row) for row in np.abs(contrast.rho)],
        significant_fraction=[_of_known(np.mean, row) for row in significant_LD],
        significant=Estimate(_of_known(np.mean, significant_LD), math.nan, math.nan, n),
        pairs=contrast.pairs,
        groups=contrast.groups,
    )


def _of_known(function: Any, values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(function(known)) if len(known) else math.nan


def chapter(view: View) -> Chapter:
    """The map of NMD, and rho by layer."""
    contrast = view.cells[0].contrast
    if argmax(view.task.contrast.mean_abs_nmd) is None:
        return Chapter(answer(view.task))
    panels = [_heatmap_panel(contrast), *([] if np.isnan(contrast.rho).all() else [_rho_panel(np.abs(contrast.rho))])]
    return Chapter(answer(view.task), [Exhibit("neurons", panels)])


def answer(task: TaskResults) -> Answer:
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
    if share.estimate > 0:
        notes.append(f"Most in layer {contrast.layers[best]}: {percent(contrast.significant_fraction[best])}.")
        if task.probe.input_only.low > 0.5:
            notes.append(f"The wordings differ too: the input alone gives {percent(task.probe.input_only.estimate)}.")
    verdict = "Yes, neurons differ" if share.estimate > 0 else "Not that it shows"
    sentence = f"of {share.n // len(task.seeds):,} neurons differ when all are tested together."
    return Answer("differ", question, verdict, percent(share.estimate), sentence, " ".join(notes), share)


def _heatmap_panel(contrast: Contrast) -> Panel:
    """NMD, one strip per layer, neurons sorted within the layer; colour is transparent at 0."""
    nmd_LD = np.sort(contrast.nmd, axis=1)
    known = np.abs(contrast.nmd[~np.isnan(contrast.nmd)])
    reach = max(float(np.quantile(known, 0.995)), 1e-12)  # where colour is full: 99.5 % of all neurons lie below
    layers, neurons = nmd_LD.shape
    means_L = [_of_known(np.mean, np.abs(row)) for row in nmd_LD]
    digits = max(0, 1 - int(np.floor(np.log10(np.nanmax([*means_L, 1e-9])))))  # two that count, for the largest

    def plot() -> Figure:
        height = min(34, max(9, 300 / layers))
        every = int(np.ceil(16 / height))  # a line of text takes 16 pixels
        figure, (ax, scale) = canvas(height * layers + 116, 2, [height * layers + 40, 14])
        for layer, row in enumerate(nmd_LD):
            place = (0, neurons, layer + 0.42, layer - 0.42)
            ax.imshow(_diverging(row[None] / reach), aspect="auto", interpolation="none", extent=place)
            if layer % every == 0:
                beside(ax, layer, f"{means_L[layer]:.{digits}f}", MUTED)
        ax.set_yticks(range(0, layers, every), [f"layer {n}" for n in range(0, layers, every)])
        ax.set_ylim(layers - 0.4, -0.6)
        ax.set_xlim(0, neurons)
        _ends(ax, [0, neurons], ["lowest NMD", "highest NMD"])
        ax.spines["bottom"].set_visible(False)
        ax.set_title("NMD by neuron")
        ramp = _diverging(np.linspace(-1, 1, 101)[None])
        scale.imshow(ramp, aspect="auto", interpolation="none", extent=(-1, 1, 0, 1))
        scale.set_yticks([])
        _ends(scale, [-1, 0, 1], [f"remembering {reach:.2g}", "0", f"{reach:.2g} working it out"])
        return figure

    return plot


def _ends(ax: Axes, places: list[float], names: list[str]) -> None:
    """Ticks whose outer labels keep within the axis."""
    ax.set_xticks(places, names)
    ax.get_xticklabels()[0].set_horizontalalignment("left")
    ax.get_xticklabels()[-1].set_horizontalalignment("right")
    ax.grid(visible=False)


def _diverging(values: np.ndarray) -> np.ndarray:
    """RGBA of values in -1 .. 1: the colour of remembering below 0, of working out above, clear at 0 and for NaN."""
    values = np.clip(np.nan_to_num(values), -1, 1)
    pixels = np.empty((*values.shape, 4))
    pixels[..., :3] = np.where(values[..., None] < 0, PIXEL_MEMORIZED, PIXEL_GENERALIZED)
    pixels[..., 3] = np.abs(values) ** 0.75
    return pixels


def _rho_panel(rho_LD: np.ndarray) -> Panel:
    """|rho| by layer: the strongest neuron and quantiles of all; a neuron that never changes has no correlation."""
    layers = range(len(rho_LD))
    lines = [
        Line(name, layers, [_of_known(lambda row, q=q: np.quantile(row, q), row) for row in rho_LD], colour, fill=True)
        for (q, name), colour in zip(QUANTILES, (INK, OTHER, OTHER, OTHER), strict=True)
    ]
    return lines_panel(lines, Frame("|rho| by layer", floor=0))


def draw_neuron(generalized_P: np.ndarray, memorized_P: np.ndarray, label: str) -> str:
    """SVG of one neuron's activations under the two behaviours.

    Args:
        generalized_P, memorized_P: activations at the decision position, of the two phrasings of each pair.
        label: what a screen reader reads.
    """

    def plot() -> Figure:
        figure, (ax,) = canvas(220)
        both = np.concatenate([generalized_P, memorized_P])
        edges = np.histogram_bin_edges(both, BINS)
        for values_P, colour, name in (
            (memorized_P, MEMORIZED, "remembered"),
            (generalized_P, GENERALIZED, "worked out"),
        ):
            counts, _ = np.histogram(values_P, edges)
            ax.stairs(counts, edges, color=colour, fill=True, alpha=0.28)
            ax.stairs(counts, edges, color=colour, linewidth=2)
            mean = values_P.mean()
            ax.axvline(mean, color=colour, linestyle=(0, (4, 3)), linewidth=1.5)
            # Above its mean, on the side where the other one is not.
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            side = "right" if mean < both.mean() else "left"
            ax.annotate(name, (mean, 1), (0, 5), ha=side, color=colour, annotation_clip=False, **place)
        ax.set(xlabel="activation", ylabel="phrasings")
        ax.set_ylim(bottom=0)
        return figure

    return draw("neuron", label, [plot])[0]
