"""Interventions of the arena against plain transformers: formulas token by token, hooks by hand, edited weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from arena_lists import SIZES, plainly
from little_facts import LittleFacts
from mnemoscope.behaviour import Asking, Scores, prepare, score
from mnemoscope.bench import known as known_module
from mnemoscope.bench.answers import NOTHING, Neutral, is_exact, is_said
from mnemoscope.bench.gate import asked_conflicts
from mnemoscope.bench.known import Known, ask_known
from mnemoscope.bench.lists import DrawnBench
from mnemoscope.bench.varied import _both, _long
from mnemoscope.config import parse_arena
from mnemoscope.interventions import Intervention, Quoted, SteeringVector, Toward
from mnemoscope.interventions.controls import has_equal_norm, of_equal_norm
from mnemoscope.interventions.methods import candidates
from mnemoscope.interventions.shifts import norm_of
from mnemoscope.interventions.words import Place, Words
from mnemoscope.tasks import Example


def test_prompts_are_contrasted_with_their_bare_question_or_with_themselves_without_their_text(
    bench: DrawnBench,
) -> None:
    prompts = bench.test["conflict"]
    for example, bare, bares, cut, quoted in zip(
        prompts.examples, prompts.bares, prompts.contrast("bare"), prompts.contrast("cut"), prompts.quoted, strict=True
    ):
        assert bare is bares
        assert cut.prompt == example.prompt.replace(quoted.text, "")
        assert cut.options == example.options
    for method, contrast in (("cad", "cut"), ("adacad", "cut"), ("cad-bare", "bare")):
        assert {one.contrast for one in candidates(method, bench, "generalized")} == {contrast}
    (gone,) = candidates("delete", bench, "memorized")
    assert [gone.prompt(quoted) for quoted in prompts.quoted] == [e.prompt for e in prompts.contrast("cut")]


def test_a_conflict_is_asked_for_by_a_second_pass_over_the_prompt_without_its_text(bench: DrawnBench) -> None:
    model, tokenizer = bench.asking.model, bench.asking.tokenizer
    for name in ("conflict", "agreeing", "bare"):
        prompts, wanted = bench.test[name], []
        for example, quoted in zip(prompts.examples, prompts.quoted, strict=True):
            without = quoted.before + quoted.behind
            whole, cut = (plainly(model, tokenizer(text).input_ids)[-1] for text in (example.prompt, without))
            spoken = 2 * whole.log_softmax(-1) - cut.log_softmax(-1)
            wanted.append(bool(quoted.text) and int(spoken.argmax()) != int(cut.argmax()))
        assert asked_conflicts(prompts).tolist() == wanted
        assert (name != "bare") or not any(wanted)


def test_a_text_with_both_answers_says_the_other_one_last_and_nothing_else_changes() -> None:
    example = Example("i", "p", "conflict", "g", "f", "test", memorized=" lead", generalized=" him")
    text = "Anna: A whimsical man, him who reads him.\n"
    assert _both(text, example) == f"{text.rstrip()} Anna: A whimsical man, him who reads lead."
    assert _both("A whimsical man.", example) is None


def test_a_text_stands_first_in_the_middle_or_last_of_a_long_one(bench: DrawnBench) -> None:
    found = _long(replace(bench, config=parse_arena(SIZES | {"long": 24})))
    assert list(found) == ["first of 24 tokens", "in the middle of 24 tokens", "last of 24 tokens"]
    example = bench.test["conflict"].examples[0]
    first, middle, last = (change("A is B.\n", example) for change in found.values())
    around = first.removeprefix("A is B.\n")
    assert last == f"{around}\nA is B."
    before, behind = middle.split("\nA is B.\n")
    assert f"{before} {behind}".split() == around.split()
    assert 20 <= len(bench.asking.tokenizer(around).input_ids) <= 24  # some may be special


def test_every_conflict_has_a_bare_question_that_is_answered_by_heart(bench: DrawnBench) -> None:
    for lists in (bench.tune, bench.test, bench.fit):
        bares = [bare for bare in lists["conflict"].bares if bare]
        assert len(bares) == len(lists["conflict"])
        assert set(score(bench.asking, prepare(bench.asking, bares)).behaviour_N) == {"memorized"}


def test_what_is_known_is_asked_behind_other_sentences_and_fit_takes_all_items(
    little: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were conflicts chosen by their bare question, leaving out the text would answer all of them from memory."""
    monkeypatch.setattr(known_module, "ASIDE", ("Everybody agrees:\n", "Use only what you know.\n"))
    asked = list[str]()
    monkeypatch.setattr(known_module, "prepare", lambda asking, some: asked.extend(e.prompt for e in some) or some)
    answers = iter((["correct"] * 24 + ["wrong"] * 24, ["wrong"] * 47 + ["correct"]))
    found = Scores.empty(48)
    monkeypatch.setattr(known_module, "score", lambda *_, **__: replace(found, behaviour_N=np.array(next(answers))))
    known, task = ask_known(little, LittleFacts()), LittleFacts()
    assert known.items == [f"land{n}" for n in (*range(24), 47)]
    assert {prompt.split("\n")[0] for prompt in asked} == {"Everybody agrees:", "Use only what you know."}
    assert {prompt.split("\n")[1] for prompt in asked} == {e.prompt for e in task.facts_to_know()}
    monkeypatch.undo()
    most = Known(48, [f"land{n}" for n in range(48) if n % 4])
    drawn = DrawnBench.of(little, task, parse_arena(SIZES), most)
    assert {e.group for e in drawn.test["conflict"].examples} <= set(most.items)
    assert {e.group for e in drawn.tune["conflict"].examples} <= set(most.items)
    assert not {e.group for e in drawn.fit_conflicts.examples} <= set(most.items)


