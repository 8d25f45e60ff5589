"""What a model answers by heart, asked otherwise than any method asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mnemoscope.behaviour import Asking, check_known, prepare, score
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Task

ASIDE = ("Thank you for your letter.\n", "It rained all morning.\n")  # said before what is asked


@dataclass(frozen=True, slots=True)
class Known:
    """How many items were asked bare, and those that the model answers by heart.

    ``asked`` is 0 where the task has no such questions; then what it says is known counts as known.
    """

    asked: int
    items: Sequence[str]


def ask_known(asking: Asking, task: Task) -> Known:
    """Ask every item bare behind each of two sentences about something else, where the task has such questions.

    Known is what memory answers behind one of them. The bare question alone is what leaving out the text asks: were
    items chosen by it, no method could do better.
    """
    asked, known = task.facts_to_know(), set[str]()
    before: tuple[str, ...] = ASIDE
    try:
        check_known(asking, before)
    except InputError:  # a tokenizer of few words
        before = ("",)
    for text in before if asked else ():
        examples = [replace(example, prompt=text + example.prompt) for example in asked]
        labels = score(asking, prepare(asking, examples), margins=False).behaviour_N
        known |= {e.item for e, label in zip(asked, labels, strict=True) if label == "correct"}
    return Known(len(asked), [example.item for example in asked if example.item in known])
