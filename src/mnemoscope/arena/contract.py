"""What an intervention is: a changed prompt, a context in which passes run, or a rule that joins two passes.

Shapes: N prompts, M tokens of an answer, V vocabulary, L layers, D neurons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mnemoscope.steering import Toward

Applied = Callable[[int | None], AbstractContextManager[Any]]  # the decision column, None: the last of each prompt
Joined = Callable[[Tensor, Tensor], Tensor]  # next-token logits of a prompt, those of its contrast -> logits
Place = Literal["before", "behind"]
Contrast = Literal["bare", "cut"]  # with what a prompt is contrasted: its bare question, or itself without its text
SENTENCE_END = re.compile(r"""[.!?]["']?\s+""")


def unchanged(start: int | None = None) -> AbstractContextManager[Any]:
    """The context in which nothing is changed."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Quoted:
    """A prompt in three parts: before the text that it quotes, the text with its label, and behind it.

    ``text`` is empty where the prompt is a bare question; else it ends in white space.
    """

    before: str
    text: str
    behind: str

    @classmethod
    def of(cls, prompt: str, bare: str | None) -> Quoted:
        """The parts of a prompt, found by its bare question; without one all of it stands behind."""
        if bare is None or bare == prompt:
            return cls("", "", prompt)
        end = next((n for n, (a, b) in enumerate(zip(prompt[::-1], bare[::-1], strict=False)) if a != b), len(bare))
        end = min(end, len(bare), len(prompt))
        begin = len(bare) - end
        if prompt[:begin] != bare[:begin]:  # something else stands before the bare question, as solved ones do
            return cls._above(prompt, len(prompt) - end)
        before, text, behind = prompt[:begin], prompt[begin : len(prompt) - end], prompt[len(prompt) - end :]
        if text.startswith("\n"):  # lines belong to the text with their ends
            before, text, behind = f"{before}\n", text[1:] + "\n", behind.removeprefix("\n")
        whole = cls._whole(text)
        return cls(before, text[:whole], text[whole:] + behind)

    @staticmethod
    def _whole(text: str) -> int:
        """Where a text ends: with its last whole line, else its last sentence; what follows leads to the answer."""
        line = text.rfind("\n") + 1
        return line or max((end.end() for end in SENTENCE_END.finditer(text)), default=0)

    @classmethod
    def _above(cls, prompt: str, shared: int) -> Quoted:
        """What stands above the line on which the bare question begins, or before it on one line.

        ``shared``: where what the prompt has in common with the bare question begins; less than two words are chance.
        """
        while 0 < shared < len(prompt) and not prompt[shared - 1].isspace():  # amid a word
            shared += 1
        if len(prompt[shared:].split()) < 2:
            return cls("", "", prompt)
        place = prompt.rfind("\n", 0, len(prompt[:shared].rstrip(" "))) + 1 or shared
        if not prompt[:place].endswith("\n") and prompt[:place].rstrip()[-1:] not in '.!?:"':  # amid a sentence
            return cls("", "", prompt)
        return cls("", prompt[:place], prompt[place:])

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return self.before + self.text + self.behind

    def with_text(self, text: str) -> str:
        """The prompt that quotes another text, with the white space of this one behind it."""
        space = self.text[len(self.text.rstrip()) :] or "\n"
        return f"{self.before}{text.rstrip()}{space}{self.behind}"


@dataclass(frozen=True, slots=True)
class Wording:
    """A sentence that is added to a prompt: before it, or behind the text that it quotes."""

    text: str
    place: Place = "before"

    def added(self, quoted: Quoted) -> str:
        """The prompt with the sentence in it."""
        if self.place == "before" or not quoted.text:
            return f"{self.text}\n{quoted.prompt}"
        space = quoted.text[len(quoted.text.rstrip()) :] or "\n"
        return quoted.with_text(quoted.text.rstrip() + space + self.text)


@dataclass(frozen=True)
class Intervention:
    """What makes a model give other answers, fitted and with its settings.

    Attributes:
        method: name of the method.
        toward: the behaviour it is to bring about.
        setting: what was chosen for it, plain values.
        passes: of the model for each answer token.
        changes_weights: whether it is other weights, so that serving it needs them loaded.
        wording: added to every prompt, or None.
        applied: makes the context in which passes run.
        everywhere: whether passes inside differ before the decision position too, so that no cached prefix serves.
        in_one_go: whether options are read in one pass each (``score_read``), because passes belong together.
        joined: joins the logits of a prompt with those of its ``contrast``, or None.
        norm: of its shift, relative to the states' norm: the root of the sum over layers; NaN without one.
        drawn: a control, by number: the same intervention with a random direction of the same norm in every layer;
            None where there is no norm.
    """

    method: str
    toward: Toward
    setting: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1
    changes_weights: bool = False
    wording: Wording | None = None
    applied: Applied = unchanged
    everywhere: bool = False
    in_one_go: bool = False
    joined: Joined | None = None
    contrast: Contrast = "bare"
    norm: float = np.nan
    drawn: Callable[[int], Applied] | None = None

    def control(self, number: int) -> Intervention:
        """The control of the same norm with this number."""
        assert self.drawn is not None, "an intervention without a norm has no control of the same norm"
        return replace(self, applied=self.drawn(number), drawn=None)
