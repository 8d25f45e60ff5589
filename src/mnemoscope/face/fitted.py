"""The public face: ``fit`` finds pairs, vectors and a detector for a model and data, ``Fitted`` uses them.

Shapes: N prompts, T tokens of a left-padded batch, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import PLAIN, Asking, Prompting, check_known, complete, phrase_of, states_at_the_end
from mnemoscope.interventions import OPPOSITE, Binding, SteeringVector, Toward, best_paths, readable
from mnemoscope.interventions.detect import Detector, Reading
from mnemoscope.runs.digests import check_closed, intact, is_there
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import CellFacts, WhyFacts
from mnemoscope.runs.strict import read_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.report import Summary

_TOLD: set[str] = set()  # warnings that were given
ALSO: dict[str, Toward] = {"context": "generalized", "memory": "memorized"}  # what a user of documents calls them
BATCH = 32  # prompts in a pass


def fit(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    task: str | Path | Any = None,
    out: str | Path = "runs/fit",
    *,
    prompting: Prompting = PLAIN,
    options: Mapping[str, Any] | None = None,
    **choices: Any,
) -> Fitted:
    """Find pairs, fit vectors in both directions and a detector, and judge them on held-out groups.

    Args:
        model: an open causal language model, plain or with adapters, which stays unchanged, or a name or path for
            ``load_model``.
        tokenizer: of an open model.
        task: a JSONL file, a task's name, ``package.module:Class``, or a ``Task``.
        out: the run folder; an interrupted fit continues there.
        prompting: the format of prompts.
        options: of a task that is given by name.
        choices: ``settings``, ``positions``, ``aim``, ``lost``, ``neither``, ``threads``, ``progress`` and,
            for a name, ``dtype``, ``device_map`` and ``layout``; see ``mnemoscope.face.fitting.fit_run``.

    Raises:
        InputError: an argument cannot be used; the field, its value and what is allowed are named.
        StudyError: nothing can be fitted, for example because no pair flips.
    """
    from mnemoscope.face.fitting import fit_run

    if task is None:
        raise InputError("task: None; give a JSONL file, the name of a task, package.module:Class, or a Task")
    is_open = not isinstance(model, str | Path)
    if is_open and tokenizer is None:
        raise InputError("tokenizer: None; an open model needs its tokenizer (or give the model by name)")
    if not is_open and tokenizer is not None:
        raise InputError(f"tokenizer: a model that is given by name ({model}) brings its own; leave it out")
    opened = fit_run(model, tokenizer, task, Path(out), prompting, dict(options or {}), **choices)
    return Fitted.open(out, *opened, prompting=prompting if prompting.begun else None)  # else: that of the fit


@dataclass(frozen=True)
class Fitted:
    """Vectors and detectors together with the model they were fitted on.

    Attributes:
        source: the run folder, cell folder or file that they were opened from.
        vectors: by the behaviour they steer to; the best ones by the tune split.
        detector: None where none could be fitted; ``lower_detector`` reads at or below the first shifted layer.
        prompting: the format of prompts.
    """

    source: Path
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    vectors: Mapping[Toward, SteeringVector]
    detector: Detector | None
    lower_detector: Detector | None
    prompting: Prompting = PLAIN

    @classmethod
    def open(
        cls,
        source: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        prompting: Prompting | None = None,
        force: bool = False,
    ) -> Fitted:
        """Open the vectors and detectors that a run has fitted on this model.

        Args:
            source: a run, a cell of one, or the file of one vector or detector.
            prompting: the format of prompts; default: that of the fit.
            force: accept what was fitted on another model of the same shape.

        Raises:
            InputError: there is nothing, it is damaged, it was fitted on another model (the field that differs is
                named) or on prompts of another format, or several cells of a run fit this model.
        """
        source = Path(source)
        if not source.exists():
            raise InputError(f"from: {source} does not exist")
        found = Binding.of(model, tokenizer)
        vectors, detector, lower = artefacts_of(source, found)
        artefacts = [artefact for artefact in (*vectors.values(), detector, lower) if artefact]
        for artefact in artefacts:
            artefact.check(model, tokenizer, force, found)
        stored = artefacts[0].prompting if artefacts else PLAIN
        return cls(source, model, tokenizer, vectors, detector, lower, _agreed(stored, prompting))

    def summary(self) -> Summary:
        """The answers of the run's report, with controls, cost and counts."""
        from mnemoscope.report import summary_of

        run = next((p for p in (self.source, *self.source.parents) if (p / "results.json").is_file()), None)
        if run is None:
            raise InputError(f"from: {self.source} is no part of a finished run, so there is nothing to sum up")
        return summary_of(run)

    def inputs(self, prompts: Sequence[str]) -> Any:
        """Formatted, left-padded ``input_ids`` and ``attention_mask`` (N, T) of prompts.

        Raises:
            InputError: a prompt has no token, too many, or one that the tokenizer does not know.
        """
        asking = Asking(self.model, self.tokenizer, prompting=self.prompting)
        check_known(asking, prompts)
        return asking.padded([asking.text(prompt) for prompt in prompts])

    def detect(self, prompts: Sequence[str]) -> Reading:
        """P(memorized) of prompts before they are answered.

        Raises:
            InputError: there is no detector, or as ``inputs``.
        """
        detector, parts = self._needed(self.detector), []
        _warn_if_the_input_does(detector)
        for start in range(0, len(prompts), BATCH):
            inputs = self.inputs(prompts[start : start + BATCH])
            parts.append(states_at_the_end(self.model, inputs.input_ids, inputs.attention_mask, detector.site))
        return detector.read(np.concatenate(parts) if parts else np.empty((0, *detector.weights_LD.shape)))

    def steer(
        self, toward: Toward, alpha: float | Sequence[float] | Tensor = 1.0, gate: float | None = None
    ) -> AbstractContextManager[None]:
        """Steer the model inside a context, in any forward pass or ``generate``; see ``SteeringVector.apply``.

        Args:
            toward: ``generalized`` or ``memorized``; of documents also ``context`` or ``memory``.
            alpha: factor, or one for each prompt of the batch; 0 leaves the model untouched, bit by bit.
            gate: steer only where ``Reading.acts`` with this threshold: the other behaviour is at least so probable,
                memory and the rule seem to disagree, and the prompt is like those of the fit. Decides in the same
                pass, by the detector at or below the first shifted layer.

        Raises:
            InputError: there is no such vector, no detector, or none that reads below the vector.
        """
        vector = self.vector(toward)
        detector = None if gate is None else self.lower_detector or self._needed(self.detector)
        if detector:
            _warn_if_the_input_does(detector)
        decides = detector.gate(toward, gate) if detector and gate is not None else None
        return vector.apply(self.model, alpha, gate=decides)

    def gate(self, inputs: Any, threshold: float = 0.5, toward: Toward = "generalized") -> Tensor:
        """Factors of a gate for each prompt of a batch, 0.0 or 1.0, float32 (N,): ``steer(toward, alpha=factors)``.

        ``toward`` is that of the vector: the gate acts where the other behaviour is likely.

        ``inputs`` is any left-padded batch. Reads up to the detector's layer, which may lie above the first shift.
        """
        detector = self._needed(self.detector)
        _warn_if_the_input_does(detector)
        layers = [detector.layer]
        states_NLD = states_at_the_end(self.model, inputs["input_ids"], inputs["attention_mask"], detector.site, layers)
        acts_N = detector.read_verdict(states_NLD[:, 0]).acts(known_behaviour(toward), threshold)
        return torch.from_numpy(acts_N).float()

    def answers(
        self,
        prompts: Sequence[str],
        toward: Toward,
        alpha: float = 1.0,
        gate: float | None = None,
        max_new_tokens: int = 20,
        go_on: bool = False,
    ) -> list[dict[str, Any]]:
        """Answer with and without the vector, greedily: ``prompt``, ``plain``, ``steered``, and ``acted`` (bool).

        Both are cut where the answer ends, behind its phrase, unless the text is to ``go_on``.
        """
        vector, inputs = self.vector(toward), self.inputs(prompts)
        factors = torch.ones(len(prompts)) if gate is None else self.gate(inputs, gate, toward)
        plain = complete(self.model, self.tokenizer, inputs, max_new_tokens)
        with vector.apply(self.model, alpha * factors):
            steered = complete(self.model, self.tokenizer, inputs, max_new_tokens)
        plain, steered = ([text if go_on else phrase_of(text) for text in texts] for texts in (plain, steered))
        rows = zip(prompts, plain, steered, factors.bool().tolist(), strict=True)
        return [dict(zip(("prompt", "plain", "steered", "acted"), row, strict=True)) for row in rows]

    def vector(self, toward: Toward) -> SteeringVector:
        """The vector that steers to a behaviour.

        Raises:
            InputError: it is no behaviour, or there is no such vector.
        """
        behaviour = known_behaviour(toward)
        if behaviour not in self.vectors:
            there = ", ".join(self.vectors) or "none"
            raise InputError(f"toward: {self.source} has no vector to {toward}; it has {there}")
        return self.vectors[behaviour]

    def _needed(self, detector: Detector | None) -> Detector:
        if detector is None:
            files = sorted(self.source.rglob("no_detector.json"))
            reasons = [read_json(intact(path), WhyFacts)["why"] for path in files]
            why = reasons[0] if reasons else "set detection.fitted: true, or open the run instead of one vector"
            raise InputError(f"detector: {self.source} has none ({why})")
        return detector


