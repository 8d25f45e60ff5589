"""Write an answer again where it comes from memory: such a span is written anew towards the document."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mnemoscope.auditing.origins.labels import encoded
from mnemoscope.auditing.origins.spans import mentions, spans_of
from mnemoscope.behaviour import next_tokens, phrase_of, read_behind
from mnemoscope.bench.answers import NOTHING, answered
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import Intervention
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from mnemoscope.auditing.origins.reader import Asked, Origins, Part, Reader
    from mnemoscope.behaviour import Asking

MORE = 4  # tokens beside those of the span that is written again


@dataclass(frozen=True)
class Rewritten:
    """An answer that was written again in part.

    Attributes:
        origins: of the answer as it is now; ``first``: of the answer as the model wrote it.
        spans: what each flagged span said, and what stands there now, in order.
    """

    origins: Origins
    first: Origins
    spans: list[tuple[str, str]]


def rewritten(
    asking: Asking, reader: Reader, asked: Asked, lever: Intervention | None, threshold: float, tokens: int
) -> Rewritten:
    """Write an answer, and each span anew whose P(memory) is at least ``threshold``.

    A lever writes it, or, without one, it is that name or number of the document which the document makes likeliest
    there. What stands before it stays; what follows is written by the model itself behind the new span, and read.

    Raises InputError where the document is empty, or the threshold is not from 0 to 1.
    """
    if not asked.has_document:
        raise InputError("document: it is empty; answers are written again towards one")
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold: {threshold}; allowed is 0 to 1")
    first = found = reader.write(asking, asked, tokens)
    done, spans = 0, list[tuple[str, str]]()
    while flagged := next((part for part in found.parts if _comes_from_memory(part, done, threshold)), None):
        span, answer = flagged.span, found.answer
        before, said = answer[: span.start], span.of(answer)
        if lever is None:
            text = before + _of_document(asking, asked, before, span.kind, said)
        else:
            length = len(asking.tokenizer(said, add_special_tokens=False).input_ids)
            anew = answered(lever, _behind(asking, asked, before.rstrip()), length + MORE)[0]
            new = _its_span(before.rstrip(), anew)
            text = _joined(before.rstrip(), new) if new.strip() else before + said
        spans.append((said, text[len(before.rstrip()) :].strip()))
        done, left = len(text), tokens - sum(end <= span.end for _, end in found.offsets)
        text = _joined(text, answered(NOTHING, _behind(asking, asked, text), left)[0] if left > 0 else "")
        found = reader.read(asking, [replace(asked, answer=text)])[0]
    return Rewritten(found, first, spans)


def _of_document(asking: Asking, asked: Asked, before: str, kind: str, said: str) -> str:
    """The name or number of the document whose likelihood behind an answer's beginning it raises most, or ``said``.

    First tokens are scored as in context-aware decoding, ``2 * with - without`` (Shi et al. 2023, arXiv 2305.14739); of
    several with the same first token the likeliest counts. What the question or the answer says already is left out.
    """
    there = dict.fromkeys(span.of(asked.document) for span in spans_of(asked.document) if span.kind == kind)
    names = [one for one in there if not mentions(asked.bare, one) and not mentions(before, one)]
    begun = encoded(asking, before.rstrip())[0]
    rows = [(one, encoded(asking, before + one)[0]) for one in names]
    rows = [(one, row) for one, row in rows if row[: len(begun)] == begun and len(row) > len(begun)]
    if not rows:
        return said
    prompts = asking.tokens([asking.text(asked.prompt), asking.text(asked.bare)])
    firsts = [row[len(begun)] for _, row in rows]
    with_K, without_K = next_tokens(asking, [[*prompt, *begun] for prompt in prompts], [firsts, firsts])
    first = firsts[int(np.argmax(2 * with_K - without_K))]
    best = [found for found in rows if found[1][len(begun)] == first]
    whole = read_behind(asking, [(prompts[0], row) for _, row in best]) if len(best) > 1 else []
    costs = [-one.logp_T[len(begun) :].mean() for one in whole]
    return best[int(np.argmin(costs)) if costs else 0][0]


def _comes_from_memory(part: Part, done: int, threshold: float) -> bool:
    return part.span.start >= done and part.verdict != "cannot tell" and part.p_3[1] >= threshold


def _behind(asking: Asking, asked: Asked, answer: str) -> Prompts:
    """A prompt, and the bare one, with the beginning of the answer behind it."""
    prompting = asking.prompting
    if not prompting.chat:
        return Prompts.free(asking, [asked.prompt + answer], [asked.bare + answer])
    begun = replace(asking, prompting=replace(prompting, reply=prompting.reply + answer))
    return Prompts.free(begun, [asked.prompt], [asked.bare])


def _joined(text: str, more: str) -> str:
    """Two texts; many tokenizers leave out the space that begins the second one."""
    return text + (" " if text[-1:].isalnum() and more[:1].isalnum() else "") + more


def _its_span(kept: str, anew: str) -> str:
    """What was written up to the end of its first span, or, without one, of its first phrase."""
    ends = (span.end - len(kept) for span in spans_of(kept + anew))
    end = next((end for end in ends if end > 0), None)
    return phrase_of(anew) if end is None else anew[:end]
