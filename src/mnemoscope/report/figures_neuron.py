"""One neuron under the two behaviours."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from mnemoscope.report.style import GENERALIZED, MEMORIZED, canvas, draw

BINS = 24


def draw_neuron(generalized_P: np.ndarray, memorized_P: np.ndarray, label: str) -> str:
    """The activations of a neuron where the model remembered and where it worked the answer out, as inline SVG.

    Args:
        generalized_P, memorized_P: activations at the decision position, of the two phrasings of each pair.
        label: what a screen reader says.
    """

    def plot(narrow: bool) -> Figure:
        figure, axes = canvas(narrow, 220)
        ax = axes[0, 0]
        both = np.concatenate([generalized_P, memorized_P])
        middle = both.mean()
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
            side = "right" if mean < middle else "left"
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "annotation_clip": False}
            ax.annotate(name, (mean, 1), (0, 5), ha=side, color=colour, **place)
        ax.set_xlabel("activation")
        ax.set_ylabel("phrasings")
        ax.set_ylim(bottom=0)
        return figure

    return draw("neuron", label, plot).narrow
