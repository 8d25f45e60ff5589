"""Weights of a logistic regression on each layer's states."""

from __future__ import annotations

import numpy as np

from mnemoscope.interventions.sources import Labels, Sources
from mnemoscope.statistics.probes import LayerProbe


def direction(sources: Sources, labels: Labels) -> np.ndarray:
    """The weights, every layer with the same strength."""
    states_P2LD = sources.states_P2LD.astype(np.float64)
    signs_P = labels.signs(len(states_P2LD))
    labels_N = (np.stack([signs_P, -signs_P], axis=1).ravel() > 0).astype(np.int64)
    states_NLD = states_P2LD.reshape(-1, *sources.shape_LD)
    probes = [LayerProbe(0.01).fit(states_NLD[:, layer], labels_N) for layer in range(sources.shape_LD[0])]
    return sources.evenly(np.stack([probe.weights_D_ for probe in probes]))
