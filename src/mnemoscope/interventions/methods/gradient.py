"""The steepest ascent of the decision margin."""

from __future__ import annotations

import numpy as np

from mnemoscope.interventions.sources import Labels, Sources


def direction(sources: Sources, labels: Labels) -> np.ndarray:
    """The direction in which the decision margin rises for a given strength, a mean over examples.

    With shifts in units ``s`` of strength, ``u = s g`` is an example's steepest direction, and ``s u`` the shift. Each
    example counts as much as another in a layer, at the layer's mean norm: the steepest few would decide otherwise, and
    a shuffle of labels would point along them.
    """
    total_LD, norms_L1, count = np.zeros(sources.shape_LD), np.zeros((sources.shape_LD[0], 1)), 0
    for stream, batches in enumerate(sources.margin_gradients):
        for number, gradients_NLD in enumerate(batches):
            steepest_NLD = gradients_NLD * sources.unit_LD
            norm_NL1 = np.linalg.norm(steepest_NLD, axis=2, keepdims=True)
            steepest_NLD /= np.where(norm_NL1 > 0, norm_NL1, 1.0)
            total_LD += np.tensordot(labels.signs(len(steepest_NLD), stream, number), steepest_NLD, 1)
            norms_L1 += norm_NL1.sum(axis=0)
            count += len(steepest_NLD)
    return sources.unit_LD * total_LD * norms_L1 / count**2
