"""A model and the form in which examples are asked of it: prompts and answers as tokens, and what closes an answer.

Shapes: N examples, T tokens of a left-padded context.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemoscope.models import context_length, end_ids
from mnemoscope.runs.errors import InputError, refusing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.tasks import Example, Task

UNDATED = "{% macro strftime_now(form) %}?{% endmacro %}"  # before a chat template


@dataclass(frozen=True, slots=True)
class Prompting:
    """The format of all prompts of a fit, a vector or a detector.

    Attributes:
        chat: whether the chat template formats them.
        system: content of the system message; None: the template's own.
        reply: beginning of every reply, behind the user's message; the model continues it.
        split: cuts a prompt into the user's message and the beginning of the reply, for prompts that hold both.

    Raises InputError where there is a system message or a reply without ``chat``.
    """

    chat: bool = False
    system: str | None = None
    reply: str = ""
    split: Callable[[str], tuple[str, str]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.chat and (self.reply or self.system is not None):
            given = f"reply: {self.reply!r}" if self.reply else f"system: {self.system!r}"
            raise InputError(f"{given} is a part of a chat; set chat, or write it into the prompt")

    @property
    def begun(self) -> bool:
        """Whether the beginning of replies is given."""
        return bool(self.reply) or (self.chat and self.split is not None)

    @property
    def facts(self) -> dict[str, Any]:
        """``chat``, ``system`` and ``begun``, as artefacts store them."""
        return {"chat": self.chat, "system": self.system, "begun": self.begun}

    def of(self, task: Task) -> Prompting:
        """The same for the prompts of a task, which may hold the beginning of the reply."""
        return replace(self, split=task.split_reply if self.chat and task.begins_reply else None)

    def parts(self, prompt: str) -> tuple[str, str]:
        """The user's message and the beginning of the reply."""
        message, begun = self.split(prompt) if self.split else (prompt, "")
        return message, begun + self.reply

    def format(self, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
        """The formatted prompt; raises InputError where the chat template refuses the messages."""
        if not self.chat:
            return prompt
        message, begun = self.parts(prompt)
        return self._rendered(tokenizer, message) + begun

    def opening(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Token ids that begin every formatted prompt; [] without a chat."""
        if not self.chat:
            return []
        # White space that begins a message may merge with what stands before it.
        rendered = [self._rendered(tokenizer, message) for message in ("1", "x", " x", "\n\nx")]
        undated = UNDATED + tokenizer.get_chat_template()  # another day is another date
        rendered.append(self._rendered(tokenizer, "x", chat_template=undated))
        rows = tokenizer(rendered, add_special_tokens=False).input_ids
        unknown = tokenizer.unk_token_id  # may stand for all messages
        apart = (n for n, (one, *others) in enumerate(zip(*rows, strict=False)) if {*others} != {one} or one == unknown)
        return rows[0][: next(apart, min(map(len, rows)))]

    def _rendered(self, tokenizer: PreTrainedTokenizerFast, message: str, **more: Any) -> str:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": message})
        # Reasoning models answer at once; other templates ignore the option.
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False, **more}
        with refusing("chat: the template of this tokenizer refuses the messages"):  # such as a system message
            return tokenizer.apply_chat_template(messages, **how)


PLAIN = Prompting()


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as tokens."""

    context: list[int]  # the prompt and the tokens that all options begin with; its last one is the decision position
    shared: int  # how many tokens at the end of the context the options share
    suffixes: tuple[list[int], ...]  # the rest of each option; their first tokens differ


@dataclass(frozen=True, slots=True)
class Asking:
    """A model, its tokenizer and the format in which examples are asked of it.

    Attributes:
        model, tokenizer: a causal language model and its fast tokenizer; neither is changed.
        boundary: texts of which one closes every answer, each a token; "" is the end-of-text token. None: an answer
            ends where its last word ends, whatever follows.
        batch_size: examples per pass, at most: fewer where memory is short. No label depends on it, ties aside.
        prompting: how prompts are formatted; InputError where it is a chat and the tokenizer has no chat template.
        from_prompt: the decision position is the last token of every prompt, as in ``generate``, also where two answers
            begin with the same tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    boundary: tuple[str, ...] | None = ("",)
    batch_size: int = 512
    prompting: Prompting = PLAIN
    from_prompt: bool = False

    def __post_init__(self) -> None:
        if self.prompting.chat and not self.tokenizer.chat_template:
            raise InputError("chat: the tokenizer of this model has no chat template; leave prompts as they are")

    def text(self, prompt: str) -> str:
        """The formatted prompt."""
        return self.prompting.format(self.tokenizer, prompt)

    def whole(self, example: Example, option: str) -> str:
        """The formatted prompt and one of its answers."""
        # An answer that begins the reply has no space before it.
        alone = self.prompting.chat and not self.prompting.parts(example.prompt)[1]
        return self.text(example.prompt) + (option.lstrip() if alone else option)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of formatted texts; a chat template has added its special tokens already."""
        try:
            return self.tokenizer(list(texts), add_special_tokens=not self.prompting.chat).input_ids
        except BaseException as error:  # a panic of the library is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"tokenizer: it cannot read the prompts ({str(error).splitlines()[0]})") from error

    def padded(self, texts: Sequence[str]) -> Any:
        """Left-padded ``input_ids`` and ``attention_mask`` (N, T) of formatted texts, on the model's device.

        Raises InputError where a text has no token, or more than the model reads.
        """
        from transformers import BatchEncoding

        rows, limit = self.tokens(texts), context_length(self.model)
        for text, row in zip(texts, rows, strict=True):
            if not 0 < len(row) <= limit:
                raise InputError(f"prompt: {text[:60]!r} has {len(row)} tokens; allowed are 1 to {limit}")
        ids_NT, mask_NT = left_padded(rows, pad_of(self.tokenizer))
        return BatchEncoding({"input_ids": ids_NT, "attention_mask": mask_NT}).to(self.model.device)

    def boundary_ids(self) -> list[int]:
        """Token ids that close an answer; InputError where none does.

        A boundary text with at most white space behind it, or, at a word end, every token that continues no word.
        """
        return self.closing().nonzero()[:, 0].tolist()

    def closing(self) -> Tensor:
        """Whether each token closes an answer, bool, on the model's device; the last stands for all higher ids."""
        ends = tuple(end_ids(self.model, self.tokenizer))
        return _closing(self.tokenizer, self.boundary, ends, len(self.tokenizer)).to(self.model.device)


def pad_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token under the mask: the padding token, or another where the tokenizer has none."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return pad if pad is not None else end or 0


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids as one batch, and its mask; int64 (N, T) each."""
    width = max(map(len, rows), default=0)
    ids_NT = torch.tensor([[pad] * (width - len(row)) + [*row] for row in rows], device=device)
    mask_NT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_NT, mask_NT


@lru_cache(maxsize=16)  # decoding all tokens takes a moment, and every pass needs them
def _closing(
    tokenizer: PreTrainedTokenizerFast, boundary: tuple[str, ...] | None, ends: tuple[int, ...], size: int
) -> Tensor:
    """See ``Asking.closing``; ``size`` is that of the vocabulary, which may grow."""
    unknown, end = tokenizer.unk_token_id, tokenizer.eos_token_id
    ids: set[int] = set()
    if boundary is None:
        ids = {number for number, text in enumerate(_behind_a_word(tokenizer, size)) if not continues_word(text)}
    elif any(boundary):
        texts = tokenizer.batch_decode([[number] for number in range(size)])
        for text in filter(None, boundary):
            # Many tokenizers have "." and the line breaks behind it in one token.
            ids |= {n for n, token in enumerate(texts) if token.startswith(text) and not token[len(text) :].strip()}
            # Encoded alone it may be another token than behind a word ("." at the beginning of a Llama 2 text).
            alone = tokenizer(text, add_special_tokens=False).input_ids
            ids |= set(alone if len(alone) == 1 else [])
    ids -= {unknown}
    if boundary is None or "" in boundary:
        ids |= set(ends) - {unknown} | ({end} if unknown == end else set())
    if not ids:
        raise InputError(f"boundary: none of {boundary!r} is one token of the tokenizer")
    closing_V = torch.zeros(max(ids) + 2, dtype=torch.bool)
    closing_V[sorted(ids)] = True
    return closing_V


def continues_word(text: str) -> bool:
    """Whether a text continues the word that it follows, by its first character: of a word, or a combining mark.

    So does the first part of a character of several bytes, most of which are letters.
    """
    return re.match(r"\w|\ufffd", text) is not None or unicodedata.category(text[:1] or " ").startswith("M")


def _behind_a_word(tokenizer: PreTrainedTokenizerFast, size: int) -> list[str]:
    """The text of each token as it is written behind a word, where the spaces of every kind of tokenizer are seen."""
    decode = tokenizer.backend_tokenizer.decode_batch
    alone = decode([[number] for number in range(size)], skip_special_tokens=False)
    word = next((number for number, text in enumerate(alone) if text.isalnum()), None)
    if word is None:
        return alone
    both = decode([[word, number] for number in range(size)], skip_special_tokens=False)
    return [text[len(alone[word]) :] for text in both]


def check_known(asking: Asking, prompts: Sequence[str]) -> None:
    """Raises InputError where a prompt has a word for which the tokenizer has no token; both are named."""
    for prompt, row in zip(prompts, asking.tokens([asking.text(prompt) for prompt in prompts]), strict=True):
        if _unknown(asking.tokenizer) in row:
            raise InputError(f"prompt: {_unknown_word(asking.tokenizer, prompt)}")


def _unknown(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token of what the tokenizer does not know, where it stands for nothing else."""
    return None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id


def _unknown_word(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Error message that names the word of a text that has no token."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = zip(encoding.input_ids, encoding.offset_mapping, strict=True)
    first, last = next((span for number, span in places if number == tokenizer.unk_token_id), (0, len(text)))
    return f"the tokenizer has no token for {text[first:last]!r} in {text!r}"


@lru_cache(maxsize=16)
def _keeps_spaces(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether spaces between words are in the tokens, so that an answer needs its own."""
    texts = ("a b", "ab")
    return all(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text for text in texts)


def encode(asking: Asking, examples: Sequence[Example]) -> list[Encoded]:
    """Tokenize prompts together with their answers.

    Raises InputError where the tokenizer cannot encode a prompt or answer, merges across their seam, a prompt does not
    fit the model's context, or one answer begins with the whole of the other. The example is named.
    """
    texts = [[asking.text(e.prompt), *(asking.whole(e, option) for option in e.options)] for e in examples]
    tokens = iter(asking.tokens(list(chain(*texts))) if texts else [])
    encoded, limit = [], context_length(asking.model)
    for example in examples:
        prompt, *options = islice(tokens, 1 + len(example.options))
        fault = _fault(asking, example, prompt, options, limit)
        answers = [option[len(prompt) :] for option in options]
        # How many leading tokens two answers have in common.
        apart = (i for i, (a, b) in enumerate(zip(*answers, strict=False)) if a != b) if len(answers) > 1 else iter([0])
        shared = next(apart, min(map(len, answers)))
        if not fault and any(len(answer) == shared for answer in answers):
            both = f"memorized, generalized: {example.memorized!r} and {example.generalized!r}"
            fault = f"{both}: one begins with the whole of the other, so nothing separates them"
        if fault:
            raise InputError(f"{fault} (item {example.item!r})")
        shared = 0 if asking.from_prompt else shared
        encoded.append(Encoded(prompt + answers[0][:shared], shared, tuple(answer[shared:] for answer in answers)))
    return encoded


def _fault(asking: Asking, example: Example, prompt: list[int], options: list[list[int]], limit: int) -> str:
    """Why an example cannot be asked of a model that reads ``limit`` tokens, or ""."""
    unknown = _unknown(asking.tokenizer)
    if not prompt:
        return f"prompt: {example.prompt!r} has no token"
    for option, text in zip(options, example.options, strict=True):
        if text[0].isalpha() and asking.text(example.prompt)[-1:].isalpha() and _keeps_spaces(asking.tokenizer):
            return f"answer: {text!r} continues the last word of {example.prompt[-30:]!r}; let it begin with a space"
        if option[: len(prompt)] != prompt:
            merged = f"{text!r} with the end of the prompt {example.prompt[-30:]!r}"
            ends = "end the prompt without the space, and " if asking.text(example.prompt)[-1:] == " " else ""
            return f"answer: the tokenizer merges {merged}; {ends}begin the answer with the space between them"
        if len(option) == len(prompt):
            return f"answer: {text!r} has no token"
        if unknown in option:
            what, shown = ("prompt", example.prompt) if unknown in prompt else ("answer", text)
            return f"{what}: {_unknown_word(asking.tokenizer, shown)}"
        if len(option) + 1 > limit:
            return f"prompt: {len(option)} tokens with its answer; the model reads at most {limit - 1}"
    return ""
