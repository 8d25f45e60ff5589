"""The self-check of a server: it must steer and read as transformers does here, whatever it answers beside. No vLLM.

Checks ask through a function, ``Ask``, so they are the same over HTTP and anywhere else.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mnemoscope.auditing.origins.labels import ORIGINS
from mnemoscope.face.fitted import Fitted
from mnemoscope.face.stored import artefacts_of, cell_of, vectors_of
from mnemoscope.interventions import Binding, Card, Toward, chosen_paths
from mnemoscope.interventions.artefact import tensors_file
from mnemoscope.interventions.detect import Reading
from mnemoscope.runs.digests import intact, is_there, rewriting
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.locks import locked
from mnemoscope.serving.admission import TOKENS, gated_beforehand
from mnemoscope.serving.served import ANSWERED, Ask, Proof, Request, Served, fresh_salt, largest, way_of

log = logging.getLogger("mnemoscope")
MOST_PROMPTS = 8
LONG = 640  # tokens of a long prompt: four of them at once are more than vLLM reads in a pass by default (2,048)
TALK = 136  # tokens of an answer that is talked on about: more than a block of any cache (16, on CPUs up to 128)
TAIL = 8  # tokens that are said behind it, at most
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
        InputError: the server has no plugin or refuses to steer; ``fitted`` has none; prompts are too few or too long.
    """
    server = Served(ask, fitted, list(dict.fromkeys(prompts))[:MOST_PROMPTS], room)
    server.check()
    if server.left:
        left = ", ".join(f"{way['lever']} to {way['steer']}" for way in server.left)
        log.warning("not proven: %s; vLLM was started without --enable-lora", left)
    yield from _mixed(server)
    yield from _long(server, long)
    yield _follow_ups(server)
    yield _refused(server)
    if fitted.detector:
        yield _read(server)
    if fitted.reader:
        yield _written(server)
    if any(gates_of(server)):
        yield _gated(server)


def cost(ask: Ask, fitted: Fitted, prompts: Sequence[str]) -> list[float]:
    """Seconds of steered requests relative to the same unsteered, one ratio a round; kinds alternate."""
    server = Served(ask, fitted, list(prompts)[:MOST_PROMPTS])
    server.check()  # leaves out what is not served
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * ROUNDS + 2):
        steered = number % 2 == 1
        settings = server.ways[0] if steered else {}
        asked = [Request(ids, settings, 2 * ANSWERED, fresh_salt()) for ids in server.prompts]
        began = time.perf_counter()
        ask(asked)
        found[steered].append(time.perf_counter() - began)
    return [a / b for a, b in zip(found[True][1:], found[False][1:], strict=True)]  # the first of each warms up


def certify(source: Path, binding: Binding, engine: str, precision: str, proofs: Sequence[Proof]) -> list[Path]:
    """Write into cards on which engine they were proven, and what was shown; their tensors stay as they are.

    Args:
        source: the run, the cell or the file of a vector or detector that a server has; ``binding``: of its model.
        engine: its name and version, ``precision`` that of its weights.
        proofs: all of ``prove``.

    Returns the files that were written. InputError where a proof did not pass.
    """
    failed = next((f"{proof.name} was not" for proof in proofs if not proof.passed), None if proofs else "nothing was")
    if failed:
        raise InputError(f"certify: {failed} shown; a certificate says that all checks passed")
    compared = max(proof.difference for proof in proofs)
    shown = f"{precision}, {len(proofs)} checks of {sum(proof.answers for proof in proofs)} answers, "
    shown += f"differences up to {compared:.1e}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    paths, cell, (levers, *_) = [source], None, artefacts_of(source, binding)
    if not tensors_file(source).is_file():
        cell = cell_of(source, binding)
        methods = {f"to_{toward}": vector.method for toward, vector in vectors_of(levers).items()}
        detectors = (cell / f"{name}.safetensors" for name in ("detector", "detector_below"))
        chosen = [path for (way, method), path in chosen_paths(cell).items() if methods.get(way) == method]
        paths = [intact(path) for path in (*chosen, *filter(is_there, detectors))]
    elif levers and not vectors_of(levers):
        raise InputError(f"certify: {source} is an adapter; only cards of vectors and detectors say what was proven")
    found = {path: artefacts_of(path, binding) for path in paths}
    written = [path.with_suffix(".json") for path in paths]
    with ExitStack() as stack:
        if cell:
            stack.enter_context(locked(cell.resolve().parents[1], lambda: True))
            stack.enter_context(rewriting(cell, [*paths, *written]))
        for path, (one, detector, _) in found.items():
            artefact: Any = detector or next(iter(vectors_of(one).values()))
            card = artefact.card or Card(artefact.task)
            replace(artefact, card=replace(card, proven=card.proven | {engine: shown})).save(path)
    return written