def vector_file(source: Path, toward: str | None) -> Path:
    """The file of the best vector of a run with one cell, or of a cell, that steers to a behaviour.

    Raises:
        InputError: it has no vectors, several cells, or no such vector; or ``toward`` is no behaviour.
    """
    check_closed(source)
    cells = _cells(source)
    if len(cells) > 1:
        raise InputError(f"FILE: {source} has several cells; name one of {', '.join(map(str, cells))}")
    found = best_paths(cells[0]).get(f"to_{known_behaviour(toward)}")
    if found is None:
        raise InputError(f"toward: {source} has no vector to {toward}")
    return found


def _warn_if_the_input_does(detector: Detector) -> None:
    """Warn, once for each detector, where it ranks test prompts no better than their tokens alone do."""
    if detector.as_good_as_the_input is None:
        return
    ours, beside = detector.as_good_as_the_input
    told = f"P(memorized) ranks test prompts {ours:.2f} right, the input alone {beside:.2f}"
    if told not in _TOLD:
        _TOLD.add(told)
        logging.getLogger("mnemoscope").warning("detector: %s; it may read no more than the wording", told)


def known_behaviour(toward: Any) -> Toward:
    behaviour = ALSO.get(toward, toward)
    if behaviour not in OPPOSITE:
        raise InputError(f"toward: {toward!r} is not one of {', '.join(OPPOSITE)}; of documents: {', '.join(ALSO)}")
    return behaviour


