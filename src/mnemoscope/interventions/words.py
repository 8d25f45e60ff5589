"""A sentence in the prompt, and where in a prompt it goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from mnemoscope.interventions.contract import Intervention

Place = Literal["before", "behind"]
SENTENCE_END = re.compile(r"""[.!?]["']?\s+""")


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

    @classmethod
    def guess(cls, prompt: str) -> Quoted:
        """The parts of a prompt whose bare question is not known, which begins on the line of the last question mark.

        Without a mark it is the last line; on one line the sentence, or what leads to the answer. No text: all behind.
        """
        mark = prompt.rfind("?") + 1 or len(prompt.rstrip())
        place = prompt.rfind("\n", 0, mark) + 1
        place = place or max((end.end() for end in SENTENCE_END.finditer(prompt, 0, mark)), default=0)
        return cls("", prompt[:place], prompt[place:])

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


@dataclass(frozen=True, kw_only=True, repr=False)
class Words(Intervention):
    """A sentence that is added to every prompt: before it, or behind the text that it quotes."""

    text: str
    place: Place = "before"

    KIND: ClassVar[str] = "words"
    everywhere = True  # another prompt has another prefix

    def prompt(self, quoted: Quoted) -> str:
        """The prompt with the sentence in it."""
        if self.place == "before" or not quoted.text:
            return f"{self.text}\n{quoted.prompt}"
        return quoted.with_text(quoted.text + self.text)
