"""Ground truth by intervention: what an answer says changes with its document, or stays as memory has it.

Of each name or number of an answer: where the document says it, it is replaced there by another of its kind, and the
answer is read again up to this place. What becomes less likely by ``NEEDED`` nats in both of two swaps came from the
*document*. What stays, and what the document does not say, came from *memory* where the model, without the document,
writes just this, and from *neither* where it finds another token likelier by ``NEEDED``. What the question says comes
from neither; what the answer has said before is left out. Other tokens came from the document where they are likelier
by ``NEEDED`` with it and would not be written without it; else as spans do.

Shapes: N texts, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from mnemoscope.auditing.origins.spans import Pool, Span, mentions, spans_of, swapped
from mnemoscope.auditing.origins.texts import Form, Text, asked
from mnemoscope.behaviour import Asking, Read, next_tokens, read_behind
from mnemoscope.runs.errors import InputError

ORIGINS = ("document", "memory", "neither")
NEEDED = 1.0  # nats by which what came from a document is less likely without it
SWAPS, NEAR = 2, 6  # of a span, from so many that the model without the document would sooner write there
WITHIN = 8.0  # nats: what is less likely than the first of these by more is of another kind
UNSURE = -1  # two swaps disagree, nothing can be swapped, it was said before, or is nearly written without the document


@dataclass(frozen=True)
class Labelled:
    """An answer's tokens, spans and their labels, as places in ``ORIGINS`` or ``UNSURE``.

    ``drops``: of each span, by how many nats either swap makes it less likely; () where the document does not say it,
    or nothing is there to swap it with. ``alone_T``, ``with_T``: log probability in nats without and with the document.
    """

    text: Text
    ids: list[int]
    offsets: list[tuple[int, int]]
    spans: list[Span]
    label_S: np.ndarray
    drops: list[tuple[float, ...]]
    token_T: np.ndarray
    alone_T: np.ndarray
    with_T: np.ndarray
    entropy_T: np.ndarray

    def tokens_of(self, span: Span) -> list[int]:
        """Places of the tokens that a span has letters of."""
        return tokens_of(self.offsets, span)


def tokens_of(offsets: Sequence[tuple[int, int]], span: Span) -> list[int]:
    """Places of the tokens that a span has letters of."""
    return [n for n, (start, end) in enumerate(offsets) if start < span.end and end > span.start]


def encoded(asking: Asking, answer: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of an answer as it stands behind a prompt, and the characters of each."""
    found = asking.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    return found.input_ids, [tuple(pair) for pair in found.offset_mapping]


def labelled(asking: Asking, form: Form, texts: Sequence[Text], pool: Pool, seed: int = 0) -> list[Labelled]:
    """Label the tokens and spans of answers; see the module. Texts without an answer token are refused."""
    both = [encoded(asking, text.answer) for text in texts]
    if empty := next((text for text, (ids, _) in zip(texts, both, strict=True) if not ids), None):
        raise InputError(f"answer: that to {empty.question[:60]!r} is empty; there is nothing to read")
    prompts = [asked(asking, form, text) for text in texts]
    bare = [asked(asking, form, text, "") for text in texts]
    with_N = read_behind(asking, [(prompt, ids) for prompt, (ids, _) in zip(prompts, both, strict=True)])
    alone_N = read_behind(asking, [(prompt, ids) for prompt, (ids, _) in zip(bare, both, strict=True)])
    spans = [spans_of(text.answer) for text in texts]
    drops = _drops(asking, form, list(zip(texts, spans, with_N, strict=True)), pool, seed)
    found = list[Labelled]()
    for n, (text, (ids, offsets)) in enumerate(zip(texts, both, strict=True)):
        alone_T = alone_N[n]
        token_T = np.array([_without(nats) for nats in alone_T.behind_T])
        token_T[(with_N[n].logp_T - alone_T.logp_T >= NEEDED) & (alone_T.behind_T > 0)] = 0
        labels = list[int]()
        for span, fell in zip(spans[n], drops[n], strict=True):
            places = tokens_of(offsets, span)
            labels.append(_label(text, span, fell, alone_T.behind_T[places].max()))
            token_T[places] = labels[-1]
        facts = alone_T.logp_T, with_N[n].logp_T, with_N[n].entropy_T
        found.append(Labelled(text, ids, offsets, spans[n], np.array(labels, int), drops[n], token_T, *facts))
    return found


def _without(nats: float) -> int:
    """Of what no document says; ``nats``: by how much another token is likelier without one."""
    return 1 if nats == 0 else 2 if nats >= NEEDED else UNSURE


def _label(text: Text, span: Span, fell: tuple[float, ...], behind: float) -> int:
    """Of a span; ``behind``: see ``_without``, of all of its tokens the most."""
    what, changed = span.of(text.answer), {nats >= NEEDED for nats in fell}
    if mentions(text.answer[: span.start], what):
        return UNSURE
    if mentions(text.question, what):
        return 2
    if text.document.strip() and mentions(text.document, what) and changed != {False}:
        return 0 if changed == {True} else UNSURE
    return _without(behind)


def _drops(
    asking: Asking, form: Form, several: Sequence[tuple[Text, Sequence[Span], Read]], pool: Pool, seed: int
) -> list[list[tuple[float, ...]]]:
    """Of each span by how many nats swaps make it less likely; see ``Labelled``."""
    said = list[tuple[int, int, list[int], int]]()  # text, span, tokens up to the span's end, and where it begins
    others, bare, firsts = list[list[str]](), list[list[int]](), list[list[int]]()
    for n, (text, spans, _) in enumerate(several):
        for place, span in enumerate(spans):
            what, prefix = span.of(text.answer), text.answer[: span.start]
            if not mentions(text.document, what) or mentions(text.question, what) or mentions(prefix, what):
                continue
            ids, offsets = encoded(asking, prefix + what)
            begins = tokens_of(offsets, span)[0]
            there = pool.others(
                what, span.kind, (text.document, text.question, text.answer), _drawing(seed, text, what)
            )
            begun = [encoded(asking, prefix + one)[0][begins : begins + 1] for one in there]
            kept = [
                (one, first[0]) for one, first in zip(there, begun, strict=True) if first not in ([], [ids[begins]])
            ]
            said.append((n, place, ids, begins))
            others.append([one for one, _ in kept])
            firsts.append([first for _, first in kept])
            bare.append([*asked(asking, form, text, ""), *ids[:begins]])
    asks, of = list[tuple[list[int], list[int]]](), list[tuple[int, int, int]]()
    for (n, place, ids, begins), there, logp_K in zip(said, others, next_tokens(asking, bare, firsts), strict=True):
        text, span = several[n][0], several[n][1][place]
        near = [there[k] for k in np.argsort(-logp_K, kind="stable")[:NEAR] if logp_K[k] >= logp_K.max() - WITHIN]
        what = span.of(text.answer)
        for k in _drawing(seed, text, what).permutation(len(near))[:SWAPS]:
            asks.append((asked(asking, form, text, swapped(text.document, what, near[k])), ids))
            of.append((n, place, begins))
    found: list[list[tuple[float, ...]]] = [[()] * len(spans) for _, spans, _ in several]
    for (n, place, begins), after in zip(of, read_behind(asking, asks), strict=True):
        before_T = several[n][2].logp_T[begins : len(after.logp_T)]
        found[n][place] += (float(before_T.sum() - after.logp_T[begins:].sum()),)
    return found


def _drawing(seed: int, text: Text, what: str) -> np.random.Generator:
    return np.random.default_rng([seed, crc32(f"{text.question}|{what}".encode())])
