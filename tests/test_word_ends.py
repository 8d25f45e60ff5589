"""Answers end where their last word ends: against text that is generated, in every kind of tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers import label
from mnemoscope.behaviour import Asking, encode
from mnemoscope.models import word_tokenizer
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example

# Tokens as text, and whether what begins with them continues a word: written by hand.
PIECES = {
    " is": False, " Paris": False, "Paris": True, "ian": True, "s": True, "'": False, "'s": False, ".": False,
    ".com": False, ",": False, "\n": False, "\n\n": False, " ": False, "5": True, " 5": False, "_": True, "-": False,
    "!": False, "\u2026": False, "\u201d": False, "\u0301": True, "é": True, "ß": True, "中": True, "。": False,
    ")": False, " (": False,
}  # fmt: skip
END = "<|end|>"


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space belongs to the token behind it."""
    table = byte_letters()
    spelled = ["".join(table[byte] for byte in text.encode()) for text in PIECES]
    letters = list(dict.fromkeys([*table.values(), *spelled]))
    words = Tokenizer(models.BPE({text: n for n, text in enumerate(letters)}, [], unk_token=None))
    words.decoder = decoders.ByteLevel()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END, padding_side="left")


def byte_letters() -> dict[int, str]:
    """The letter that GPT-2 writes for each byte: itself where it is printed, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a bar stands for a space, and the first one of a text is not written."""
    letters = ["<unk>", *dict.fromkeys(text.replace(" ", "▁") for text in PIECES)]
    words = Tokenizer(models.Unigram([(text, -1.0) for text in letters], unk_id=0))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    special = {"unk_token": "<unk>", "eos_token": END, "pad_token": END, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def asking(tokenizer: PreTrainedTokenizerFast, boundary: tuple[str, ...] | None = None, **changes: Any) -> Asking:
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end, **size, **changes
    )
    return Asking(AutoModelForCausalLM.from_config(shape).eval(), tokenizer, boundary)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_every_token_but_one_that_continues_a_word_closes_an_answer(make: Any) -> None:
    ours = asking(make())
    closing, ids = set(ours.boundary_ids()), ours.tokenizer.get_vocab()
    letters = byte_letters()
    for text, continues in PIECES.items():
        names = (text.replace(" ", "▁"), "".join(letters[byte] for byte in text.encode()))
        number = next(ids[name] for name in names if name in ids)
        assert (number in closing) is not continues, text
    assert ids[END] in closing
    assert ours.tokenizer.unk_token_id not in closing
    assert ids.get(letters["é".encode()[0]]) not in closing, "half a letter continues a word"
    table = ours.closing()
    assert {n for n in range(len(ours.tokenizer)) if table[n]} == closing
    assert not table[-1]


def test_digits_without_spaces_continue_a_number_and_words_do_not() -> None:
    """The two kinds of word tokenizers: digits are written in one, words apart."""
    digits = word_tokenizer([*"0123456789", "+", "="], 16)
    closing = digits.convert_ids_to_tokens(asking(digits).boundary_ids())
    assert {"+", "=", digits.eos_token} <= set(closing)
    assert not set(closing) & set("0123456789")
    words = word_tokenizer(["yellow", "green", "."], 16)
    closing = words.convert_ids_to_tokens(asking(words).boundary_ids())
    assert {"yellow", "green", "."} <= set(closing)


def completed(ours: Asking, prompts: list[str], tokens: int, together: int = 1) -> Iterator[list[int]]:
    """What the model writes behind each prompt, by the library's own loop."""
    for start in range(0, len(prompts), together):
        inputs = ours.tokenizer(prompts[start : start + together], return_tensors="pt", padding=True)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens}
        yield from ours.model.generate(**inputs, **options)[:, inputs.input_ids.shape[1] :].tolist()


def test_labels_at_word_ends_equal_those_of_generated_text() -> None:
    """Answers are what the model itself wrote, cut after any token: right only where a word ends there."""
    ours = asking(byte_level())
    prompts = ["".join(pair) for pair in zip(list(PIECES) * 4, (list(PIECES) * 4)[7:], strict=False)][:90]
    examples, wanted = [], []
    for prompt, written in zip(prompts, completed(ours, prompts, 4), strict=True):
        for n in (1, 2, 3):
            answer, whole = (ours.tokenizer.decode(written[:k]) for k in (n, 4))
            spelled = ours.tokenizer(prompt).input_ids + written[:n]
            if "\ufffd" in whole or END in whole or ours.tokenizer(prompt + answer).input_ids != spelled:
                continue  # the text has another spelling
            examples.append(Example(f"{len(examples)}", prompt, "memory", "g", answer=answer))
            wanted.append("wrong" if re.match(r"\w|\u0301", whole[len(answer) :]) else "correct")
    assert {"wrong", "correct"} == set(wanted)
    assert label(ours, examples).behaviour_N.tolist() == wanted


def test_an_answer_without_its_space_is_refused_where_spaces_are_in_the_tokens() -> None:
    ours = asking(byte_level())
    example = Example("i", "The capital is", "conflict", "g", memorized=" Paris", generalized="ian")
    with pytest.raises(InputError, match=r"answer: 'ian' continues the last word of .* with a space \(item 'i'\)$"):
        encode(ours, [example])
    for changes in ({"prompt": "The capital is:"}, {"generalized": " is"}):
        assert encode(ours, [replace(example, **changes)])
    letters = asking(word_tokenizer(["a", "b", "c"], 16))
    assert encode(letters, [replace(example, prompt="a", memorized="b", generalized="c")]), "their spaces are not kept"
