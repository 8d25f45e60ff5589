"""A gate over any intervention: it acts only where a detector, before the answer, says that the other way is likely.

The detector reads the unsteered state at the decision position, so a gated intervention answers as the intervention
where the gate acts, and as the model itself elsewhere: nothing is asked again.

Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mnemoscope.behaviour import read_states
from mnemoscope.bench.lists import KEPT, DrawnBench
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions.detect import Detector, Observed, Reading, fit_detectors

THRESHOLD = 0.5  # of the probability of the behaviour to steer away from


def fitted_detector(bench: DrawnBench) -> Detector:
    """The detector of the fit split, calibrated on tune; InputError where a behaviour has too few prompts."""
    fit, tune = (
        _observed(lists, mined.scores.states_NLD, mined.scores.behaviour_N)
        for lists, mined in ((bench.fit, bench.mined), (bench.tune, bench.mine("tune", 38)))
    )
    return fit_detectors(fit, tune)[0]


def _observed(lists: Mapping[str, Prompts], states_NLD: np.ndarray | None, labels_N: np.ndarray) -> Observed:
    """Conflicts that were answered either way, and prompts that agree with memory or have no text."""
    assert states_NLD is not None, "mining keeps states"
    either_N = np.isin(labels_N.astype(str), ("memorized", "generalized"))
    parts, labels = [states_NLD[either_N]], [labels_N[either_N].astype(object)]
    for prompts in (lists[name] for name in KEPT if len(lists[name])):
        parts.append(read_states(prompts.asking, prompts.examples, "block").at_decision_NLD)
        labels.append(np.full(len(prompts), "neither", dtype=object))
    return Observed(np.concatenate(parts), np.concatenate(labels))


def readings(detector: Detector, prompts: Prompts) -> Reading:
    """The detector's estimates of prompts."""
    return detector.read(read_states(prompts.asking, prompts.examples, detector.site).at_decision_NLD)
