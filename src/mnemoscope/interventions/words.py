"""A sentence in the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mnemoscope.interventions.contract import Intervention, Quoted

Place = Literal["before", "behind"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Words(Intervention):
    """A sentence that is added to every prompt: before it, or behind the text that it quotes."""

    text: str
    place: Place = "before"

    KIND: ClassVar[str] = "words"

    @property
    def everywhere(self) -> bool:
        """True: another prompt has another prefix."""
        return True

    def prompt(self, quoted: Quoted) -> str:
        """The prompt with the sentence in it."""
        if self.place == "before" or not quoted.text:
            return f"{self.text}\n{quoted.prompt}"
        space = quoted.text[len(quoted.text.rstrip()) :] or "\n"
        return quoted.with_text(quoted.text.rstrip() + space + self.text)
