"""The format of prompts: as they are, or by the chat template of the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mnemoscope.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Prompting:
    """The format of all prompts of a fit, a vector or a detector.

    Attributes:
        chat: whether the chat template formats them.
        system: content of the system message; None: the template's own.
        reply: beginning of every reply, behind the user's message; the model continues it.
        split: cuts a prompt into the user's message and the beginning of the reply, for prompts that hold both.

    Raises:
        InputError: a system message or a reply without ``chat``.
    """

    chat: bool = False
    system: str | None = None
    reply: str = ""
    split: Callable[[str], tuple[str, str]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.chat and (self.reply or self.system is not None):
            name, value = ("reply", self.reply) if self.reply else ("system", self.system)
            raise InputError(f"{name}: {value!r} is a part of a chat; set chat, or write it into the prompt")

    @property
    def begun(self) -> bool:
        """Whether the beginning of replies is given."""
        return bool(self.reply) or (self.chat and self.split is not None)

    @property
    def facts(self) -> dict[str, Any]:
        """``chat``, ``system`` and ``begun``, as artefacts store them."""
        return {"chat": self.chat, "system": self.system, "begun": self.begun}

    def parts(self, prompt: str) -> tuple[str, str]:
        """The user's message and the beginning of the reply."""
        message, begun = self.split(prompt) if self.split else (prompt, "")
        return message, begun + self.reply

    def format(self, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
        """The formatted prompt; raises InputError where there is no chat template, or it refuses the messages."""
        if not self.chat:
            return prompt
        message, begun = self.parts(prompt)
        return self._rendered(tokenizer, message) + begun

    def opening(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Token ids that begin every formatted prompt; [] without a chat."""
        if not self.chat:
            return []
        rendered = [self._rendered(tokenizer, message) for message in "1x"]
        first, second = tokenizer(rendered, add_special_tokens=False).input_ids
        unknown = tokenizer.unk_token_id  # may stand for both messages
        apart = (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b or a == unknown)
        return first[: next(apart, min(len(first), len(second)))]

    def check_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises InputError where a chat is wanted and the tokenizer has no chat template."""
        if self.chat and not tokenizer.chat_template:
            raise InputError("chat: the tokenizer of this model has no chat template; leave prompts as they are")

    def _rendered(self, tokenizer: PreTrainedTokenizerFast, message: str) -> str:
        self.check_template(tokenizer)
        messages = [{"role": "user", "content": message}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            # Reasoning models answer at once; other templates ignore the option.
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # a template may raise anything, for example that it takes no system message
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"chat: the template of this tokenizer refuses the messages ({reason})") from error


PLAIN = Prompting()