def _mixed(server: Served) -> Iterator[Proof]:
    """All ways to ask at once, behind the unsteered requests alone."""
    settings: list[dict[str, Any]] = [{}]
    for n, way in enumerate(server.ways):
        settings += [way, {**way, "alpha": (2.0, 0.5)[n % 2]}]
    settings.append({**server.ways[0], "alpha": 0.0})
    requests = [server.request(ids, some) for ids in server.prompts for some in settings]
    plain = [request for request in requests if not request.settings]
    unsteered = server.compared("unsteered = transformers'", plain, server.ask(plain))
    yield unsteered
    server.measure(unsteered.difference)
    answers = list(zip(requests, server.ask(requests), strict=True))
    steered, beside = ([one for one in answers if bool(one[0].settings) == wanted] for wanted in (True, False))
    yield server.compared("steered = transformers'", *zip(*steered, strict=True))
    yield server.compared("unsteered among steered = untouched", *zip(*beside, strict=True))


def _long(server: Served, long: int) -> Iterator[Proof]:
    """Long prompts at once, which are read in several passes; then again, from the cache, and apart from it."""
    prompts, requests = server.prompts, []
    for n, own in enumerate(prompts[:4]):
        room = min(long, server.room - ANSWERED) - len(own)
        others = [token for ids in (*prompts[n + 1 :], *prompts[: n + 1]) for token in ids]  # another begins each
        filler = (others * (1 + max(0, room) // len(others)))[:room] if room > len(prompts[0]) else []
        settings = server.ways[n % len(server.ways)] if n % 2 else {}
        requests.append(server.request((*filler, *own), settings))
    size = max(len(request.ids) for request in requests)
    yield server.compared(f"chunked = whole (up to {size} tokens)", requests, server.ask(requests))
    answers = [*server.ask(requests), *server.ask(_apart(requests))]
    yield server.compared("cached = uncached", [*requests, *requests], answers)


def _apart(requests: Sequence[Request]) -> list[Request]:
    """The same requests, which share no cached block."""
    return [replace(request, salt=fresh_salt()) for request in requests]


def _follow_ups(server: Served) -> Proof:
    """Follow-ups of talks, with and without steering before and now, against the same without a cache."""
    name = "follow-up after steering = fresh"
    ways: list[dict[str, Any]] = [*server.ways, {**server.ways[0], "alpha": 1.5}, {}]
    words, prompts = server.fitted.tokenizer, server.prompts[-4:]
    tails = [words(f" {text}", add_special_tokens=False).input_ids[:TAIL] for text in server.texts[:4]]
    written = min(TALK, server.room - max(map(len, prompts)) - max(map(len, tails)) - FOLLOWED)
    talks = [server.request(ids, ways[n % len(ways)], written) for n, ids in enumerate(prompts)]
    answers = server.ask(talks)
    wrong = [answer for answer in answers if len(answer.tokens) != written]
    if wrong:
        told = f"a talk was answered with {wrong[0].status}: {wrong[0].message}"
        return Proof(name, 0.0, server.bounds.log_p, len(talks), len(wrong), why=told)
    requests, behind = [], []
    for n, (talk, answer) in enumerate(zip(talks, answers, strict=True)):
        weaker = {**talk.settings, "alpha": 0.5 * talk.settings.get("alpha", 1.0)}
        for now in ({}, ways[(n + 1) % len(ways)], talk.settings, weaker) if talk.settings else ({}, ways[0]):
            requests.append(server.request((*talk.ids, *answer.tokens, *tails[n % len(tails)]), now, FOLLOWED))
            behind.append((talk, answer))
    cached, fresh = server.ask(requests), server.ask(_apart(requests))
    found = server.compared(name, [*requests, *requests], [*cached, *fresh])
    talked = zip(behind, requests, fresh, strict=True)
    plain = [one for one in talked if one[0][0].settings and not one[1].settings and len(one[2].tokens) == FOLLOWED]
    without = server.expected([(request, answer, 0.0) for _, request, answer in plain])
    leaks = [server.leaked(*talk, request, answer) for talk, request, answer in plain]
    visible = largest(leak_M - log_p_M for leak_M, (log_p_M, _) in zip(leaks, without, strict=True))
    return replace(found, visible=visible)


def _refused(server: Served) -> Proof:
    """Requests that ask wrongly, and for what this run cannot do; each must be a 400 that names the field."""
    toward = server.ways[0]["steer"]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("steer", {"steer": "sideways"}),
        ("alpha", {"steer": toward, "alpha": -1}),
        ("alpha", {"alpha": 2.0}),
        ("gate", {"steer": toward, "gate": 1.5}),
        ("read", {"read": "perhaps"}),
        ("stear", {"stear": toward}),
    ]
    wrong += [("steer", {"steer": one}) for one in Toward if one not in server.offered.levers]
    wrong += [("lever", {"steer": toward, "lever": "words"}), ("lever", {"lever": "adapter"})]
    wrong += [
        ("gate", {**way, "gate": 0.5}) for way, gate in zip(server.ways, gates_of(server), strict=True) if not gate
    ]
    wrong += [] if server.fitted.detector else [("read", {"read": 1})]
    answers = server.ask([server.request(server.prompts[0], some, 1) for _, some in wrong])
    faults = [
        f"{some} gave {answer.status}: {answer.message or 'an answer'}"
        for (name, some), answer in zip(wrong, answers, strict=True)
        if answer.status != 400 or name not in answer.message
    ]
    return Proof("refused = refused", 0.0, 0.0, len(wrong), len(faults), why=faults[0] if faults else "")


def _read(server: Served) -> Proof:
    """P(memorized) and P(conflict) of unsteered prompts, as the detector reads them here."""
    reading, names = server.readings("detector"), ("p_memorized", "p_conflict")
    answers = server.ask([server.request(ids, {"read": 1}, 1) for ids in server.prompts])
    reports = [answer.report or {} for answer in answers]
    wanted_N2 = np.stack([getattr(reading, name) for name in names], axis=1)
    told_N2 = np.array([[report.get(name) for name in names] for report in reports], float)  # none is NaN
    faults = [
        f"{told_D} is read ({answer.status}: {answer.message or 'answered'})"
        for answer, told_D, wanted_D in zip(answers, told_N2, wanted_N2, strict=True)
        if not np.array_equal(np.isnan(told_D), np.isnan(wanted_D))
    ]
    for report, unlike, distance in zip(reports, reading.unlike, reading.distance, strict=True):
        if report.get("unlike") != bool(unlike) and abs(distance - 1) > server.bounds.read:
            faults.append(f"unlike is {report.get('unlike')}")
    difference = largest([np.nan_to_num(told_N2 - wanted_N2)])
    spread = largest([np.nan_to_num(np.ptp(wanted_N2, axis=0))])
    facts = len(answers), len(faults), 0, spread, next(iter(faults), "")
    return Proof("read = detect", difference, server.bounds.read, *facts)


def _written(server: Served) -> Proof:
    """What is told of each token of an answer while it is written, as the reader reads the answer here."""
    documents = [document for text in server.texts for document in ("", text[: len(text) // 2])]
    prompts = [ids for ids in server.prompts for _ in range(2)]
    asked = [
        server.request(ids, {"read": TOKENS, "document": document})
        for ids, document in zip(prompts, documents, strict=True)
    ]
    beside = [server.request(ids, server.ways[0]) for ids in server.prompts]  # in the same passes
    answers = server.ask([*asked, *beside])[: len(asked)]
    well = [(one, answer) for one, answer in zip(asked, answers, strict=True) if len(answer.tokens) == one.tokens]
    faults, apart, wanted = [f"{one.message or 'no answer'}" for one in answers if one.status != 200], [], []
    for (_, answer), wanted_M4 in zip(well, server.origins(well), strict=True):
        told = (answer.report or {}).get(TOKENS) or []
        told_M4 = np.array([[one.get(name, math.nan) for name in (*ORIGINS, "unlike")] for one in told], float)
        if told_M4.shape != wanted_M4.shape:
            faults.append(f"{len(told)} tokens are read of {len(wanted_M4)}")
            continue
        apart.append(told_M4[:, :3] - wanted_M4[:, :3])
        wanted.append(wanted_M4[:, :3])
    spread = largest([np.ptp(np.concatenate(wanted), axis=0)]) if wanted else 0.0
    facts = len(asked), len(faults), 0, spread, next(iter(faults), "")
    return Proof("tokens = read", largest(apart), server.bounds.origin, *facts)


def _gated(server: Served) -> Proof:
    """Gates that open on some prompts and not on others, as far as these prompts allow."""
    requests, acts = [], []
    for way, detector in zip(server.ways, gates_of(server), strict=True):
        if detector:
            toward, reading = Toward.of(way["steer"]), server.readings(detector)
            threshold = _threshold(reading, toward)
            requests += [server.request(ids, {**way, "gate": threshold}) for ids in server.prompts]
            acts += reading.acts(toward, threshold).tolist()
    name = f"gate as in transformers ({sum(acts)} of {len(acts)} open)"
    return server.compared(name, requests, server.ask(requests), acts)


def gates_of(server: Served) -> list[str | None]:
    """The detector that gates each of a server's levers."""
    levers = [server.lever(way_of(way)) for way in server.ways]
    return [
        server.offered.below(one, "gate") if server.decides or not gated_beforehand(one) else None for one in levers
    ]


def _threshold(reading: Reading, toward: Toward) -> float:
    """In the widest gap between what may open a gate, so that rounding opens none; 0.5 where nothing may."""
    allowed = reading.acts(toward, 0.0)
    p_N = np.sort((reading.p_memorized if toward == "generalized" else 1 - reading.p_memorized)[allowed])
    if len(p_N) < 2:
        return 0.5 * float(p_N[0]) if len(p_N) else 0.5
    widest = int(np.argmax(np.diff(p_N)))
    return float(p_N[widest : widest + 2].mean())
