"""A server, and what transformers gives here for what it has answered. Imports no vLLM.

A server's own tokens are read in one pass: greedy is an answer whose every token is the best behind those before it.

Shapes: N requests, T tokens of a left-padded batch, M tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import Asking, left_padded, read_behind
from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import Intervention, Toward
from mnemoscope.interventions.detect import Reading
from mnemoscope.models import cache_of, context_length, pass_inputs, with_last_logits
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.admission import BEFOREHAND, Offered, gated_beforehand

BATCH = 8  # requests in a pass
ANSWERED = 12  # tokens of an answer
LEAST_ROOM = 96  # tokens of prompt and answer


class Way(NamedTuple):
    """A lever of a direction."""

    steer: Toward
    lever: str


def way_of(settings: Mapping[str, Any]) -> Way:
    """Of settings that steer; those of a proof name the lever."""
    return Way(Toward.of(settings["steer"]), settings["lever"])


class Bounds(NamedTuple):
    """What counts as equal: largest differences of log probabilities, of what is read, and another token's lead."""

    log_p: float
    read: float
    origin: float
    tie: float


# Other batches and kernels round differently, in every block: unsteered answers of SmolLM2 differ by 1.1e-4 in float32,
# by 0.21 in bfloat16 and by 0.043 in float16. What is steered may differ by twice as much as they do, see ``measure``.
BOUNDS = {
    torch.float32: Bounds(5e-4, 5e-4, 5e-4, 1e-3),
    torch.bfloat16: Bounds(0.35, 0.05, 0.3, 0.7),
    torch.float16: Bounds(0.09, 0.01, 0.06, 0.18),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a server is asked: to continue ``ids`` greedily by so many ``tokens``, whatever they are.

    ``settings`` are those of ``vllm_xargs``. Only requests with the same ``salt`` may use one another's cached blocks.
    """

    ids: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = ANSWERED
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server gave.

    Attributes:
        status: of HTTP; 200 is an answer, else ``message`` says why there is none.
        tokens, log_p: of the answer, and their log probabilities.
        report: what the plugin tells of the request; None where it tells nothing.
    """

    status: int
    tokens: tuple[int, ...] = ()
    log_p: tuple[float, ...] = ()
    report: Mapping[str, Any] | None = None
    message: str = ""


Ask = Callable[[Sequence[Request]], list[Answer]]  # asks all at the same time; answers in order
Steered = tuple[Request, Answer, float]  # the factor with which its vector acts; 0: not
# Of the tokens of an answer, float32 (M,): log probabilities, and by how much another token was better.
Expected = tuple[np.ndarray, np.ndarray]


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


class Served:
    """What asks, and what it is compared with. Requests of a proof share cached blocks with no other requests."""

    def __init__(self, ask: Ask, fitted: Fitted, texts: Sequence[str], room: int | None = None) -> None:
        self.offered = Offered.of(fitted.levers, fitted.detector, fitted.lower_detector, fitted.reader)
        if not self.offered.levers:
            raise InputError(f"from: {fitted.source} has no vectors or adapters, so there is nothing to prove")
        self.ask, self.fitted, self.texts, self.salt = ask, fitted, texts, fresh_salt()
        self.room = room or context_length(fitted.model)
        self.prompts = [tuple(fitted.inputs([text]).input_ids[0].tolist()) for text in texts]
        every = self.offered.levers.items()
        # Settings of each lever; ``check`` leaves out what the server was started without, which are ``left``.
        self.ways: list[dict[str, str]] = [{"steer": toward, "lever": name} for toward, some in every for name in some]
        self.left: list[dict[str, str]] = []
        self.decides = True  # in a pass beforehand, as a gate of what acts on every token needs it
        self.bounds = BOUNDS.get(fitted.model.dtype, BOUNDS[torch.float32])

    def request(self, ids: Sequence[int], settings: Mapping[str, Any], tokens: int = ANSWERED) -> Request:
        """One of the proof's."""
        return Request(tuple(ids), settings, tokens, self.salt)

    def check(self) -> None:
        """Raises InputError for what cannot be proven at all."""
        if len(self.texts) < 2:
            raise InputError("prompts: give at least two that differ; mixed up rows do not show in one")
        longest = max(map(len, self.prompts))
        if longest > self.room - LEAST_ROOM // 2 or self.room < LEAST_ROOM:
            told = f"the longest has {longest} tokens, the server takes {self.room} with the answer"
            raise InputError(f"prompts: {told}; allowed are {max(0, self.room - LEAST_ROOM // 2)}")
        asked = [self.request(self.prompts[0], settings, 1) for settings in (*self.ways, {"steer": "sideways"})]
        *answers, wrong = self.ask(asked)
        both = list(zip(self.ways, answers, strict=True))
        self.left = [way for way, one in both if way["lever"] == "adapter" and "lever: 'adapter'" in one.message]
        self.ways = [way for way in self.ways if way not in self.left]
        steered = next((one for way, one in both if one.status != 200 and way in self.ways), answers[0])
        if steered.status != 200 or not self.ways:
            raise InputError(f"server: refuses to steer ({steered.status}: {steered.message})")
        everywhere = [way for way in self.ways if gated_beforehand(self.lever(way_of(way)))]
        gated = self.ask([self.request(self.prompts[0], {**way, "gate": 0.5}, 1) for way in everywhere])
        self.decides = not any(BEFOREHAND in one.message for one in gated)
        if not steered.report and wrong.status == 200:
            raise InputError(
                "server: has no plugin of ours, as it answers without a report and takes any direction; start it where "
                "mnemoscope is installed, with MNEMOSCOPE_RUN=RUN"
            )

    def measure(self, unsteered: float) -> None:
        """Allow twice the difference of unsteered answers (of two builds of a model), at least half of its bound."""
        most = max(unsteered, self.bounds.log_p / 4)
        self.bounds = self.bounds._replace(log_p=2 * most, tie=4 * most)

    def compared(
        self, name: str, requests: Sequence[Request], answers: Sequence[Answer], acts: Sequence[bool] | None = None
    ) -> Proof:
        """Compare answers of equal length with those of transformers; ``acts``: decisions of gates."""
        factors = [float(r.settings.get("alpha", 1.0)) if r.settings.get("steer") else 0.0 for r in requests]
        factors = [factor * act for factor, act in zip(factors, acts or [True] * len(requests), strict=True)]
        asked = list(zip(requests, answers, factors, strict=True))
        told = [self._fault(*one) for one in asked]
        well = [one for one, fault in zip(asked, told, strict=True) if not fault]
        found = self.expected(well)
        apart = [np.array(answer.log_p) - log_p_M for (_, answer, _), (log_p_M, _) in zip(well, found, strict=True)]
        behind_M = np.concatenate([np.zeros(0), *(behind_M for _, behind_M in found)])
        # Nothing is seen where no answer that should be steered can be compared.
        steered = [(one, log_p_M) for one, (log_p_M, _) in zip(well, found, strict=True) if one[2]]
        without = self.expected([(request, answer, 0.0) for (request, answer, _), _ in steered])
        moved = defaultdict[Any, list[np.ndarray]](list)
        for ((request, _, _), log_p_M), (other_M, _) in zip(steered, without, strict=True):
            moved[way_of(request.settings)].append(log_p_M - other_M)
        visible = min(map(largest, moved.values()), default=0.0 if any(factors) else math.nan)
        told = [fault for fault in told if fault]
        told += ["another token is better" for _, behind in found if (behind > self.bounds.tie).any()]
        ties = int(((behind_M > 0) & (behind_M <= self.bounds.tie)).sum())
        facts = len(requests), len(told), ties, visible, next(iter(told), "")
        return Proof(name, largest(apart), self.bounds.log_p, *facts)

    def _fault(self, request: Request, answer: Answer, factor: float) -> str:
        """What is wrong with an answer before its tokens are compared; empty where nothing is."""
        if answer.status != 200:
            return f"refused ({answer.status}: {answer.message})"
        known = int(self.fitted.model.get_input_embeddings().weight.shape[0])
        whole = len(answer.tokens) == len(answer.log_p) == request.tokens
        if not whole or not all(0 <= token < known for token in answer.tokens):
            return f"{len(answer.tokens)} tokens instead of {request.tokens}, or unknown ones"
        if not request.settings:
            return f"a report on a request that asked for nothing: {answer.report}" if answer.report else ""
        report, wanted = answer.report or {}, dict[str, Any](acted=factor > 0)
        wanted |= {"alpha": factor, **way_of(request.settings)._asdict()} if factor else {}
        wrong = [name for name, value in wanted.items() if report.get(name) != value]
        return f"reports {wrong[0]} {report.get(wrong[0])!r} instead of {wanted[wrong[0]]!r}" if wrong else ""

    @torch.no_grad()
    def expected(self, asked: Sequence[Steered]) -> list[Expected]:
        """What transformers gives for the tokens of answers of the same length, each of one token or more."""
        model, groups, found = self.fitted.model, defaultdict[Any, list[int]](list), dict[int, Expected]()
        for n, (request, _, factor) in enumerate(asked):
            groups[way_of(request.settings) if factor else None].append(n)
        parts = [(way, all_n[i : i + BATCH]) for way, all_n in groups.items() for i in range(0, len(all_n), BATCH)]
        for way, some in parts:
            length = len(asked[some[0]][1].tokens)
            ids_NT, mask_NT = self._padded([(*asked[n][0].ids, *asked[n][1].tokens) for n in some])
            inputs = pass_inputs(model, ids_NT, mask_NT) | {"use_cache": False}
            with self._steered(way, [asked[n][2] for n in some], ids_NT.shape[1] - length - 1):
                logits_NMV = with_last_logits(model, inputs, length + 1).logits[:, -length - 1 : -1]
            found |= zip(some, _of_logits(logits_NMV, ids_NT[:, -length:]), strict=True)
        return [found[n] for n in range(len(asked))]

    @torch.no_grad()
    def leaked(self, talk: Request, written: Answer, follow: Request, answer: Answer) -> np.ndarray:
        """Log probabilities (M,) of the answer to an unsteered follow-up, had it read keys and values of a steered
        talk, with whose prompt and answer it begins.
        """
        model, before, length = self.fitted.model, len(talk.ids) + len(written.tokens), len(answer.tokens)
        ids_1T, mask_1T = self._padded([(*follow.ids, *answer.tokens)])
        with self._steered(way_of(talk.settings), talk.settings.get("alpha", 1.0), len(talk.ids) - 1):
            cache = cache_of(model(**pass_inputs(model, ids_1T[:, :before], mask_1T[:, :before])))
        logits_1MV = model(**pass_inputs(model, ids_1T[:, before:], mask_1T, cache)).logits[:, -length - 1 : -1]
        return _of_logits(logits_1MV, ids_1T[:, -length:])[0][0]

    def readings(self, name: str) -> Reading:
        """What a detector of the server reads at the end of all prompts."""
        return replace(self.fitted, detector=self.offered.detectors[name]).detect(self.texts)

    def origins(self, asked: Sequence[tuple[Request, Answer]]) -> list[np.ndarray]:
        """What the reader says of each answer but its last token, (M - 1, 4): probabilities, and 1 where unlike."""
        reader, asking = self.fitted.reader, Asking(self.fitted.model, self.fitted.tokenizer, batch_size=BATCH)
        if reader is None:
            return []
        texts = [(list(request.ids), list(answer.tokens)) for request, answer in asked]
        found = list[np.ndarray]()
        for (request, _), read in zip(asked, read_behind(asking, texts, reader.layers), strict=True):
            facts = read.states_ULD, read.logp_T, read.entropy_T, bool(request.settings["document"])
            found.append(np.column_stack(reader.numbers(*facts))[:-1])
        return found

    def lever(self, way: Way) -> Intervention:
        """What acts."""
        return self.offered.levers[way.steer][way.lever]

    def _steered(self, way: Way | None, alpha: Any, last: int) -> AbstractContextManager[None]:
        """The context of a lever, none for None, whose prompts end in a column."""
        if not way:
            return nullcontext()
        lever = self.lever(way)
        return lever.apply(self.fitted.model, alpha, None if lever.everywhere else last)

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        return left_padded(rows, self.fitted.tokenizer.pad_token_id or 0, self.fitted.model.device)


def _of_logits(logits_NMV: Tensor, tokens_NM: Tensor) -> list[Expected]:
    log_p_NMV = logits_NMV.float().log_softmax(-1)
    log_p_NM = log_p_NMV.gather(2, tokens_NM[..., None].to(log_p_NMV.device))[..., 0]
    return list(zip(log_p_NM.cpu().numpy(), (log_p_NMV.max(-1).values - log_p_NM).cpu().numpy(), strict=True))


def quantize(model: Any, how: str) -> None:
    """Quantize all linear layers but the head in place, as an engine did, by torchao's configuration in JSON.

    Raises InputError where torchao is not installed, or does not know it.
    """
    try:
        from torchao.core.config import config_from_dict
        from torchao.quantization import quantize_

        quantize_(model.base_model, config_from_dict(json.loads(how)))
    except ImportError:
        raise InputError("quantization: the server's weights are quantized; to compare, pip install torchao") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"quantization: {how} is not known to torchao here ({error})") from None


def largest(differences: Iterable[np.ndarray]) -> float:
    """The largest absolute value of arrays; NaN where any is NaN, 0 without any."""
    return float(np.abs(np.concatenate([np.zeros(1), *map(np.ravel, differences)])).max())
