"""A server whose answers are compared with those of transformers here, and what a comparison says. No vLLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import Toward
from mnemoscope.interventions.detect import Detector
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.expected import Answer, Request, expected_of

Ask = Callable[[Sequence[Request]], list[Answer]]  # asks all at the same time; answers in order

ANSWERED = 12  # tokens of an answer
TAIL = 8  # tokens that are said behind the answer of a talk, at most
LEAST_ROOM = 96  # tokens of prompt and answer


@dataclass(frozen=True, slots=True)
class Bounds:
    """What counts as equal: log probabilities, a detector's probabilities, tokens that lead by no more than that."""

    log_p: float
    read: float
    tie: float


# In half precision other batches and kernels round differently, in every block.
BOUNDS = {
    torch.float32: Bounds(1e-4, 1e-4, 1e-3),
    torch.bfloat16: Bounds(0.25, 0.05, 0.5),
    torch.float16: Bounds(0.04, 0.01, 0.08),
}


@dataclass(frozen=True, slots=True)
class Proof:
    """One property of a server.

    Attributes:
        difference: the largest of log probabilities, or of probabilities that are read; at most ``allowed`` passes.
        answers: so many were compared.
        wrong: answers of these with another token than the best, another report, or none at all; ``why`` is the first.
        ties: tokens beside which another is as good.
        visible: the difference that the fault would make that this is for, on the same answers, found in transformers.
            Where that is no more than ``allowed``, nothing was shown, which does not pass. NaN: not computed.
    """

    name: str
    difference: float
    allowed: float
    answers: int
    wrong: int = 0
    ties: int = 0
    visible: float = math.nan
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether it holds, and a fault would have been seen."""
        return self.difference <= self.allowed and self.answers > 0 and not (self.wrong or self.visible <= self.allowed)

    def __str__(self) -> str:
        facts = [f"{self.answers} answers"]
        if self.allowed:
            seen = "" if math.isnan(self.visible) else f"; the fault would be {self.visible:.2g}"
            facts.insert(0, f"largest difference {self.difference:.2g} (allowed {self.allowed:.2g}{seen})")
        facts += [f"{self.ties} ties"] if self.ties else []
        facts += [f"{self.wrong} wrong: {self.why}"] if self.wrong else []
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.name:<40}  {', '.join(facts)}"


def fresh_salt() -> str:
    """Shared with no other request, so that it shares no cached block."""
    return uuid4().hex


@dataclass(frozen=True)
class Served:
    """What asks, and what it is compared with. Requests of a proof share cached blocks with no other requests."""

    ask: Ask
    fitted: Fitted
    texts: Sequence[str]
    room: int
    salt: str = field(default_factory=fresh_salt)

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        return [self.ids(text) for text in self.texts]

    @property
    def ways(self) -> list[Toward]:
        return list(self.fitted.vectors)

    @property
    def bounds(self) -> Bounds:
        return BOUNDS.get(self.fitted.model.dtype, BOUNDS[torch.float32])

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.fitted.inputs([text]).input_ids[0].tolist())

    def filled(self, text: str, most: int) -> str:
        """A text again and again, until it has so many tokens at most."""
        words = self.fitted.tokenizer
        again = " ".join([text] * (1 + max(0, most) // max(1, len(words(text).input_ids))))
        ids = words(again, add_special_tokens=False, truncation=True, max_length=max(1, most)).input_ids
        return words.decode(ids, skip_special_tokens=True) if most > 0 else ""

    def tail(self, text: str) -> tuple[int, ...]:
        return tuple(self.fitted.tokenizer(f" {text}", add_special_tokens=False).input_ids[:TAIL])

    def request(self, ids: tuple[int, ...], settings: Mapping[str, Any], tokens: int = ANSWERED) -> Request:
        return Request(ids, settings, tokens, self.salt)

    def check(self) -> None:
        """Raises InputError for what cannot be proven at all."""
        if not self.ways:
            raise InputError(f"from: {self.fitted.source} has no vectors, so there is nothing to prove")
        if len(self.texts) < 2:
            raise InputError("prompts: give at least two that differ; mixed up rows do not show in one")
        longest = max(map(len, self.prompts))
        if longest > self.room - LEAST_ROOM // 2 or self.room < LEAST_ROOM:
            told = f"the longest has {longest} tokens, the server takes {self.room} with the answer"
            raise InputError(f"prompts: {told}; allowed are {max(0, self.room - LEAST_ROOM // 2)}")
        steered, wrong = self.ask(
            [self.request(self.prompts[0], {"steer": way}, 1) for way in (self.ways[0], "sideways")]
        )
        if steered.status != 200:
            raise InputError(f"server: refuses to steer to {self.ways[0]} ({steered.status}: {steered.message})")
        if not steered.report and wrong.status == 200:
            raise InputError(
                "server: has no plugin of ours, as it answers without a report and takes any direction; start it where "
                "mnemoscope is installed, with MNEMOSCOPE_RUN=RUN"
            )

    def gate_of(self, toward: Toward) -> Detector | None:
        """The detector that can decide in the pass that a vector shifts."""
        vector, detector = self.fitted.vectors[toward], self.fitted.lower_detector or self.fitted.detector
        is_below = detector and detector.gate(toward, 0.5).is_below(vector.site, vector.layers[0])
        return detector if is_below and vector.positions == "decision" else None

    def compared(
        self, name: str, requests: Sequence[Request], answers: Sequence[Answer], acts: Sequence[bool] | None = None
    ) -> Proof:
        """Compare answers with those of transformers; ``acts``: decisions of gates."""
        settings = [request.settings for request in requests]
        acts = [True] * len(requests) if acts is None else acts
        factors = [
            float(some.get("alpha", 1.0)) if some.get("steer") and act else 0.0
            for some, act in zip(settings, acts, strict=True)
        ]
        faults = [self._fault(*each) for each in zip(requests, answers, factors, strict=True)]
        well = [n for n, fault in enumerate(faults) if not fault]
        asked, got = [requests[n] for n in well], [answers[n] for n in well]
        found = expected_of(self.fitted, asked, got, [factors[n] for n in well])
        steered = [place for place, n in enumerate(well) if factors[n]]
        without = expected_of(self.fitted, [asked[p] for p in steered], [got[p] for p in steered], [0.0] * len(steered))
        moved: dict[str, list[np.ndarray]] = {}
        for place, other in zip(steered, without, strict=True):
            moved.setdefault(asked[place].settings["steer"], []).append(found[place].log_p_M - other.log_p_M)
        visible = min(map(largest, moved.values()), default=math.nan)  # of the direction that moves least
        worse = [bool((one.behind_M > self.bounds.tie).any()) for one in found]
        ties = sum(int(((one.behind_M > 0) & (one.behind_M <= self.bounds.tie)).sum()) for one in found)
        told = [fault for fault in faults if fault] + ["another token is better"] * sum(worse)
        difference = largest(np.array(answer.log_p) - one.log_p_M for answer, one in zip(got, found, strict=True))
        visible = 0.0 if any(factors) and not steered else visible
        return Proof(
            name, difference, self.bounds.log_p, len(requests), len(told), ties, visible, told[0] if told else ""
        )

    def _fault(self, request: Request, answer: Answer, factor: float) -> str:
        """What is wrong with an answer before its tokens are compared; empty where nothing is."""
        if answer.status != 200:
            return f"refused ({answer.status}: {answer.message})"
        whole = len(answer.tokens) == len(answer.log_p) == request.tokens
        if not whole or not all(0 <= token < self._vocabulary for token in answer.tokens):
            return f"{len(answer.tokens)} tokens instead of {request.tokens}, or unknown ones"
        if not request.settings:
            return f"a report on a request that asked for nothing: {answer.report}" if answer.report else ""
        report, toward = answer.report or {}, request.settings.get("steer")
        acted: dict[str, Any] = {"acted": factor > 0}
        if factor:
            acted |= {"steer": toward, "alpha": factor}
        wrong = [name for name, value in acted.items() if report.get(name) != value]
        return f"reports {wrong[0]} {report.get(wrong[0])!r} instead of {acted[wrong[0]]!r}" if wrong else ""

    @cached_property
    def _vocabulary(self) -> int:
        return int(self.fitted.model.get_input_embeddings().weight.shape[0])


def largest(differences: Any) -> float:
    """The largest absolute value, of arrays; NaN where any is NaN, 0 without any."""
    return max((float(np.abs(one).max()) for one in differences), key=lambda x: (math.isnan(x), x), default=0.0)
