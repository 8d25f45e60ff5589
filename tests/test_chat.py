"""Prompting: prompts by the chat template, replies that are begun, artefacts that keep to the format."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from families import tiny
from families import tokenizer as words_only
from mnemoscope.behaviour import PLAIN, Asking, Prompting, decode, encode, prepare, score
from mnemoscope.config import parse_model
from mnemoscope.face.fitted import Fitted
from mnemoscope.interventions import SteeringVector
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}w50 {% else %}w51 {% endif %}"
    "{{ message['content'] }} w52 {% endfor %}{% if add_generation_prompt %}w53{% endif %}"
)


@pytest.fixture
def talking() -> PreTrainedTokenizerFast:
    words = words_only()
    words.chat_template = TEMPLATE
    return words


def halves(prompt: str) -> tuple[str, str]:
    said, _, begun = prompt.partition(" | ")
    return said, f" {begun}" if begun else ""


def conflict(prompt: str) -> Example:
    return Example("i", prompt, "conflict", "g", memorized=" w7", generalized=" w8 w9")


def test_a_prompt_is_formatted_by_the_template_and_the_reply_begun(talking: PreTrainedTokenizerFast) -> None:
    asking = Asking(tiny("llama"), talking, prompting=Prompting(True, "w1 w2", split=halves))
    assert asking.text("w3 w4 | w5") == "w50 w1 w2 w52 w51 w3 w4 w52 w53 w5"
    assert asking.text("w3 w4") == "w50 w1 w2 w52 w51 w3 w4 w52 w53"
    assert Asking(tiny("llama"), talking, prompting=Prompting(True)).text("w3 | w5") == "w51 w3 | w5 w52 w53"
    assert asking.whole(conflict("w3 | w5"), " w7") == "w50 w1 w2 w52 w51 w3 w52 w53 w5 w7"
    # Where the model begins the reply itself no space stands before the answer.
    assert asking.whole(conflict("w3"), " w7").endswith("w53w7")


def test_the_opening_leaves_out_what_changes_from_day_to_day_or_with_the_message(
    talking: PreTrainedTokenizerFast,
) -> None:
    assert Prompting(True).opening(talking) == talking("w51", add_special_tokens=False).input_ids
    talking.chat_template = "w50 {{ 'w1' if strftime_now('%Y')[0] == '2' else 'w2' }} " + TEMPLATE
    assert talking.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False).startswith("w50 w1 w51 w3")
    assert Prompting(True).opening(talking) == talking("w50", add_special_tokens=False).input_ids


def test_what_is_read_is_what_was_rendered(talking: PreTrainedTokenizerFast) -> None:
    """Everything that asks gives for a chat what it gives for the rendered text as it is."""
    chatty = Asking(tiny("llama"), talking, ("w1", "w2"), 2, Prompting(True, split=halves))
    examples = [conflict(f"w{n} w{n + 1} | w{n + 2}") for n in range(3, 9)]
    rendered = [replace(example, prompt=chatty.text(example.prompt)) for example in examples]
    both = (chatty, examples), (replace(chatty, prompting=PLAIN), rendered)
    encoded = ([(one.context, one.suffixes) for one in encode(asking, asked)] for asking, asked in both)
    margins = (score(asking, prepare(asking, asked)).margin_N for asking, asked in both)
    written = (decode(asking, asked) for asking, asked in both)
    assert operator.eq(*encoded)
    assert operator.eq(*written)
    np.testing.assert_allclose(*margins, atol=1e-6)
    batch = chatty.padded([chatty.text(e.prompt) for e in examples])
    assert torch.equal(batch.attention_mask.sum(1), torch.full((6,), 6))


def test_a_format_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="chat: the tokenizer of this model has no chat template"):
        Asking(tiny("llama"), words_only(), prompting=Prompting(True))
    for fields, line in (({"reply": "w1"}, "reply: 'w1'"), ({"system": "w1"}, "system: 'w1'")):
        with pytest.raises(InputError, match=f"^{line} is a part of a chat; set chat"):
            Prompting(**fields)  # type: ignore[arg-type]
    for shape in ({"chat": {}}, {"chat": {}, "folder": "x", "lora": {}}):
        with pytest.raises(InputError, match="chat formats prompts of a trained model"):
            parse_model(shape)


def of_a_chat(words: PreTrainedTokenizerFast, prompting: Prompting, path: Path) -> SteeringVector:
    """A vector as a study of a chat saves it, opened again."""
    opening, model = tuple(prompting.opening(words)), tiny("llama")
    made = SteeringVector("generalized", {1: torch.ones(32)}, prompting=prompting, opening=opening)
    made.bound_to(model, words).save(path)
    return SteeringVector.load(str(path), model, words)


@torch.no_grad()
def test_a_vector_of_chats_is_refused_on_raw_prompts(talking: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, path, prompting = tiny("llama"), tmp_path / "v.safetensors", Prompting(True, "w1 w2")
    vector = of_a_chat(talking, prompting, path)
    assert talking.convert_ids_to_tokens(list(vector.opening)) == ["w50", "w1", "w2", "w52", "w51"]
    fitted = Fitted.open(str(path), model, talking)
    inputs = fitted.inputs(["w3 w4", "w5"])
    plain = model(**inputs).logits
    for context in (vector.apply(model), fitted.steer("generalized")):
        with context:
            assert model.generate(**inputs, max_new_tokens=3, pad_token_id=0).shape[0] == 2
            assert not torch.equal(model(**inputs).logits, plain)
    raw = talking(["w50 w1 w2 w52 w51 w3 w52 w53", "w5"], return_tensors="pt", padding=True)
    other = Asking(model, talking, prompting=Prompting(True))
    calls: tuple[Callable[..., object], ...] = (model, partial(model.generate, max_new_tokens=3, pad_token_id=0))
    for wrong, row in ((raw, 1), (other.padded([other.text("w3")]), 0)):
        for call in calls:
            with vector.apply(model), pytest.raises(InputError, match=f"^chat: prompt {row} of the batch is not form"):
                call(**wrong)
    with vector.apply(model, alpha=0):
        model(**raw)


def test_an_artefact_keeps_its_format(talking: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny("llama")
    for prompting, asked, line in (
        (Prompting(True, "w1"), PLAIN, "chat: False; allowed is True: .* by the chat template"),
        (PLAIN, Prompting(True), "chat: True; allowed is False: .* as they are"),
        (Prompting(True, "w1"), Prompting(True, "w2"), "system: 'w2'; this was fitted with 'w1'"),
        (Prompting(True, reply=" w3"), Prompting(True), "reply: this was fitted where the beginning of the reply"),
    ):
        of_a_chat(talking, prompting, tmp_path / "v.safetensors")
        with pytest.raises(InputError, match=f"^{line}"):
            Fitted.open(tmp_path / "v.safetensors", model, talking, prompting=asked)
        asked = Prompting(prompting.chat, reply=" w4" if prompting.chat else "")
        fitted = Fitted.open(tmp_path / "v.safetensors", model, talking, prompting=asked)
        assert fitted.prompting == Prompting(prompting.chat, prompting.system, asked.reply)
    of_a_chat(talking, Prompting(True, split=halves), tmp_path / "v.safetensors")
    begun = Fitted.open(tmp_path / "v.safetensors", model, talking)
    with pytest.raises(InputError, match=r"^reply: replies were begun where this was fitted"):
        begun.inputs(["w5"])
