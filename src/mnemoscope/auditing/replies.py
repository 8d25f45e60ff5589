"""What a model makes of items: its replies, and how likely it finds the texts themselves.

Shapes: N texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemoscope.auditing.answers import Kind, found_in, label_of, stated, states_one
from mnemoscope.auditing.items import Item, Variant
from mnemoscope.behaviour import Asking, continued, read_behind, read_states
from mnemoscope.models import end_ids
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example

SHORT = 16  # tokens of a reply that is its answer alone, at most
LOWEST = 0.2  # share of a text's tokens that Min-K% takes


@dataclass(frozen=True)
class Form:
    """How items are asked.

    Attributes:
        kind: of answers, see ``answers.found_in``; ``form``: text with ``{prompt}`` in it.
        tokens: of a reply, at most.
    """

    kind: Kind
    form: str = "{prompt}"
    tokens: int = 256

    def __post_init__(self) -> None:
        if "{prompt}" not in self.form:
            raise InputError(f"form: {self.form!r} has no {{prompt}}")

    def asked(self, variant: Variant) -> str:
        """What is asked."""
        return self.form.replace("{prompt}", variant.prompt)

    def text(self, variant: Variant) -> str:
        """What is asked, and the answer behind it."""
        asked = self.asked(variant)
        joined = "" if asked[-1:].isspace() or variant.answer[:1].isspace() else " "
        return f"{asked}{joined}{variant.answer}"


class Reply(NamedTuple):
    """What was written; ``cut``: it was not at its end when it had all the tokens that it may have."""

    text: str
    cut: bool


def places_of(item: Item) -> list[Variant]:
    """The original, then the variants."""
    return [Variant(item.prompt, item.answer), *item.variants]


@torch.no_grad()
def replies(
    asking: Asking, form: Form, asked: Sequence[str], processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
) -> list[Reply]:
    """What is written behind prompts, greedily; ``processors``: as of ``behaviour.continued``."""
    texts, ends = [asking.text(prompt) for prompt in asked], end_ids(asking.model, asking.tokenizer)
    order, found = np.argsort([len(text) for text in texts], kind="stable"), [Reply("", False)] * len(texts)
    for start in range(0, len(texts), asking.batch_size):
        chosen = order[start : start + asking.batch_size].tolist()
        inputs = asking.padded([texts[i] for i in chosen])
        ids_NT, mask_NT, width = continued(asking.model, asking.tokenizer, inputs, form.tokens, None, processors)
        for i, ids, mask in zip(chosen, ids_NT[:, width:].tolist(), mask_NT[:, width:].tolist(), strict=True):
            text = asking.tokenizer.decode(ids[: sum(mask)], skip_special_tokens=True)
            found[i] = Reply(text, mask[-1] == 1 and ids[-1] not in ends)
    return found


def likelihoods(asking: Asking, texts: Sequence[str]) -> list[dict[str, float]]:
    """Of each text how likely its model finds it, without a chat's format: a mean over its tokens but the first.

    ``nats``: cost a token; ``standard``: its log probability in standard deviations of its distribution, whose entropy
    is ``entropy``, nats. ``zlib``: its whole cost for a byte of the compressed text (Carlini et al. 2021). ``min_k``,
    ``min_k_pp``: the mean of the least likely fifth of its tokens, the latter's in standard deviations (Shi et al.
    2023, arXiv 2310.16789; Zhang et al. 2024, arXiv 2404.02936). What is more likely has more of
    ``standard``, ``min_k`` and ``min_k_pp``, less of ``nats`` and ``zlib``.
    """
    rows, found = asking.tokenizer(list(texts)).input_ids, []
    for text, read in zip(texts, read_behind(asking, [(row[:1], row[1:]) for row in rows]), strict=True):
        least = max(1, int(LOWEST * len(read.logp_T)))
        standard_T = (read.logp_T + read.entropy_T) / read.spread_T
        found.append(
            {
                "nats": float(-read.logp_T.mean()),
                "standard": float(standard_T.mean()),
                "entropy": float(read.entropy_T.mean()),
                "zlib": float(-read.logp_T.sum() / len(zlib.compress(text.encode()))),
                "min_k": float(np.sort(read.logp_T)[:least].mean()),
                "min_k_pp": float(np.sort(standard_T)[:least].mean()),
            }
        )
    return found


def decision_states(asking: Asking, form: Form, several: Sequence[tuple[str, Variant]]) -> np.ndarray:
    """States of blocks at the last token of what is asked, float64 (N, L, D); ``several``: with their items' names."""
    asked = [Example(item, form.asked(one), "novel", item, answer=f" {one.answer.strip()}") for item, one in several]
    return read_states(replace(asking, from_prompt=True), asked, "block").at_decision_NLD.astype(np.float64)


def rows_of(asking: Asking, form: Form, items: Sequence[Item]) -> list[dict[str, Any]]:
    """A row for every original (``place`` 0) and variant: what was asked, replied and found, and the ``likelihoods``.

    ``label``: of an original ``right`` or ``wrong``; of a variant ``solved`` (its own answer), ``recited`` (the
    original's) or ``neither``. ``cut``: the reply was cut before it stated an answer, so ``found`` may be a step of it.
    """
    every = [(item, place, one) for item in items for place, one in enumerate(places_of(item))]
    written = replies(asking, form, [form.asked(one) for *_, one in every])
    likely = likelihoods(asking, [form.text(one) for *_, one in every])
    rows = []
    for (item, place, one), reply, facts in zip(every, written, likely, strict=True):
        found = found_in(reply.text, form.kind)
        cut = reply.cut and form.tokens > SHORT and not states_one(reply.text, form.kind)
        own, original = (stated(answer, form.kind) for answer in (one.answer, item.answer))
        label = label_of(found, own, original, place)
        rows.append(
            {"item": item.item, "place": place, "prompt": one.prompt, "answer": own, "reply": reply.text}
            | {"found": found, "cut": cut, "label": label, **facts}
        )
    return rows
