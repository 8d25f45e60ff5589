"""Models that talk: prompts by the chat template, answers where the reply begins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from families import tiny
from families import tokenizer as words_only
from mnemoscope.behaviour import Asking, Chat, decode, encode, prepare, score, score_contrasted
from mnemoscope.config import parse_model
from mnemoscope.errors import InputError
from mnemoscope.tasks import Example, build_task

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


def test_a_prompt_is_put_by_the_template_and_the_reply_begun(talking: PreTrainedTokenizerFast) -> None:
    asking = Asking(tiny("llama"), talking, chat=Chat("w1 w2", halves))
    assert asking.text("w3 w4 | w5") == "w50 w1 w2 w52 w51 w3 w4 w52 w53 w5"
    assert asking.text("w3 w4") == "w50 w1 w2 w52 w51 w3 w4 w52 w53"
    assert Asking(tiny("llama"), talking, chat=Chat()).text("w3 | w5") == "w51 w3 | w5 w52 w53"
    assert asking.whole(conflict("w3 | w5"), " w7") == "w50 w1 w2 w52 w51 w3 w52 w53 w5 w7"
    # Where the model begins the reply itself no space stands before the answer.
    assert asking.whole(conflict("w3"), " w7").endswith("w53w7")


def test_a_template_that_refuses_is_one_line(talking: PreTrainedTokenizerFast) -> None:
    talking.chat_template = "{{ raise_exception('no system message here') }}"
    with pytest.raises(InputError, match=r"^chat: the template of this tokenizer refuses .*no system message here"):
        Asking(tiny("llama"), talking, chat=Chat("w1")).text("w3")


def test_a_model_that_can_think_aloud_is_asked_to_answer(talking: PreTrainedTokenizerFast) -> None:
    talking.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking %} w9{% endif %}"
    assert Asking(tiny("llama"), talking, chat=Chat()).text("w3") == "w3"


def test_what_is_read_is_what_was_rendered(talking: PreTrainedTokenizerFast) -> None:
    """Everything that asks gives for a chat what it gives for the rendered text put plainly."""
    model = tiny("llama")
    chatty = Asking(model, talking, ("w1", "w2"), 2, Chat(split_reply=halves))
    plain = replace(chatty, chat=None)
    examples = [conflict(f"w{n} w{n + 1} | w{n + 2}") for n in range(3, 9)]
    rendered = [replace(example, prompt=chatty.text(example.prompt)) for example in examples]
    for mine, theirs in zip(encode(chatty, examples), encode(plain, rendered), strict=True):
        assert (mine.context, mine.suffixes) == (theirs.context, theirs.suffixes)
    found, wanted = (score(a, prepare(a, e)).margin_N for a, e in ((chatty, examples), (plain, rendered)))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert decode(chatty, examples) == decode(plain, rendered)
    others = examples[::-1]
    contrasted = score_contrasted(chatty, examples, others, [0.5])[0].margin_N
    by_hand = score_contrasted(plain, rendered, rendered[::-1], [0.5])[0].margin_N
    np.testing.assert_allclose(contrasted, by_hand, atol=1e-6)
    batch = chatty.padded([chatty.text(e.prompt) for e in examples])
    assert torch.equal(batch.attention_mask.sum(1), torch.full((6,), 6))


def test_facts_are_asked_by_the_user_and_begun_by_the_model() -> None:
    task = build_task("facts", {}, 0)
    (example,) = task.examples(np.random.default_rng(0), 1, "conflict")
    said, begun = task.split_reply(example.prompt)
    assert example.generalized
    assert example.generalized.strip() in said
    assert begun.startswith("The capital of")
    assert example.prompt.endswith(begun)
    assert not said.endswith("\n")
    told = task.prompted(example, "memorized")
    assert told
    assert told.prompt == f"{task.instruction('memorized')}\n{example.prompt}"


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(InputError, match="chat: the tokenizer of this model has no chat template"):
        Asking(tiny("llama"), words_only(), chat=Chat())


@pytest.mark.parametrize("shape", [{"chat": {}}, {"chat": {}, "folder": "x", "lora": {}}])
def test_only_a_trained_model_is_talked_to(shape: dict[str, object]) -> None:
    with pytest.raises(InputError, match="chat puts prompts to a trained model"):
        parse_model(shape)
