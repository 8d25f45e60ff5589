"""A gate over any intervention: it acts only where a detector, before the answer, says that the other way is likely.

The detector reads the unsteered state at the decision position, so a gated intervention answers as the intervention
where the gate acts, and as the model itself elsewhere: nothing is asked again.

Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mnemoscope.behaviour import read_states
from mnemoscope.bench.lists import KEPT, DrawnBench
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions.detect import Detector, Observed, Reading, fit_detectors
from mnemoscope.models import blocks_of

THRESHOLD = 0.5  # of the probability of the behaviour to steer away from


def fitted_detectors(bench: DrawnBench) -> dict[str, Detector]:
    """By the name of a gate its detector, of the fit split and calibrated on tune.

    ``whole`` is that of a fit, ``behaviour`` does not ask whether there is a conflict, and ``early`` reads no layer of
    the second half, so that the same pass can still be steered. InputError where a behaviour has too few prompts.
    """
    fit, tune = (
        _observed(lists, mined.scores.states_NLD, mined.scores.behaviour_N)
        for lists, mined in ((bench.fit, bench.mined), (bench.tune, bench.mine("tune", 38)))
    )
    whole, early = fit_detectors(fit, tune, below=len(blocks_of(bench.asking.model)) // 2 - 1)
    behaviour = replace(whole, conflict_D=np.full_like(whole.conflict_D, np.nan), conflict_bias=np.nan)
    return {"whole": whole, "behaviour": behaviour, "early": early or whole}


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
