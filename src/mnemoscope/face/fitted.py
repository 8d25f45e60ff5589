"""The public face: ``fit`` finds pairs, vectors and a detector for a model and data, ``Fitted`` uses them.

Shapes: N prompts, T tokens of a left-padded batch, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import PLAIN, Asking, Prompting, check_known, phrase_of, states_at_the_end
from mnemoscope.face.stored import agreed, artefacts_of, reader_of, vectors_of, warn_if_the_input_does
from mnemoscope.interventions import Artefact, Binding, Intervention, SteeringVector, Toward
from mnemoscope.interventions.detect import Detector, Reading
from mnemoscope.runs.digests import intact
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import WhyFacts
from mnemoscope.runs.strict import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.auditing.origins import Origins, Reader
    from mnemoscope.face.rewriting import Rewritten
    from mnemoscope.report import Summary

Found = TypeVar("Found")
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
    """Find pairs, fit every lever in both directions and a detector, and judge them on held-out groups.

    Args:
        model: an open causal language model, plain or with adapters, which stays unchanged, or a name or path for
            ``load_model``.
        tokenizer: of an open model.
        task: a JSONL file, a task's name, ``package.module:Class``, or a ``Task``.
        out: the run folder; an interrupted fit continues there.
        prompting: the format of prompts.
        options: of a task that is given by name.
        choices: ``levers``, ``settings``, ``positions``, ``aim``, ``lost``, ``neither``, ``threads``, ``progress``,
            ``layout``; for a name ``dtype``, ``device_map`` and ``workers``; see ``mnemoscope.face.fitting.fit_run``.

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
    """Levers and detectors together with the model they were fitted on.

    Attributes:
        source: the run folder, cell folder or file that they were opened from.
        levers: by the behaviour they bring about and by name (words, decoding, adapter, shift, low-rank); the best one
            by the tune split comes first.
        detector: None where none could be fitted; ``lower_detector`` reads at or below the first shifted layer.
        prompting: the format of prompts.
        preferred: levers that ``use`` has named.
        reader: of answers, where ``fit_reader`` has put one into the folder.
    """

    source: Path
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    levers: Mapping[Toward, Mapping[str, Intervention]]
    detector: Detector | None
    lower_detector: Detector | None
    prompting: Prompting = PLAIN
    preferred: Mapping[Toward, str] = field(default_factory=dict)
    reader: Reader | None = None

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
        reader, alone = reader_of(source)
        levers, detector, lower = ({}, None, None) if alone else artefacts_of(source, found)
        every = [one for named in levers.values() for one in named.values()]
        artefacts: list[Artefact] = [artefact for artefact in (*every, detector, lower, reader) if artefact]
        for artefact in artefacts:
            artefact.check(model, tokenizer, force, found)
        stored = artefacts[0].prompting if artefacts else PLAIN
        return cls(source, model, tokenizer, levers, detector, lower, agreed(stored, prompting), reader=reader)

    @property
    def vectors(self) -> dict[Toward, SteeringVector]:
        """By the behaviour they steer to, the best vectors: levers that act on states, inside a pass."""
        return vectors_of(self.levers)

    def use(self, toward: str, lever: str) -> Fitted:
        """The same with another lever for a direction: ``words``, ``decoding``, ``adapter``, ``shift``, ``low-rank``.

        Raises:
            InputError: it is no behaviour, or there is no such lever.
        """
        there = self.levers.get(behaviour := Toward.of(toward), {})
        if lever not in there:
            has = ", ".join(there) or "none"
            raise InputError(f"lever: {lever!r} to {toward} is not in {self.source}; it has {has}")
        return replace(self, preferred={**self.preferred, behaviour: lever})

    def lever(self, toward: str) -> Intervention:
        """What ``generate`` answers with: the best lever of a direction, or the one that ``use`` has named.

        Raises:
            InputError: it is no behaviour, or there is none.
        """
        there = self._there("lever", self.levers, toward)
        return there[self.preferred.get(Toward.of(toward)) or next(iter(there))]

    def generate(
        self,
        prompts: Sequence[str],
        toward: str,
        alpha: float = 1.0,
        gate: float | None = None,
        max_new_tokens: int = 20,
        bare: Sequence[str] | None = None,
        go_on: bool = False,
    ) -> list[str]:
        """Answer greedily by the best lever of a direction, whatever it is; see ``use`` for another one.

        Args:
            alpha: factor on what has a strength; 0: the model itself.
            gate: as in ``steer``, from a pass beforehand.
            max_new_tokens: tokens of an answer, at most.
            bare: the questions without the texts that prompts quote. Default: from the line of the last question mark
                on, as in a fit; two passes contrast a prompt with it, and words may go before it.
            go_on: keep what follows the answer's phrase.

        Raises:
            InputError: no such lever; as ``inputs``; or two passes are joined and a prompt has no text to leave out.
        """
        from mnemoscope.bench.answers import NOTHING, answered  # a server, which imports this module, has no pandas
        from mnemoscope.bench.prompts import Prompts

        one, prompts = self.lever(toward).scaled(alpha), list(prompts)
        if bare is not None and len(bare) != len(prompts):
            raise InputError(f"bare: {len(bare)} questions of {len(prompts)} prompts")
        inputs, acts = self.inputs(prompts) if prompts else None, np.ones(len(prompts), bool)
        if gate is not None and inputs is not None:
            acts = self.gate(inputs, gate, toward).bool().numpy()
        asking = Asking(self.model, self.tokenizer, batch_size=BATCH, prompting=self.prompting)
        listed, texts = Prompts.free(asking, prompts, bare), [""] * len(prompts)
        for each, chosen in ((one, np.flatnonzero(acts)), (NOTHING, np.flatnonzero(~acts))):
            for place, text in zip(chosen, answered(each, listed.of(chosen), max_new_tokens), strict=True):
                texts[place] = text if go_on else phrase_of(text)
        return texts

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
        asking = self._asking(prompts)
        return asking.padded([asking.text(prompt) for prompt in prompts])

    def detect(self, prompts: Sequence[str]) -> Reading:
        """P(memorized) of prompts before they are answered.

        Raises:
            InputError: there is no detector, or as ``inputs``.
        """
        detector, parts = self._needed(self.detector), []
        warn_if_the_input_does(detector)
        for start in range(0, len(prompts), BATCH):
            inputs = self.inputs(prompts[start : start + BATCH])
            parts.append(states_at_the_end(self.model, inputs.input_ids, inputs.attention_mask, detector.site))
        states_NLD = np.concatenate(parts) if parts else np.empty((0, *detector.weights_LD.shape))
        return replace(detector.read(states_NLD), prompts=prompts)

    def steer(
        self, toward: str, alpha: float | Sequence[float] | Tensor = 1.0, gate: float | None = None
    ) -> AbstractContextManager[None]:
        """Steer by the best vector inside a context, in any forward pass or ``generate``; see ``SteeringVector.apply``.

        Where ``use`` has named an adapter, that acts. Words and decoding act on prompts; ``generate`` answers by these.

        Args:
            toward: ``generalized`` or ``memorized``; of documents also ``context`` or ``memory``.
            alpha: factor, or one for each prompt of the batch; 0 leaves the model untouched, bit by bit.
            gate: steer only where ``Reading.acts`` with this threshold: the other behaviour is at least so probable,
                memory and the rule seem to disagree, and the prompt is like those of the fit. Decides in the same
                pass, by the detector at or below the first shifted layer.

        Raises:
            InputError: there is no such vector, what is used does not act inside a pass, there is no detector, or none
                that reads below the vector.
        """
        one = self.lever(toward) if Toward.of(toward) in self.preferred else self.vector(toward)
        if type(one).apply is Intervention.apply:
            raise InputError(f"lever: {one.lever} act on prompts, not inside a pass; answer by fitted.generate")
        detector = None if gate is None else self.lower_detector or self._needed(self.detector)
        if detector:
            warn_if_the_input_does(detector)
        decides = detector.gate(Toward.of(toward), gate) if detector and gate is not None else None
        return one.apply(self.model, alpha, gate=decides)

    def gate(self, inputs: Any, threshold: float = 0.5, toward: str = "generalized") -> Tensor:
        """Factors of a gate for each prompt of a batch, 0.0 or 1.0, float32 (N,): ``steer(toward, alpha=factors)``.

        ``toward`` is that of the vector: the gate acts where the other behaviour is likely.

        ``inputs`` is any left-padded batch. Reads up to the detector's layer, which may lie above the first shift.
        """
        detector = self._needed(self.detector)
        warn_if_the_input_does(detector)
        layers = [detector.layer]
        states_NLD = states_at_the_end(self.model, inputs["input_ids"], inputs["attention_mask"], detector.site, layers)
        acts_N = detector.read_verdict(states_NLD[:, 0]).acts(Toward.of(toward), threshold)
        return torch.from_numpy(acts_N).float()

    def answers(
        self, prompts: Sequence[str], toward: str, gate: float | None = None, **how: Any
    ) -> list[dict[str, Any]]:
        """Answer unsteered and by the best lever: ``prompt``, ``plain``, ``steered``, ``acted`` (bool) and ``held``.

        The gate did not act where ``held`` has a reason. ``how``: see ``generate``.
        """
        gate = gate if len(prompts) else None
        held = [""] * len(prompts) if gate is None else self.detect(prompts).held(Toward.of(toward), gate).tolist()
        plain = self.generate(prompts, toward, **how | {"alpha": 0.0})
        rows = zip(prompts, plain, self.generate(prompts, toward, gate=gate, **how), held, strict=True)
        return [{"prompt": p, "plain": a, "steered": b, "held": why, "acted": not why} for p, a, b, why in rows]

    def vector(self, toward: str) -> SteeringVector:
        """The best vector that steers to a behaviour.

        Raises:
            InputError: it is no behaviour, or there is no such vector.
        """
        return self._there("vector", self.vectors, toward)

    def _there(self, what: str, found: Mapping[Toward, Found], toward: str) -> Found:
        if not found.get(behaviour := Toward.of(toward)):
            raise InputError(f"toward: {self.source} has no {what} to {toward}; it has {', '.join(found) or 'none'}")
        return found[behaviour]

    def read(self, prompt: str, document: str = "", answer: str | None = None, max_new_tokens: int = 64) -> Origins:
        """Where each part of an answer comes from: its document, memory, or neither, read in the pass that writes it.

        Args:
            prompt: with the document in it, in the form that the reader was fitted on, see ``Reader.asks``.
            document: "" for none; then nothing comes from one.
            answer: as it stands behind the prompt; None: what the model writes greedily.
            max_new_tokens: tokens of that, at most.

        Raises:
            InputError: there is no reader, the document is not in the prompt, the answer is empty, or it does not fit.
        """
        from mnemoscope.auditing.origins.reader import Asked

        reader, asking, asked = self._needed_reader, self._asking([prompt]), Asked(prompt, document, answer or "")
        return reader.write(asking, asked, max_new_tokens) if answer is None else reader.read(asking, [asked])[0]

    def rewrite(self, prompt: str, document: str, threshold: float = 0.5, max_new_tokens: int = 64) -> Rewritten:
        """Write an answer, and again towards its document what comes from memory.

        A name or number whose P(memory) is at least ``threshold`` is written anew by the best lever to context; where
        none was fitted, it is one of the document's, see ``rewritten``. What follows it is the model's own.

        Raises:
            InputError: as ``read``, the document is empty, or the threshold is not from 0 to 1.
        """
        from mnemoscope.auditing.origins.reader import Asked
        from mnemoscope.face.rewriting import rewritten

        lever = self.lever("context") if self.levers.get(Toward.GENERALIZED) else None
        asked = Asked(prompt, document)
        return rewritten(self._asking([prompt]), self._needed_reader, asked, lever, threshold, max_new_tokens)

    def _asking(self, prompts: Sequence[str]) -> Asking:
        asking = Asking(self.model, self.tokenizer, batch_size=BATCH, prompting=self.prompting)
        check_known(asking, prompts)
        return asking

    @property
    def _needed_reader(self) -> Reader:
        if self.reader is None:
            raise InputError(f"reader: {self.source} has none; fit one on texts with documents (mnemoscope fit-reader)")
        return self.reader

    def _needed(self, detector: Detector | None) -> Detector:
        if detector is None:
            files = sorted(self.source.rglob("no_detector.json"))
            reasons = [read_json(intact(path), WhyFacts)["why"] for path in files]
            why = reasons[0] if reasons else "a fit of your own has one, a study with detection.fitted: true, too"
            raise InputError(f"detector: {self.source} has none ({why})")
        return detector
