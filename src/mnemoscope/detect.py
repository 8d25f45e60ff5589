"""P(memorized) of a prompt before it is answered, and gates that steer only where it says so.

A calibrated probe reads each layer at the decision position. A second one tells prompts on which memory and the rule
disagree from others, and a distance tells prompts unlike all that the probes were fitted on: of these a probability
means nothing.

Shapes: N prompts, T tokens (columns), L layers, D neurons.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import expit
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from mnemoscope.behaviour import Asking, check_known, read_states
from mnemoscope.errors import InputError
from mnemoscope.models import Site, backbone_of, blocks_of, nothing_read_before, pass_inputs, site_width
from mnemoscope.probes import LayerProbe, Standardized, fit_layer_probes
from mnemoscope.steering import Binding, Toward, check_both, only_accepted, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LIKE = 0.99  # share of the tune prompts that count as like those of the fit split
SURE = 0.75  # from this probability on a layer is said to know
LEAST = 8  # prompts of each behaviour that a detector is fitted on, and calibrated on


@dataclass(frozen=True)
class Observed:
    """Prompts with what followed them.

    Attributes:
        states_NLD: at the decision position.
        followed_N: ``memorized`` or ``generalized`` where the two disagree; ``neither`` for prompts without a conflict,
            and what was answered neither way is left out before.
    """

    states_NLD: np.ndarray
    followed_N: np.ndarray

    def conflicts(self) -> tuple[np.ndarray, np.ndarray]:
        """States (N, L, D) of the conflicts, and whether each was answered generalized, int64 (N,)."""
        kept_N = self.followed_N != "neither"
        return self.states_NLD[kept_N], (self.followed_N[kept_N] == "generalized").astype(np.int64)


@dataclass(frozen=True)
class Reading:
    """What a detector says of N prompts.

    Attributes:
        p_memorized_NL: by layer; that of ``layer`` is the verdict.
        p_conflict_N: probability that memory and the rule disagree; NaN where nothing was there to learn it from.
        distance_N: from what the detector was fitted on, 1 being the farthest that still counts as like it.
    """

    layer: int
    p_memorized_NL: np.ndarray
    p_conflict_N: np.ndarray
    distance_N: np.ndarray

    @property
    def p_memorized_N(self) -> np.ndarray:
        """The verdict, float64."""
        return self.p_memorized_NL[:, self.layer]

    @property
    def unlike_N(self) -> np.ndarray:
        """Whether a prompt is unlike those that the detector was fitted on, bool."""
        return self.distance_N > 1

    @property
    def readable_from_N(self) -> list[int | None]:
        """The first layer from which on, up to the verdict's, every layer is sure of the verdict; None without one."""
        found: list[int | None] = []
        for p_L in self.p_memorized_NL[:, : self.layer + 1]:
            toward_L = p_L if p_L[-1] >= 0.5 else 1 - p_L
            doubts = np.flatnonzero(toward_L < SURE)
            first = int(doubts[-1]) + 1 if len(doubts) else 0
            found.append(first if first <= self.layer else None)
        return found

    def acts(self, toward: Toward, threshold: float) -> np.ndarray:
        """Whether a gate that turns to ``toward`` acts, bool (N,).

        It does where the other behaviour is expected with at least this probability, there is a conflict to be decided,
        and the prompt is like those that the detector knows.
        """
        expected_N = self.p_memorized_N if toward == "generalized" else 1 - self.p_memorized_N
        conflict_N = np.isnan(self.p_conflict_N) | (self.p_conflict_N >= 0.5)
        return (expected_N >= threshold) & conflict_N & ~self.unlike_N


