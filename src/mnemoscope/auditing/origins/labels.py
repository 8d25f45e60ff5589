"""Ground truth by intervention: what an answer says changes with its document, or stays as memory has it.

Of each name or number of an answer: where the document says it, it is replaced there by another of its kind, and the
answer is read again up to this place. What becomes less likely by ``NEEDED`` nats in both of two swaps came from the
*document*. What stays, and what the document does not say, came from *memory* where the model, without the document,
writes just this; else from *neither*. Other tokens came from the document where they are likelier by ``NEEDED`` with it
and would not be written without it, and from memory where they would be.

Shapes: N texts, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from mnemoscope.auditing.origins.spans import Pool, Span, mentions, spans_of, swapped
from mnemoscope.auditing.origins.texts import Form, Text, asked, batches
from mnemoscope.behaviour import Asking, left_padded
from mnemoscope.behaviour.asking import pad_of
from mnemoscope.behaviour.states import capturing
from mnemoscope.models import context_length, pass_inputs, with_last_logits
from mnemoscope.runs.errors import InputError

ORIGINS = ("document", "memory", "neither")
NEEDED = 1.5  # nats by which what came from a document is less likely without it
SWAPS, NEAR = 2, 6  # of a span, from so many that are most like it
UNSURE = -1  # two swaps disagree, or nothing can be swapped


class Read(NamedTuple):
    """An answer as a model reads it behind a prompt: by token its log probability, the entropy, nats, and whether it is
    the likeliest; ``states_ULD``: float32 states of the prompt's last token and the answer's, U = 1 + T.
    """

    logp_T: np.ndarray
    entropy_T: np.ndarray
    first_T: np.ndarray
    states_ULD: np.ndarray


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


@torch.no_grad()
def read_behind(
    asking: Asking, several: Sequence[tuple[list[int], list[int]]], layers: Sequence[int] = ()
) -> list[Read]:
    """Read answers behind prompts, (tokens of the prompt, tokens of the answer) each, in batches of like length.

    ``layers``: blocks whose states are kept. Raises InputError where a text is longer than the model reads.
    """
    limit, found = context_length(asking.model), dict[int, Read]()
    for prompt, answer in several:
        if not prompt or len(prompt) + len(answer) > limit:
            what = f"{len(prompt)} and {len(answer)} tokens"
            raise InputError(
                f"answer: a prompt and it have {what}; at least 1 and at most {limit} are allowed together"
            )
    for chosen in batches([len(prompt) + len(answer) for prompt, answer in several], asking.batch_size):
        longest = max(len(several[i][1]) for i in chosen)
        ids_NT, mask_NT = left_padded([[*several[i][0], *several[i][1]] for i in chosen], pad_of(asking.tokenizer))
        inputs = pass_inputs(asking.model, ids_NT.to(asking.model.device), mask_NT.to(asking.model.device))
        kept: AbstractContextManager[list[Tensor]] = nullcontext([])
        with capturing(asking.model, "block", layers, offsets=None) if layers else kept as states:
            logits_NTV = with_last_logits(asking.model, inputs, longest + 1).logits
        for n, i in enumerate(chosen):
            begins = -len(several[i][1]) - 1
            rows = [state_NTD[n, begins:].float().cpu().numpy() for state_NTD in states]
            states_ULD = np.stack(rows, axis=1) if rows else np.empty((0, 0, 0), np.float32)
            found[i] = _read(logits_NTV[n, begins:-1], several[i][1], states_ULD)
    return [found[i] for i in range(len(several))]


def _read(logits_TV: Tensor, answer: list[int], states_ULD: np.ndarray) -> Read:
    logp_TV = logits_TV.float().log_softmax(-1)
    ids_T1 = torch.tensor(answer, device=logp_TV.device)[:, None]
    said_T, best_T = logp_TV.gather(1, ids_T1)[:, 0], logp_TV.max(-1).values
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    logp_T, nats_T = (part_T.double().cpu().numpy() for part_T in (said_T, entropy_T))
    return Read(logp_T, nats_T, (said_T == best_T).cpu().numpy(), states_ULD)


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
        alone_T, token_T = alone_N[n], np.full(len(ids), 2)
        needed_T = (with_N[n].logp_T - alone_T.logp_T >= NEEDED) & ~alone_T.first_T
        token_T[needed_T], token_T[alone_T.first_T] = 0, 1
        labels = list[int]()
        for span, fell in zip(spans[n], drops[n], strict=True):
            places = tokens_of(offsets, span)
            stays = 1 if alone_T.first_T[places].all() else 2
            says = bool(text.document.strip() and mentions(text.document, span.of(text.answer)))
            changed = {nats >= NEEDED for nats in fell}
            labels.append(UNSURE if says and len(changed) != 1 else 0 if True in changed else stays)
            token_T[places] = labels[-1]
        facts = alone_T.logp_T, with_N[n].logp_T, with_N[n].entropy_T
        found.append(Labelled(text, ids, offsets, spans[n], np.array(labels, int), drops[n], token_T, *facts))
    return found


def _drops(
    asking: Asking, form: Form, several: Sequence[tuple[Text, Sequence[Span], Read]], pool: Pool, seed: int
) -> list[list[tuple[float, ...]]]:
    """Of each span by how many nats swaps make it less likely; see ``Labelled``."""
    asks, places = list[tuple[list[int], list[int]]](), list[tuple[int, int, int]]()
    for n, (text, spans, _) in enumerate(several):
        for place, span in enumerate(spans):
            what, prefix = span.of(text.answer), text.answer[: span.start]
            if not mentions(text.document, what) or mentions(text.question, what) or mentions(prefix, what):
                continue
            rng = np.random.default_rng([seed, crc32(f"{text.question}|{what}".encode())])
            apart = (text.document, text.question, text.answer)
            ids, offsets = encoded(asking, prefix + what)
            begins = tokens_of(offsets, span)[0]
            for other in _nearest(asking, what, pool.others(what, span.kind, apart, rng), rng):
                asks.append((asked(asking, form, text, swapped(text.document, what, other)), ids))
                places.append((n, place, begins))
    found: list[list[tuple[float, ...]]] = [[()] * len(spans) for _, spans, _ in several]
    for (n, place, begins), after in zip(places, read_behind(asking, asks), strict=True):
        before_T = several[n][2].logp_T[begins : len(after.logp_T)]
        found[n][place] += (float(before_T.sum() - after.logp_T[begins:].sum()),)
    return found


@torch.no_grad()
def _nearest(asking: Asking, what: str, others: Sequence[str], rng: np.random.Generator) -> list[str]:
    """``SWAPS`` others, by chance of those whose embeddings are most like its own: a language for a language."""
    if not others:
        return []
    embed = asking.model.get_input_embeddings()
    rows = asking.tokenizer([f" {one}" for one in (what, *others)], add_special_tokens=False).input_ids
    mean_ND = torch.stack([embed(torch.tensor(row, device=embed.weight.device)).float().mean(0) for row in rows])
    mean_ND = torch.nn.functional.normalize(mean_ND - mean_ND.mean(0), dim=1)
    near = (mean_ND[1:] @ mean_ND[0]).argsort(descending=True)[:NEAR].tolist()
    return [others[near[n]] for n in rng.permutation(len(near))[:SWAPS]]
