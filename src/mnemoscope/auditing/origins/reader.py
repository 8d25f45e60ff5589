"""P(document), P(memory) and P(neither) of each token of an answer, in the pass that writes or reads it.

A linear probe of one or two blocks reads the states before a token and at it, and how sure the model was of it. So a
token's numbers depend on nothing that is written behind it.

Shapes: T tokens of an answer, U = 1 + T with the prompt's last one, D neurons, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemoscope.auditing.origins.labels import ORIGINS, encoded, tokens_of
from mnemoscope.auditing.origins.spans import Span, spans_of
from mnemoscope.auditing.origins.texts import Form, Text
from mnemoscope.behaviour import Asking, read_behind
from mnemoscope.behaviour.generate import continued
from mnemoscope.behaviour.states import capturing
from mnemoscope.interventions import Artefact
from mnemoscope.models import blocks_of, context_length, end_ids, site_width
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import ReaderFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MARKS = {"document": "[{}]", "memory": "<{}>", "neither": "({})", "cannot tell": "?{}?"}  # where there are no colours
COLOURS = {"document": "green", "memory": "magenta", "neither": "yellow", "cannot tell": "bright_black"}
MOST_UNLIKE = 0.5  # share of a span's tokens that are unlike those of the fit, from which on nothing is said of it


@dataclass(frozen=True)
class Asked:
    """A prompt, the document in it ("" for none), and an answer to read, as it stands behind the prompt.

    Raises InputError where the document is not in the prompt.
    """

    prompt: str
    document: str
    answer: str = ""

    def __post_init__(self) -> None:
        if self.document.strip() not in self.prompt:
            raise InputError(f"document: {self.document.strip()[:60]!r} is not in the prompt")

    @property
    def has_document(self) -> bool:
        """Whether anything can come from one."""
        return bool(self.document.strip())

    @property
    def bare(self) -> str:
        """The prompt without its document."""
        return self.prompt.replace(self.document.strip(), "").strip() if self.has_document else self.prompt


class Part(NamedTuple):
    """A span with the mean probabilities of its tokens, (3,), and a verdict: one of ``ORIGINS``, or "cannot tell"."""

    span: Span
    p_3: np.ndarray
    verdict: str


@dataclass(frozen=True)
class Origins:
    """What was read of an answer.

    Attributes:
        answer: the text; ``offsets``: the characters of each token.
        p_T3: float64, probabilities of ``ORIGINS`` for each token.
        unlike_T: whether a token is unlike those of the fit, bool.
    """

    answer: str
    offsets: Sequence[tuple[int, int]]
    p_T3: np.ndarray
    unlike_T: np.ndarray

    @property
    def parts(self) -> list[Part]:
        """Names and numbers of the answer, in order."""
        found = list[Part]()
        for span in spans_of(self.answer):
            if places := tokens_of(self.offsets, span):
                p_3 = self.p_T3[places].mean(0)
                known = self.unlike_T[places].mean() < MOST_UNLIKE
                found.append(Part(span, p_3, ORIGINS[int(p_3.argmax())] if known else "cannot tell"))
        return found

    @property
    def shares(self) -> dict[str, float]:
        """Mean probability of each origin over the tokens; what is unlike those of the fit is "cannot tell"."""
        known_T = ~self.unlike_T
        found = {name: float((self.p_T3[:, n] * known_T).mean()) for n, name in enumerate(ORIGINS)}
        return found | {"cannot tell": float(self.unlike_T.mean())}

    def told(self) -> dict[str, Any]:
        """Plain values: the answer, its shares, and characters and probabilities of its parts and tokens."""

        def row(start: int, end: int, p_3: np.ndarray, **more: Any) -> dict[str, Any]:
            return {"start": start, "end": end, **dict(zip(ORIGINS, p_3.tolist(), strict=True)), **more}

        tokens = zip(self.offsets, self.p_T3, self.unlike_T, strict=True)
        return {
            "answer": self.answer,
            "shares": self.shares,
            "line": self.line,
            "parts": [
                row(span.start, span.end, p_3, verdict=verdict, text=span.of(self.answer))
                for span, p_3, verdict in self.parts
            ],
            "tokens": [row(*pair, p_3, unlike=bool(unlike)) for pair, p_3, unlike in tokens],
        }

    def __str__(self) -> str:
        """The answer with its names and numbers marked, and a line of shares."""
        return f"{self.marked(MARKS)}\n{self.line}"

    @property
    def line(self) -> str:
        """The shares in words."""
        told = [f"{name} {100 * share:.0f} %" for name, share in self.shares.items() if share or name in ORIGINS]
        return ", ".join(told)

    def marked(self, marks: dict[str, str]) -> str:
        """The answer with each name and number in the form that ``marks`` has for its verdict."""
        text, end = "", 0
        for span, _, verdict in self.parts:
            text += self.answer[end : span.start] + marks[verdict].format(span.of(self.answer))
            end = span.end
        return text + self.answer[end:]


@dataclass(frozen=True)
class Reader(Artefact):
    """A calibrated probe.

    Attributes:
        layers: the blocks that are read.
        weights_3F, bias_3: ``p = softmax(weights @ x + bias)``, float64; see ``features``.
        mean_D, whitening_DD: a token is unlike those of the fit where ``|(state before it - mean) @ whitening|`` is
            above 1.
        whole_form, bare_form: how questions are asked, see ``texts.Form``.
        figures: ``loss`` on groups that were left out, nats a token; labelled names and numbers of each origin.
    """

    layers: Sequence[int]
    weights_3F: np.ndarray = field(repr=False)
    bias_3: np.ndarray = field(repr=False)
    mean_D: np.ndarray = field(repr=False)
    whitening_DD: np.ndarray = field(repr=False)
    whole_form: str = Form.form
    bare_form: str = Form.bare
    figures: dict[str, float] = field(default_factory=dict)

    WHAT: ClassVar[str] = "reader"
    STORED: ClassVar[tuple[str, ...]] = ("weights_3F", "bias_3", "mean_D", "whitening_DD")
    DTYPE: ClassVar[torch.dtype] = torch.float64
    FACTS: ClassVar[Any] = ReaderFacts

    def __post_init__(self) -> None:
        neurons = len(self.mean_D)
        shapes = {
            "weights_3F": (3, 2 * len(self.layers) * neurons + 2),
            "bias_3": (3,),
            "whitening_DD": (neurons, neurons),
        }
        for name, shape in shapes.items():
            stored = getattr(self, name)
            if stored.shape != shape or not np.isfinite(stored).all():
                raise InputError(f"reader: {name} has shape {stored.shape} or a value that is not finite; want {shape}")

    def asks(self, text: Text) -> Asked:
        """A text in the form that was fitted on."""
        prompt = Form(self.whole_form, self.bare_form).prompt(text.question, text.document)
        return Asked(prompt, text.document, text.answer)

    def check_shape(self, model: PreTrainedModel) -> None:
        """Raises InputError where the model has too few layers, or another width."""
        layers, width = len(blocks_of(model)), site_width(model, 0, "block")
        if max(self.layers) >= layers or len(self.mean_D) != width:
            what = f"{len(self.mean_D)} neurons of block {max(self.layers)}"
            raise InputError(f"reader: it reads {what}, this model has {layers} blocks of {width}")

    def p_of(self, x_TF: np.ndarray, document: bool | np.ndarray) -> np.ndarray:
        """Probabilities of ``ORIGINS``, float64 (T, 3). Nothing comes from a document where there is none."""
        logits_T3 = x_TF.astype(np.float64) @ self.weights_3F.T + self.bias_3
        logits_T3[~np.broadcast_to(document, len(x_TF)), 0] = -np.inf
        p_T3 = np.exp(logits_T3 - logits_T3.max(1, keepdims=True))
        return p_T3 / p_T3.sum(1, keepdims=True)

    def unlike(self, states_TD: np.ndarray) -> np.ndarray:
        """Whether states before tokens are unlike those of the fit, bool (T,)."""
        return np.linalg.norm((states_TD.astype(np.float64) - self.mean_D) @ self.whitening_DD, axis=1) > 1

    def read(self, asking: Asking, asked: Sequence[Asked]) -> list[Origins]:
        """Read given answers.

        Raises:
            InputError: an answer is empty, or a text is longer than the model reads.
        """
        both = [encoded(asking, one.answer) for one in asked]
        if empty := next((one for one, (ids, _) in zip(asked, both, strict=True) if not ids), None):
            raise InputError(f"answer: that to {empty.prompt[-60:]!r} is empty; there is nothing to read")
        prompts = asking.tokens([asking.text(one.prompt) for one in asked])
        several = [(prompt, ids) for prompt, (ids, _) in zip(prompts, both, strict=True)]
        found = list[Origins]()
        for one, (_, offsets), read in zip(asked, both, read_behind(asking, several, self.layers), strict=True):
            facts = read.states_ULD, read.logp_T, read.entropy_T
            found.append(Origins(one.answer, offsets, *self.numbers(*facts, one.has_document)))
        return found

    def numbers(
        self, states_ULD: np.ndarray, logp_T: np.ndarray, entropy_T: np.ndarray, document: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """``p_T3`` and ``unlike_T`` of tokens, see ``Origins`` and ``behaviour.Read``."""
        x_TF = features(*pairs(states_ULD, logp_T, entropy_T))
        return self.p_of(x_TF, document), self.unlike(states_ULD[:-1, 0])

    @torch.no_grad()
    def write(self, asking: Asking, asked: Asked, tokens: int = 64) -> Origins:
        """Write an answer greedily and read it in the same passes; one more reads the last token, up to the last layer.

        Raises:
            InputError: the prompt leaves no room for an answer, or the model writes nothing.
        """
        model, tokenizer, seen = asking.model, asking.tokenizer, _Seen(tokens)
        with capturing(model, "block", self.layers, stop=seen.enough) as seen.states:
            continued(model, tokenizer, asking.padded([asking.text(asked.prompt)]), tokens + 1, processors=[seen])
        if seen.stopped:
            seen.keep()
        ids, ends = seen.ids[: len(seen.states_LD) - 1], end_ids(model, tokenizer)
        if not (ids := list(takewhile(lambda one: one not in ends, ids))):
            raise InputError(f"answer: the model writes nothing behind {asked.prompt[-60:]!r}")
        states_ULD, (logp_T, entropy_T) = np.stack(seen.states_LD[: len(ids) + 1]), np.array(seen.sure_T2[: len(ids)]).T
        return Origins(*_decoded(tokenizer, ids), *self.numbers(states_ULD, logp_T, entropy_T, asked.has_document))

    def stream(self, asking: Asking, asked: Asked, tokens: int, step: int = 8) -> Iterator[Origins]:
        """What ``write`` writes, after each ``step`` tokens and at the end; what was told of a token stays.

        Raises InputError as ``write`` does.
        """
        model, tokenizer = asking.model, asking.tokenizer
        prompt = asking.tokens([asking.text(asked.prompt)])[0]
        ids, ends = list[int](), end_ids(model, tokenizer)
        while len(ids) < tokens and (not ids or len(prompt) + len(ids) < context_length(model)):
            inputs = tokenizer.pad({"input_ids": [[*prompt, *ids]]}, return_tensors="pt").to(model.device)
            found_NT, _, width = continued(model, tokenizer, inputs, min(step, tokens - len(ids)))
            new = [one for one in found_NT[0, width:].tolist() if one not in ends]
            ids += new
            if not ids:
                raise InputError(f"answer: the model writes nothing behind {asked.prompt[-60:]!r}")
            (read,) = read_behind(asking, [(prompt, ids)], self.layers)
            facts = read.states_ULD, read.logp_T, read.entropy_T
            yield Origins(*_decoded(tokenizer, ids), *self.numbers(*facts, asked.has_document))
            if len(new) < found_NT.shape[1] - width:
                return


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, and the characters of each in it."""
    parts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    return parts[-1], list(pairwise(map(len, parts)))