@dataclass(frozen=True)
class Detector:
    """Calibrated probes of every layer, and what the prompts they were fitted on look like.

    Attributes:
        site, layer: where states are read; the layer whose probability is the verdict.
        weights_LD, bias_L: ``P(memorized) = sigmoid(states @ weights + bias)``, float64.
        conflict_D, conflict_bias: the same for P(conflict) at ``layer``; NaN where there was nothing to learn it from.
        mean_D, whitening_DD: the distance is ``|(state - mean) @ whitening|``, 1 at the edge of what is known.
        task, binding: what it was fitted on.
        chat, system, begun: how prompts were put, as in ``SteeringVector``.
    """

    site: Site
    layer: int
    weights_LD: np.ndarray
    bias_L: np.ndarray
    conflict_D: np.ndarray
    conflict_bias: float
    mean_D: np.ndarray
    whitening_DD: np.ndarray
    task: str = ""
    binding: Binding | None = None
    chat: bool = False
    system: str | None = None
    begun: bool = False

    @classmethod
    def fit(cls, fit: Observed, tune: Observed, site: Site = "block") -> Detector:
        """Probes from the fit split; regularization, calibration and the layer from the tune split.

        Calibration: logistic regression of the behaviour on the score (Platt 1999, "Probabilistic outputs"). The layer
        is the one whose calibrated probabilities have the smallest log loss.

        Raises:
            InputError: a split has too few prompts of a behaviour.
        """
        (fit_NLD, fit_N), (tune_NLD, tune_N) = fit.conflicts(), tune.conflicts()
        for split, labels_N in (("fit", fit_N), ("tune", tune_N)):
            for name, count in (("generalized", int(labels_N.sum())), ("memorized", int((1 - labels_N).sum()))):
                if count < LEAST:
                    raise InputError(f"{split}: {count} prompts were answered {name}; at least {LEAST} are needed")
        weights, biases, losses = [], [], []
        for layer, probe in enumerate(fit_layer_probes(fit_NLD, fit_N, tune_NLD, tune_N)):
            scores_N = probe.decision_function(tune_NLD[:, layer])
            slope, offset = calibrated(scores_N, 1 - tune_N)
            weights.append(slope * probe.weights_D_)
            biases.append(slope * probe.bias_ + offset)
            losses.append(log_loss(1 - tune_N, expit(slope * scores_N + offset), labels=[0, 1]))
        layer = int(np.argmin(losses))
        conflict_D, conflict_bias = _conflict_probe(fit, tune, layer)
        return cls(
            site,
            layer,
            np.stack(weights),
            np.array(biases),
            conflict_D,
            conflict_bias,
            *_likeness(fit.states_NLD[:, layer], tune.states_NLD[:, layer]),
        )

    def read(self, states_NLD: np.ndarray) -> Reading:
        """What states at the decision position (N, L, D) say."""
        # Layer by layer: all states in double precision would be many.
        by_layer = [
            states_NLD[:, layer].astype(np.float64) @ weights_D for layer, weights_D in enumerate(self.weights_LD)
        ]
        logit_NL = np.stack(by_layer, axis=1) + self.bias_L
        here_ND = states_NLD[:, self.layer].astype(np.float64)
        distance_N = np.linalg.norm((here_ND - self.mean_D) @ self.whitening_DD, axis=1)
        conflict_N = expit(here_ND @ self.conflict_D + self.conflict_bias)
        return Reading(self.layer, expit(logit_NL), conflict_N, distance_N)

    def bound_to(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: str = "") -> Detector:
        """The same detector, bound to the model it was fitted on."""
        return replace(self, binding=Binding.of(model, tokenizer), task=task)

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors) and the JSON beside it."""
        from safetensors.numpy import save_file

        arrays, facts = {}, {}
        for name, value in self.__dict__.items():
            if isinstance(value, np.ndarray):
                arrays[name] = np.ascontiguousarray(value)
            else:
                facts[name] = asdict(value) if isinstance(value, Binding) else value
        facts["conflict_bias"] = None if math.isnan(self.conflict_bias) else self.conflict_bias
        save_file(arrays, path)
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(
        cls,
        path: Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        force: bool = False,
    ) -> Detector:
        """Read a detector, and check that it was fitted on this model where one is given.

        Raises:
            InputError: the files are missing or corrupted, the model is another (the field that differs is named), or
                it is given without its tokenizer.
        """
        from safetensors.numpy import load_file

        check_both(model, tokenizer, force)

        with reading("detector", path):
            facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
            facts["binding"] = Binding(**facts["binding"]) if facts["binding"] else None
            facts["conflict_bias"] = math.nan if facts["conflict_bias"] is None else facts["conflict_bias"]
            detector = cls(**facts, **load_file(path))
        if model is not None:
            if tokenizer is not None and not force:
                Binding.check(detector.binding, Binding.of(model, tokenizer), "detector")
            found = len(blocks_of(model)), site_width(model, 0, detector.site)
            if detector.weights_LD.shape != found:
                raise InputError(
                    f"detector: it reads {detector.weights_LD.shape} layers and neurons, this model has {found}"
                )
        return detector


@dataclass
class Gate:
    """Lets a vector act only on prompts whose expected behaviour is the one to be turned away from.

    ``with vector.apply(model, gate=Gate(detector, "generalized")): model.generate(...)``

    Attributes:
        threshold: probability of the other behaviour from which on it acts, in [0, 1].
        asked, acted: prompts (rows of a batch) so far, and on how many of them it acted.
    """

    detector: Detector
    toward: Toward
    threshold: float = 0.5
    asked: int = 0
    acted: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InputError(f"gate: {self.threshold} is not a probability, in 0 .. 1")

    def __call__(self, model: PreTrainedModel, ids_NT: Tensor, mask_NT: Tensor, cache: Any = None) -> Tensor:
        """Whether to act on each prompt, bool (N,); see ``steering.Gate``."""
        states_NLD = states_at_the_end(model, ids_NT, mask_NT, self.detector.site, cache)
        acts_N = self.detector.read(states_NLD).acts(self.toward, self.threshold)
        self.asked += len(acts_N)
        self.acted += int(acts_N.sum())
        return torch.from_numpy(acts_N)


@torch.no_grad()
def states_at_the_end(
    model: PreTrainedModel, ids_NT: Tensor, mask_NT: Tensor, site: Site, cache: Any = None
) -> np.ndarray:
    """Float32 states (N, L, D) at the last column of a left-padded batch."""
    with read_states(model, site) as states, nothing_read_before(model, 1):
        # Nothing is read behind these tokens: keys and values need not be kept.
        backbone_of(model)(**pass_inputs(model, ids_NT, mask_NT, cache) | {"use_cache": cache is not None})
    return torch.stack([states_ND.float().cpu() for states_ND in states], dim=1).numpy()


def read_prompts(detector: Detector, asking: Asking, prompts: Sequence[str]) -> Reading:
    """What a detector says of prompts; their last token is the decision position.

    Raises:
        InputError: a prompt has no token, too many, or one that the tokenizer does not know.
    """
    check_known(asking, prompts)
    parts = []
    for start in range(0, len(prompts), asking.batch_size):
        inputs = asking.padded([asking.text(prompt) for prompt in prompts[start : start + asking.batch_size]])
        parts.append(states_at_the_end(asking.model, inputs.input_ids, inputs.attention_mask, detector.site))
    return detector.read(np.concatenate(parts))


def find_detector(
    source: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, force: bool = False
) -> Detector:
    """The detector of a file, of a cell's folder or of a run, that was fitted on this model.

    Raises:
        InputError: there is none, every one was fitted on another model, or several cells have one for this model.
    """
    if source.is_file():
        return Detector.load(source, model, tokenizer, force)
    cells = [source, *sorted((source / "cells").glob("*"))]
    paths = [cell / "detector.safetensors" for cell in cells]
    lacking = [cell / "records" / "no_detector.json" for cell in cells]
    reasons = [json.loads(path.read_text())["why"] for path in lacking if path.is_file()]
    why = reasons[0] if reasons else "set detection.fitted: true"
    return only_accepted(
        {path.parent: path for path in paths if path.is_file()},
        lambda path: Detector.load(path, model, tokenizer, force),
        f"from: {source} is neither a detector nor a folder of a run with one ({why})",
    )


def calibrated(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Slope and offset with which ``sigmoid(slope * score + offset)`` is the probability of label 1."""
    model = LogisticRegression(C=1e4).fit(scores_N[:, None], labels_N)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def _conflict_probe(fit: Observed, tune: Observed, layer: int) -> tuple[np.ndarray, float]:
    """Weights and bias of P(conflict) at a layer; NaN without prompts of both kinds."""
    labels = {split: (seen.followed_N != "neither").astype(np.int64) for split, seen in (("f", fit), ("t", tune))}
    width = fit.states_NLD.shape[2]
    if any(min(found.sum(), (1 - found).sum()) < LEAST for found in labels.values()):
        return np.full(width, math.nan), math.nan
    states = fit.states_NLD[:, [layer]], labels["f"], tune.states_NLD[:, [layer]], labels["t"]
    probe: LayerProbe = fit_layer_probes(*states)[0]
    slope, offset = calibrated(probe.decision_function(tune.states_NLD[:, layer]), labels["t"])
    return slope * probe.weights_D_, slope * probe.bias_ + offset


def _likeness(fit_ND: np.ndarray, tune_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and whitening of a Mahalanobis distance that is 1 where all but one in a hundred tune states end.

    The covariance is shrunk (Ledoit and Wolf 2004) in units of each neuron's spread, or a few huge neurons would be all
    that the shrinkage sees.
    """
    standardized = Standardized.of(fit_ND)
    covariance_DD, _ = ledoit_wolf(standardized.scaled_ND)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    whitening_DD = vectors_DD / np.sqrt(np.maximum(values_D, 1e-10)) / standardized.scale_D[:, None]
    # Of a neuron that never moved on fit prompts nothing is known, so it is left out.
    whitening_DD[standardized.scaled_ND.std(axis=0) == 0] = 0.0
    distance_N = np.linalg.norm((tune_ND.astype(np.float64) - standardized.mean_D) @ whitening_DD, axis=1)
    return standardized.mean_D, whitening_DD / max(float(np.quantile(distance_N, LIKE)), 1e-12)
