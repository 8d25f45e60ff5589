"""The self-check of a server: it must steer and read as transformers does here, whatever it answers beside. No vLLM.

Checks ask through a function, ``Ask``, so they are the same over HTTP and anywhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import Toward
from mnemoscope.interventions.detect import Reading
from mnemoscope.models import context_length
from mnemoscope.serving.expected import Answer, Request, expected_of, leaked, readings
from mnemoscope.serving.served import ANSWERED, Ask, Proof, Served, fresh_salt, largest

MOST_PROMPTS = 8
LONG = 640  # tokens of a long prompt: four of them at once are more than vLLM reads in a pass by default (2,048)
SEAM = 8  # tokens that a text may have more once it is written out and read again
TALK = 136  # tokens of an answer that is talked on about: more than a block of any cache (16, on CPUs up to 128)
FOLLOWED = 6  # tokens of an answer to a follow-up
ROUNDS = 5  # of either kind, to find what steering costs


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
    server = Served(ask, fitted, list(dict.fromkeys(prompts))[:MOST_PROMPTS], room or context_length(fitted.model))
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
    server = Served(ask, fitted, list(prompts)[:MOST_PROMPTS], context_length(fitted.model))
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * ROUNDS + 2):
        steered = number % 2 == 1
        settings = {"steer": server.ways[0]} if steered else {}
        asked = [Request(ids, settings, 2 * ANSWERED, fresh_salt()) for ids in server.prompts]
        began = time.perf_counter()
        ask(asked)
        found[steered].append(time.perf_counter() - began)
    return [a / b for a, b in zip(found[True][1:], found[False][1:], strict=True)]  # the first of each warms up


def _between(proof: Proof, pairs: Sequence[tuple[Answer, Answer]]) -> Proof:
    """What two answers of the server to one request differ by, up to the first token that does, added to a proof.

    Such a token is a tie, or one of both answers is wrong, which comparing it with transformers has found.
    """
    found = []
    for one, two in pairs:
        same = [a == b for a, b in zip(one.tokens, two.tokens, strict=False)]
        length = same.index(False) if False in same else len(same)
        found.append(np.array([0.0, *one.log_p[:length]]) - np.array([0.0, *two.log_p[:length]]))
    return replace(proof, difference=largest([np.array([proof.difference]), *found]))


def _mixed(server: Served) -> Iterator[Proof]:
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


def _long(server: Served, long: int) -> Iterator[Proof]:
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
    fresh = server.ask([replace(request, salt=fresh_salt()) for request in requests])
    found = server.compared("cached = uncached", [*requests, *requests], [*again, *fresh])
    yield _between(found, [*zip(again, fresh, strict=True), *zip(again, first, strict=True)])


def _follow_ups(server: Served) -> Proof:
    """Follow-ups of talks, with and without steering before and now, against the same without a cache."""
    ways: list[dict[str, Any]] = [*({"steer": way} for way in server.ways), {"steer": server.ways[0], "alpha": 1.5}, {}]
    tails = [server.tail(text) for text in server.texts[:4]]
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
    fresh = server.ask([replace(request, salt=fresh_salt()) for request in requests])
    found = server.compared("follow-up after steering = fresh", [*requests, *requests], [*cached, *fresh])
    plain = [
        n
        for n, (request, (talk, _)) in enumerate(zip(requests, behind, strict=True))
        if talk.settings and not request.settings and len(fresh[n].tokens) == FOLLOWED
    ]
    without = expected_of(server.fitted, [requests[n] for n in plain], [fresh[n] for n in plain], [0.0] * len(plain))
    leaks = [leaked(server.fitted, *behind[n], requests[n], fresh[n]) for n in plain]
    visible = largest(leak - one.log_p_M for leak, one in zip(leaks, without, strict=True))
    return replace(_between(found, list(zip(cached, fresh, strict=True))), visible=visible)


def _refused(server: Served) -> Proof:
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


def _read(server: Served) -> Proof:
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
    spread = largest(np.ptp(values_N)[None] for values_N in wanted.values() if not np.isnan(values_N).any())
    why = faults[0] if faults else ""
    return Proof("read = detect", largest(found), server.bounds.read, len(answers), len(faults), 0, spread, why)


def _gated(server: Served) -> Proof:
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