def test_controls_move_states_as_far_somewhere_else(
    bench: DrawnBench, fitted: dict[tuple[str, Toward], Intervention]
) -> None:
    for method in ("caa", "nmd", "gradient", "learned", "iti", "knob", "reft", "low-rank"):
        one = fitted[method, "generalized"]
        assert isinstance(one, SteeringVector)
        assert has_equal_norm(one)
        sources = bench.sources(one.site)
        control, again, other = (of_equal_norm(one, sources, 0, number) for number in (0, 0, 1))
        assert all(torch.equal(part, again.tensors()[name]) for name, part in control.tensors().items())
        assert not all(torch.equal(part, other.tensors()[name]) for name, part in control.tensors().items())
        assert norm_of(one, sources) > 0
        if one.is_constant:
            assert norm_of(control, sources) == pytest.approx(norm_of(one, sources), rel=1e-4)
    assert not has_equal_norm(fitted["cad", "generalized"])
    assert not has_equal_norm(fitted["june", "generalized"])


def worded(place: Place) -> Words:
    return Words(toward="generalized", text="Read.", place=place)


def test_wordings_go_before_the_prompt_or_behind_its_text() -> None:
    quoted = Quoted.of("Context: A is B.\nQuestion: A?\nAnswer:", "Question: A?\nAnswer:")
    assert quoted == Quoted("", "Context: A is B.\n", "Question: A?\nAnswer:")
    assert worded("behind").prompt(quoted) == "Context: A is B.\nRead.\nQuestion: A?\nAnswer:"
    assert worded("before").prompt(quoted) == "Read.\nContext: A is B.\nQuestion: A?\nAnswer:"
    between = Quoted.of("Question: A?\nContext: A is B.\nAnswer:", "Question: A?\nAnswer:")
    assert between == Quoted("Question: A?\n", "Context: A is B.\n", "Answer:")
    inline = Quoted.of("A is B. Q: A?", "Q: A?")
    assert worded("behind").prompt(inline) == "A is B. Read. Q: A?"
    assert inline.with_text("C is D.") == "C is D. Q: A?"
    solved = "C is D. E is F. The capital of A is"
    above = Quoted.of("Context: A is B.\nAnswer: The capital of A is", solved)
    assert above == Quoted("", "Context: A is B.\n", "Answer: The capital of A is")
    assert Quoted.of("A is B.\nThe capital of A is", solved) == Quoted("", "A is B.\n", "The capital of A is")
    led = Quoted.of("Anna: A is B.\nBen: Yes. A is", "A is")
    assert led == Quoted("", "Anna: A is B.\n", "Ben: Yes. A is")
    led = Quoted.of('Somebody wrote "A is B". Write it down: A is', "A is")
    assert led == Quoted("", 'Somebody wrote "A is B". ', "Write it down: A is")
    assert Quoted.of('End with the word "B": A is', "A is") == Quoted("", "", 'End with the word "B": A is')
    assert Quoted.of("A is B. The capital of A is", solved) == Quoted("", "A is B. ", "The capital of A is")
    unlabelled = Quoted.of("A is B.\n\nWhat is A?\nAnswer:", "Question: What is A?\nAnswer:")
    assert unlabelled == Quoted("", "A is B.\n\n", "What is A?\nAnswer:")
    amid = "The note says B. Say the capital of A. The answer is:"
    assert Quoted.of(amid, "Name the capital of A. The answer is:") == Quoted("", "", amid)
    for bare in (None, "A is B. Q: A?", "something else", "Who? A?"):
        whole = Quoted.of("A is B. Q: A?", bare)
        assert whole == Quoted("", "", "A is B. Q: A?")
        assert worded("behind").prompt(whole) == "Read.\nA is B. Q: A?"


