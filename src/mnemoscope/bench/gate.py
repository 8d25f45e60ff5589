"""Gates over any intervention: where one acts is decided before the answer, else the model answers unsteered.

They read unsteered passes, so a gated intervention answers as the intervention where the gate acts, and as the model
itself elsewhere: nothing is asked again.

Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from mnemoscope.behaviour import read_states
from mnemoscope.behaviour.reading import read_contexts
from mnemoscope.bench.lists import KEPT, DrawnBench
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import Toward
from mnemoscope.interventions.detect import Detector, Observed, fit_detectors
from mnemoscope.interventions.methods import cad
from mnemoscope.models import blocks_of
from mnemoscope.runs.errors import InputError

THRESHOLD = 0.5  # of the probability of the behaviour to steer away from
ASKED = "asked"  # of the gates the one that asks twice, and needs no detector


@dataclass(frozen=True)
class Gates:
    """Detectors by the name of their gate, or none and the reason: too few prompts of a behaviour to fit one.

    ``whole`` is that of a fit, ``behaviour`` does not ask whether there is a conflict, and ``early`` reads no layer of
    the second half, so that the same pass can still be steered.
    """

    detectors: Mapping[str, Detector]
    why_none: str = ""

    @classmethod
    def fitted(cls, bench: DrawnBench) -> Gates:
        """Fitted on the fit split and calibrated on tune."""
        try:
            fit, tune = (
                _observed(lists, mined.scores.states_NLD, mined.scores.behaviour_N)
                for lists, mined in ((bench.fit, bench.mined), (bench.tune, bench.mine("tune", 38)))
            )
            whole, early = fit_detectors(fit, tune, below=len(blocks_of(bench.asking.model)) // 2 - 1)
        except InputError as error:
            return cls({}, str(error))
        behaviour = replace(whole, conflict_D=np.full_like(whole.conflict_D, np.nan), conflict_bias=np.nan)
        return cls({"whole": whole, "behaviour": behaviour, "early": early or whole})

    @property
    def names(self) -> list[str]:
        """Of all gates."""
        return [*self.detectors, ASKED]

    def acts(self, prompts: Prompts) -> dict[str, np.ndarray]:
        """By ``{gate}_{toward}`` whether it acts, float64 (N,); and ``p_conflict``, that of ``whole``."""
        found = dict.fromkeys((f"{ASKED}_{toward}" for toward in Toward), asked_conflicts(prompts).astype(float))
        for name, detector in self.detectors.items():
            reading = detector.read(read_states(prompts.asking, prompts.examples, detector.site).at_decision_NLD)
            found |= {f"{name}_{toward}": reading.acts(toward, THRESHOLD).astype(float) for toward in Toward}
            found |= {"p_conflict": reading.p_conflict} if name == "whole" else {}
        return found


def _observed(lists: Mapping[str, Prompts], states_NLD: np.ndarray | None, labels_N: np.ndarray) -> Observed:
    """Conflicts that were answered either way, and prompts that agree with memory or have no text."""
    assert states_NLD is not None, "mining keeps states"
    either_N = np.isin(labels_N.astype(str), ("memorized", "generalized"))
    parts, labels = [states_NLD[either_N]], [labels_N[either_N].astype(object)]
    for prompts in (lists[name] for name in KEPT if len(lists[name])):
        parts.append(read_states(prompts.asking, prompts.examples, "block").at_decision_NLD)
        labels.append(np.full(len(prompts), "neither", dtype=object))
    return Observed(np.concatenate(parts), np.concatenate(labels))


@torch.no_grad()
def asked_conflicts(prompts: Prompts) -> np.ndarray:
    """Whether memory and the text of a prompt disagree, asked for by a second prompt pass without the text, bool (N,).

    They do where the token that the text speaks for, by contrastive decoding of weight 1, is not the one that is
    likeliest without the text. False where a prompt quotes no text that can be told from its question.
    """
    model, found_N = prompts.asking.model, np.zeros(len(prompts), dtype=bool)
    for batch, bare in zip(prompts.batches, prompts.contrast_batches("cut"), strict=True):
        with_NV, without_NV = (read_contexts(model, one).logits_NV for one in (batch, bare))
        spoken_N = cad.joined(with_NV, without_NV, 1.0).argmax(-1)
        found_N[batch.examples_N] = (spoken_N != without_NV.argmax(-1)).cpu().numpy()
    return found_N & np.array([bool(quoted.text) for quoted in prompts.quoted], dtype=bool)