def artefacts_of(source: Path, found: Binding) -> tuple[dict[Toward, SteeringVector], Detector | None, Detector | None]:
    """The best vectors and the detectors of a file, a cell or a run."""
    if source.is_file():
        described = source.with_suffix(".json")
        if described.is_file() and '"toward"' in read_text(described):
            vector = SteeringVector.load(source)
            return {vector.toward: vector}, None, None
        return {}, Detector.load(source), None
    check_closed(source)
    cell = cell_of(source, found)
    vectors = [SteeringVector.load(path) for path in best_paths(cell).values()]
    paths = [cell / f"{name}.safetensors" for name in ("detector", "detector_below")]
    detector, lower = (Detector.load(intact(path)) if is_there(path) else None for path in paths)
    return {vector.toward: vector for vector in vectors}, detector, lower


def cell_of(source: Path, found: Binding) -> Path:
    """The only cell of a run (or the cell itself), or the one whose vectors were fitted on this model."""
    cells = _cells(source)
    if len(cells) == 1:
        return cells[0]
    bound = ((cell, read_json(intact(cell / "cell.json"), CellFacts).get("binding")) for cell in cells)
    with readable("binding", source):
        fitting = [cell for cell, facts in bound if facts and Binding(**facts).has_weights_of(found)]
    if len(fitting) > 1:
        names = ", ".join(map(str, fitting))
        raise InputError(f"from: several cells of the run were fitted on this model; name one of {names}")
    if not fitting:
        raise InputError(f"weights: no cell of {source} was fitted on this model, which has {found.weights}")
    return fitting[0]


def _cells(source: Path) -> list[Path]:
    """The cells of a run that have chosen vectors, or the cell itself; InputError without any."""
    places = ("records/chosen.json", "cells/*/records/chosen.json")
    cells = [path.parent.parent for place in places for path in sorted(source.glob(place))]
    if not cells:
        raise InputError(
            f"from: {source} is neither a vector, a detector, nor a run that has chosen vectors; one that was "
            "stopped goes on with the command that began it"
        )
    return cells


def _agreed(stored: Prompting, asked: Prompting | None) -> Prompting:
    """The format of prompts, which must be that of the fit."""
    if asked is None:
        return stored
    if asked.chat != stored.chat:
        how = "by the chat template" if stored.chat else "as they are"
        raise InputError(f"chat: {asked.chat}; allowed is {stored.chat}: it was fitted on prompts formatted {how}")
    if asked.system is not None and asked.system != stored.system:
        raise InputError(f"system: {asked.system!r}; this was fitted with {stored.system!r}")
    if stored.begun and not asked.begun:
        raise InputError("reply: this was fitted where the beginning of the reply was given; give it (reply, --reply)")
    return Prompting(stored.chat, stored.system, asked.reply, asked.split)