@pytest.mark.parametrize(
    ("prompt", "behind"),
    [
        ("Context: A is B.\nQuestion: What is A?\nAnswer: A is", "Question: What is A?\nAnswer: A is"),
        ("They say A is B. Question: What is A?\nAnswer:", "Question: What is A?\nAnswer:"),
        ("A is B.\nA is", "A is"),
        ("A is B, they say. A is", "A is"),
        ("What is A?", "What is A?"),  # nothing is quoted
        ("A is", "A is"),
    ],
)
def test_a_question_is_told_from_the_text_before_it(prompt: str, behind: str) -> None:
    quoted = Quoted.guess(prompt)
    assert (quoted.prompt, quoted.behind) == (prompt, behind)


def test_exact_match_is_of_the_first_line_in_its_normal_form() -> None:
    assert is_exact(" Paris.\nQuestion", " paris")
    assert is_exact("the Hague", "Hague")
    assert not is_exact(" Paris is", " Paris")
    assert not is_exact("", " Paris")


def test_a_sentence_says_what_it_names_first() -> None:
    said = " The capital of France, says the text, is not Paris but the Hague."
    assert is_said(said, " Paris", " Hague")
    assert not is_said(said, " Hague", " Paris")
    assert is_said(said, " Hague", " Rome")
    assert not is_said(" Parisian.", " Paris", " Hague")


def test_divergence_on_neutral_text_is_that_of_plain_passes(
    bench: DrawnBench, fitted: dict[tuple[str, Toward], Intervention]
) -> None:
    neutral = Neutral(bench.asking, 12, 16, 40, 4, np.random.default_rng(0))
    places = np.concatenate([batch.examples_N for batch in neutral.batches])
    for one in (fitted[method, "generalized"] for method in ("reft", "ircan", "juice", "lora", "caa")):
        found = neutral.measured(one).kl_first
        for place, kl in zip(places.tolist(), found.tolist(), strict=True):
            ids = neutral.encoded[place].context
            plain = plainly(bench.asking.model, ids)[-1].log_softmax(-1)
            with one.apply(bench.asking.model):
                steered = plainly(bench.asking.model, ids)[-1].log_softmax(-1)
            assert kl == pytest.approx(float((plain.exp() * (plain - steered)).sum()), abs=1e-5), one.method
    nothing = neutral.measured(NOTHING)
    assert nothing.kl_first.abs().max() < 1e-6
    assert nothing.same_top.all()
    assert neutral.measured(fitted["cad", "generalized"]).empty