class _Seen:
    """Sees each pass of a generation, as its last processor: states, the best token, its log probability, entropy."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.stopped, self.states = tokens, False, list[Tensor]()
        self.ids, self.sure_T2, self.states_LD = list[int](), list[tuple[float, float]](), list[np.ndarray]()

    def __call__(self, ids_NT: Tensor, logits_NV: Tensor) -> Tensor:
        best, (total, entropy) = int(logits_NV[0].argmax()), sure_of(logits_NV[0])
        self.ids.append(best)
        self.sure_T2.append((float(logits_NV[0, best]) - total, entropy))
        self.keep()
        return logits_NV

    def keep(self) -> None:
        """Keep the states of the pass that ends."""
        self.states_LD.append(torch.stack([state_NTD[0, -1] for state_NTD in self.states]).float().cpu().numpy())

    def enough(self) -> bool:
        """Whether this pass only reads the last token, so that the blocks above and the head need not run."""
        self.stopped = len(self.ids) == self.tokens
        return self.stopped


def sure_of(logits_V: Tensor) -> tuple[float, float]:
    """The logarithm of the sum of exponentials of float32 logits, and the entropy of what they predict, nats."""
    p_V = logits_V.softmax(0)
    total, mean = torch.stack([logits_V.max() - p_V.max().log(), p_V.dot(logits_V)]).tolist()
    if math.isnan(mean):  # of a token that cannot come; to clamp always would cost more than all else
        mean = float(p_V.dot(logits_V.clamp(min=-1e4)))
    return total, total - mean


def pairs(states_ULD: np.ndarray, logp_T: np.ndarray, entropy_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The states before and at each token by layer (T, L, 2, D), and its log probability and the entropy (T, 2)."""
    return np.stack([states_ULD[:-1], states_ULD[1:]], axis=2), np.stack([logp_T, entropy_T], axis=1)


def features(states_TL2D: np.ndarray, sure_T2: np.ndarray, dtype: type[np.floating[Any]] = np.float64) -> np.ndarray:
    """What the probe reads of tokens, see ``pairs``; (T, F)."""
    return np.concatenate([states_TL2D.reshape(len(sure_T2), -1), sure_T2], axis=1, dtype=dtype)
