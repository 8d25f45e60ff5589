"""The self-check of a server: it must steer and read as transformers does here, whatever it answers beside. No vLLM.

Checks ask through a function, ``Ask``, so they are the same over HTTP and anywhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from mnemoscope.detect import Detector, Reading
from mnemoscope.errors import InputError
from mnemoscope.face import Fitted
from mnemoscope.models import context_length
from mnemoscope.serving.expected import Answer, Request, expected_of, leaked, readings
from mnemoscope.steering import Toward

Ask = Callable[[Sequence[Request]], list[Answer]]  # asks all at the same time; answers in order

MOST_PROMPTS = 8
ANSWERED = 12  # tokens of an answer
LONG = 640  # tokens of a long prompt: four of them at once are more than vLLM reads in a pass by default (2,048)
SEAM = 8  # tokens that a text may have more once it is written out and read again
TALK = 136  # tokens of an answer that is talked on about: more than a block of any cache (16, on CPUs up to 128)
TAIL = 8  # tokens that are said behind that answer, at most
FOLLOWED = 6  # tokens of an answer to a follow-up
ROUNDS = 5  # of either kind, to find what steering costs
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


def prove(
    ask: Ask, fitted: Fitted, prompts: Sequence[str], room: int | None = None, long: int = LONG
) -> Iterator[Proof]:
    """Check a server, one property after another.

    Args:
        fitted: what the server has, on the model that it serves, in the same precision.
        prompts: at least two; others than those of the fit are unlike it, so no gate opens.
        room: the most tokens of prompt and answer, where that is less than the model has.
        long: tokens of each of four long prompts, so that all together are more than the server reads in a pass.

    Raises:
        InputError: the server has no plugin or other vectors; ``fitted`` has none; prompts are too few or too long.
    """
    server = _Server(ask, fitted, list(dict.fromkeys(prompts))[:MOST_PROMPTS], room or context_length(fitted.model))
    server.check()
    yield from _mixed(server)
    yield from _long(server, long)
    yield _follow_ups(server)
    yield _refused(server)
    if fitted.detector:
        yield _read(server)
    if any(server.gate_of(toward) for toward in fitted.vectors):
        yield _gated(server)


def cost(ask: Ask, fitted: Fitted, prompts: Sequence[str]) -> list[float]:
    """Seconds of steered requests relative to the same unsteered, one ratio a round; kinds alternate."""
    server = _Server(ask, fitted, list(prompts)[:MOST_PROMPTS], context_length(fitted.model))
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * ROUNDS + 2):
        steered = number % 2 == 1
        settings = {"steer": server.ways[0]} if steered else {}
        asked = [Request(ids, settings, 2 * ANSWERED, _salt()) for ids in server.prompts]
        began = time.perf_counter()
        ask(asked)
        found[steered].append(time.perf_counter() - began)
    return [a / b for a, b in zip(found[True][1:], found[False][1:], strict=True)]  # the first of each warms up


def _salt() -> str:
    return uuid4().hex


@dataclass(frozen=True)
class _Server:
    """What asks, and what it is compared with. Requests of a proof share cached blocks with no other requests."""

    ask: Ask
    fitted: Fitted
    texts: Sequence[str]
    room: int
    salt: str = field(default_factory=_salt)

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
        visible = min(map(_largest, moved.values()), default=math.nan)  # of the direction that moves least
        worse = [bool((one.behind_M > self.bounds.tie).any()) for one in found]
        ties = sum(int(((one.behind_M > 0) & (one.behind_M <= self.bounds.tie)).sum()) for one in found)
        told = [fault for fault in faults if fault] + ["another token is better"] * sum(worse)
        difference = _largest(np.array(answer.log_p) - one.log_p_M for answer, one in zip(got, found, strict=True))
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


def _largest(differences: Any) -> float:
    """The largest absolute value, of arrays; NaN where any is NaN, 0 without any."""
    return max((float(np.abs(one).max()) for one in differences), key=lambda x: (math.isnan(x), x), default=0.0)


def _between(proof: Proof, pairs: Sequence[tuple[Answer, Answer]]) -> Proof:
    """What two answers of the server to one request differ by, up to the first token that does, added to a proof.

    Such a token is a tie, or one of both answers is wrong, which comparing it with transformers has found.
    """
    found = []
    for one, two in pairs:
        same = [a == b for a, b in zip(one.tokens, two.tokens, strict=False)]
        length = same.index(False) if False in same else len(same)
        found.append(np.array([0.0, *one.log_p[:length]]) - np.array([0.0, *two.log_p[:length]]))
    return replace(proof, difference=_largest([np.array([proof.difference]), *found]))


def _mixed(server: _Server) -> Iterator[Proof]:
    """All ways to ask at once, behind the unsteered requests alone."""
    settings: list[dict[str, Any]] = [{}]
    for n, toward in enumerate(server.ways):
        settings += [{"steer": toward}, {"steer": toward, "alpha": (2.0, 0.5)[n % 2]}]
    settings.append({"steer": server.ways[0], "alpha": 0.0})
    requests = [server.request(ids, some) for ids in server.prompts for some in settings]
    plain = [request for request in requests if not request.settings]
    alone = server.ask(plain)
    yield server.compared("unsteered = transformers'", plain, alone)
    answers = server.ask(requests)
    some = [n for n, request in enumerate(requests) if request.settings]
    yield server.compared("steered = transformers'", [requests[n] for n in some], [answers[n] for n in some])
    among = [answer for answer, request in zip(answers, requests, strict=True) if not request.settings]
    found = server.compared("unsteered among steered = untouched", plain, among)
    yield _between(found, list(zip(alone, among, strict=True)))


def _long(server: _Server, long: int) -> Iterator[Proof]:
    """Long prompts at once, which are read in several passes; then again, from the cache, and apart from it."""
    most = min(long, server.room - ANSWERED)
    requests = []
    for n in range(min(4, len(server.texts))):
        order = [*server.texts[n:], *server.texts[:n]]  # ends in another text each, and begins with another
        filler, own = server.filled(" ".join(order), most - len(server.ids(order[-1])) - SEAM), order[-1]
        ids = server.ids(f"{filler} {own}" if filler else own)
        requests.append(server.request(ids, {"steer": server.ways[n % len(server.ways)]} if n % 2 else {}))
    first = server.ask(requests)
    size = max(len(request.ids) for request in requests)
    yield server.compared(f"chunked = whole (up to {size} tokens)", requests, first)
    again = server.ask(requests)
    fresh = server.ask([replace(request, salt=_salt()) for request in requests])
    found = server.compared("cached = uncached", [*requests, *requests], [*again, *fresh])
    yield _between(found, [*zip(again, fresh, strict=True), *zip(again, first, strict=True)])


def _follow_ups(server: _Server) -> Proof:
    """Follow-ups of talks, with and without steering before and now, against the same without a cache."""
    ways: list[dict[str, Any]] = [*({"steer": way} for way in server.ways), {"steer": server.ways[0], "alpha": 1.5}, {}]
    tails = [
        tuple(server.fitted.tokenizer(f" {text}", add_special_tokens=False).input_ids[:TAIL])
        for text in server.texts[:4]
    ]
    prompts = server.prompts[-4:]
    used = max(map(len, prompts)) + max(map(len, tails)) + FOLLOWED
    written = min(TALK, server.room - used)
    talks = [server.request(ids, ways[n % len(ways)], written) for n, ids in enumerate(prompts)]
    answers = server.ask(talks)
    wrong = [answer for answer in answers if len(answer.tokens) != written]
    if wrong:
        told = f"a talk was answered with {wrong[0].status}: {wrong[0].message}"
        return Proof("follow-up after steering = fresh", 0.0, server.bounds.log_p, len(talks), len(wrong), why=told)
    requests, behind = [], []
    for n, (talk, answer) in enumerate(zip(talks, answers, strict=True)):
        weaker = {**talk.settings, "alpha": 0.5 * talk.settings.get("alpha", 1.0)}
        for now in ({}, ways[(n + 1) % len(ways)], talk.settings, weaker) if talk.settings else ({}, ways[0]):
            requests.append(server.request((*talk.ids, *answer.tokens, *tails[n % len(tails)]), now, FOLLOWED))
            behind.append((talk, answer))
    cached = server.ask(requests)
    fresh = server.ask([replace(request, salt=_salt()) for request in requests])
    found = server.compared("follow-up after steering = fresh", [*requests, *requests], [*cached, *fresh])
    plain = [
        n
        for n, (request, (talk, _)) in enumerate(zip(requests, behind, strict=True))
        if talk.settings and not request.settings and len(fresh[n].tokens) == FOLLOWED
    ]
    without = expected_of(server.fitted, [requests[n] for n in plain], [fresh[n] for n in plain], [0.0] * len(plain))
    leaks = [leaked(server.fitted, *behind[n], requests[n], fresh[n]) for n in plain]
    visible = _largest(leak - one.log_p_M for leak, one in zip(leaks, without, strict=True))
    return replace(_between(found, list(zip(cached, fresh, strict=True))), visible=visible)


def _refused(server: _Server) -> Proof:
    """Requests that ask wrongly, and for what this run cannot do; each must be a 400 that names the field."""
    toward = server.ways[0]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("steer", {"steer": "sideways"}),
        ("alpha", {"steer": toward, "alpha": -1}),
        ("alpha", {"alpha": 2.0}),
        ("gate", {"steer": toward, "gate": 1.5}),
        ("read", {"read": "perhaps"}),
        ("stear", {"stear": toward}),
    ]
    wrong += [("steer", {"steer": way}) for way in ("generalized", "memorized") if way not in server.ways]
    wrong += [("gate", {"steer": way, "gate": 0.5}) for way in server.ways if not server.gate_of(way)]
    wrong += [] if server.fitted.detector else [("read", {"read": 1})]
    answers = server.ask([server.request(server.prompts[0], some, 1) for _, some in wrong])
    faults = [
        f"{some} gave {answer.status}: {answer.message or 'an answer'}"
        for (name, some), answer in zip(wrong, answers, strict=True)
        if answer.status != 400 or name not in answer.message
    ]
    return Proof("refused = refused", 0.0, 0.0, len(wrong), len(faults), why=faults[0] if faults else "")


def _read(server: _Server) -> Proof:
    """P(memorized) and P(conflict) of unsteered prompts, against ``Fitted.detect``."""
    reading = server.fitted.detect(server.texts)
    answers = server.ask([server.request(ids, {"read": 1}, 1) for ids in server.prompts])
    wanted = {"p_memorized": reading.p_memorized, "p_conflict": reading.p_conflict}
    faults, found = [], []
    for n, answer in enumerate(answers):
        report = answer.report or {}
        for name, values_N in wanted.items():
            told = report.get(name)
            if math.isnan(values_N[n]) != (told is None):
                faults.append(f"{name} is {told} ({answer.status}: {answer.message or 'answered'})")
            elif told is not None:
                found.append(np.array([float(told) - values_N[n]]))
        if report.get("unlike") != bool(reading.unlike[n]) and abs(reading.distance[n] - 1) > server.bounds.read:
            faults.append(f"unlike is {report.get('unlike')}")
    spread = _largest(np.ptp(values_N)[None] for values_N in wanted.values() if not np.isnan(values_N).any())
    why = faults[0] if faults else ""
    return Proof("read = detect", _largest(found), server.bounds.read, len(answers), len(faults), 0, spread, why)


def _gated(server: _Server) -> Proof:
    """Gates that open on some prompts and not on others, as far as these prompts allow."""
    requests, acts = [], []
    for toward in server.ways:
        if detector := server.gate_of(toward):
            reading = readings(server.fitted, detector, server.prompts)
            threshold = _threshold(reading, toward)
            requests += [server.request(ids, {"steer": toward, "gate": threshold}) for ids in server.prompts]
            acts += reading.acts(toward, threshold).tolist()
    name = f"gate as in transformers ({sum(acts)} of {len(acts)} open)"
    return server.compared(name, requests, server.ask(requests), acts)


def _threshold(reading: Reading, toward: Toward) -> float:
    """In the widest gap between what may open a gate, so that rounding opens none; 0.5 where nothing may."""
    allowed = reading.acts(toward, 0.0)
    p_N = np.sort((reading.p_memorized if toward == "generalized" else 1 - reading.p_memorized)[allowed])
    if len(p_N) < 2:
        return 0.5 * float(p_N[0]) if len(p_N) else 0.5
    widest = int(np.argmax(np.diff(p_N)))
    return float(p_N[widest : widest + 2].mean())
