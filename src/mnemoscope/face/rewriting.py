"""Write an answer again where it comes from memory: such a span is written anew towards the document."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mnemoscope.auditing.origins.spans import spans_of
from mnemoscope.behaviour import phrase_of
from mnemoscope.bench.answers import NOTHING, answered
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import Intervention, Toward
from mnemoscope.interventions.decoding import Decoding
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from mnemoscope.auditing.origins.reader import Asked, Origins, Part, Reader
    from mnemoscope.behaviour import Asking

MORE = 4  # tokens beside those of the span that is written again
# Where no lever was fitted: context-aware decoding against the bare question, at the weight of its paper.
UNFITTED = Decoding(toward=Toward.GENERALIZED, method="cad", setting={"weight": 1.0, "contrast": "bare"})


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
    asking: Asking, reader: Reader, asked: Asked, lever: Intervention, threshold: float, tokens: int
) -> Rewritten:
    """Write an answer, and each span anew under a lever whose P(memory) is at least ``threshold``.

    What stands before such a span stays; what follows is written by the model itself behind the new span, and read.

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
        kept = answer[: span.start].rstrip()
        length = len(asking.tokenizer(span.of(answer), add_special_tokens=False).input_ids)
        anew = answered(lever, _behind(asking, asked, kept), length + MORE)[0]
        text = _joined(kept, _its_span(kept, anew)) if anew.strip() else answer[: span.end]
        spans.append((span.of(answer), text[len(kept) :].strip()))
        left = tokens - sum(end <= span.end for _, end in found.offsets)
        done = len(text)
        text = _joined(text, answered(NOTHING, _behind(asking, asked, text), left)[0] if left > 0 else "")
        found = reader.read(asking, [replace(asked, answer=text)])[0]
    return Rewritten(found, first, spans)


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
