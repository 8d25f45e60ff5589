"""Labels, margins and states against plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import tiny
from helpers import label, mini_examples
from mnemoscope.behaviour import (
    Asking,
    as_batch,
    by_length,
    cache_prefixes,
    decode,
    draw_candidates,
    encode,
    mark_confabulations,
    mine_pairs,
    phrase_of,
    prepare,
    score,
)
from mnemoscope.behaviour.batches import EACH_BATCH, parts_of
from mnemoscope.models import with_last_logits, word_tokenizer
from mnemoscope.models.passes import logits_at
from mnemoscope.models.room import bytes_of_prompt
from mnemoscope.paper.stored import CODE
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example, build_task


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere"])
@torch.no_grad()
def test_logits_at_some_tokens_are_those_of_the_whole_pass(family: str) -> None:
    """Heads that scale or cap their logits included."""
    model = tiny(family)
    ids_NT = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids_NT, "attention_mask": torch.ones_like(ids_NT)}
    whole_NTV, forward = model(**inputs).logits, model.get_output_embeddings().forward
    read_NT = torch.tensor([[0, 1, 0, 0, 1, 1], [0] * 6, [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(logits_at(model, inputs, read_NT), whole_NTV[read_NT], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_last_logits(model, inputs, 2).logits, whole_NTV[:, -2:], rtol=1e-5, atol=1e-5)
    assert model.get_output_embeddings().forward == forward


def test_a_text_ends_with_its_phrase() -> None:
    phrases = {
        " Oslo. It is": " Oslo",
        " 3.5 km": " 3.5 km",
        "\n\nOslo\nand": "\n\nOslo",
        " New York, then": " New York",
    }
    assert {text: phrase_of(text) for text in (*phrases, "")} == {**phrases, "": ""}


def generated_labels(asking: Asking, examples: list[Example], together: int) -> list[str]:
    """The oracle: what ``generate`` answers, ``together`` examples at a time (1: no padding at all)."""
    model, tokenizer = asking.model, asking.tokenizer
    (closing,) = asking.boundary_ids()
    labels = []
    for start in range(0, len(examples), together):
        part = examples[start : start + together]
        inputs = tokenizer([e.prompt for e in part], return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=14, do_sample=False, eos_token_id=closing)
        for example, row in zip(part, output[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
            answer = row[: row.index(closing)] if closing in row else None
            wanted = [
                tokenizer(example.prompt + o).input_ids[len(tokenizer(example.prompt).input_ids) :]
                for o in example.options
            ]
            names = ("memorized", "generalized") if example.kind == "conflict" else ("correct",)
            nothing = "other" if example.kind == "conflict" else "wrong"
            labels.append(next((n for n, w in zip(names, wanted, strict=True) if w == answer), nothing))
    return labels


def test_labels_equal_those_of_generate(mini: Callable[[str], Asking]) -> None:
    asking, examples = mini("addition"), mini_examples("addition", 200)
    ours = label(asking, examples)
    for together, asked in ((1, examples[:50]), (100, examples)):
        theirs = np.array(generated_labels(asking, asked, together), dtype=object)
        assert (ours.behaviour_N[: len(asked)] == theirs)[~ours.tie_N[: len(asked)]].all()
    assert {"correct", "memorized", "generalized"} <= set(theirs), "the rule by which these models are accepted"
    assert ours.tie_N.mean() < 0.01


def test_no_label_depends_on_batch_size_order_margins_or_cache(mini: Callable[[str], Asking]) -> None:
    asking, examples = mini("addition"), mini_examples("addition", 200)
    first = label(asking, examples)
    order = np.random.default_rng(0).permutation(len(examples))
    single = label(replace(asking, batch_size=1), [examples[i] for i in order])
    batches = prepare(asking, examples)
    cache_prefixes(asking, batches)
    cached = score(asking, batches)
    again = score(asking, batches)
    quick = score(asking, batches, margins=False)
    settled = ~first.tie_N
    assert (first.behaviour_N[order] == single.behaviour_N)[settled[order]].all()
    for other in (cached, again, quick):
        assert (first.behaviour_N == other.behaviour_N)[settled].all()
    np.testing.assert_allclose(first.margin_N, cached.margin_N, atol=1e-4)
    np.testing.assert_array_equal(cached.margin_N, again.margin_N)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=9), st.integers(1, 9))
def test_parts_of_similar_length_cost_least(lengths: list[int], most: int) -> None:
    lengths.sort()
    found = parts_of(lengths, most)
    assert [n for part in found for n in range(len(lengths))[part]] == [*range(len(lengths))]

    def cost(ends: tuple[int, ...]) -> int:
        return sum(EACH_BATCH + (b - a) * lengths[b - 1] for a, b in pairwise((0, *ends, len(lengths))))

    inner = range(1, len(lengths))
    every = (ends for n in range(len(lengths)) for ends in combinations(inner, n))
    allowed = [e for e in every if all(b - a <= most for a, b in pairwise((0, *e, len(lengths))))]
    assert cost(tuple(part.stop for part in found[:-1])) == min(map(cost, allowed))


def test_parts_by_length_are_labelled_as_the_whole(mini: Callable[[str], Asking]) -> None:
    asking, examples = mini("addition"), mini_examples("addition", 60)
    longer = [replace(e, prompt=f"{e.prompt} {e.prompt} {e.prompt}") for e in examples[:20]]
    whole = as_batch(asking, encode(asking, [*longer, *examples]), np.arange(80))
    parts = by_length(whole)
    assert sorted(len(part.examples_N) for part in parts) == [20, 60]
    one, other = score(asking, [whole]), score(asking, parts)
    assert one.behaviour_N.tolist() == other.behaviour_N.tolist()
    np.testing.assert_allclose(one.margin_N, other.margin_N, atol=1e-4)


def test_answers_that_share_a_beginning_are_decided_where_they_part(mini: Callable[[str], Asking]) -> None:
    """The shared tokens move into the context, and the model must produce them itself to be labelled."""
    asking = mini("addition")
    rng = np.random.default_rng(0)
    task = build_task("addition", {"digits": 2, "stored": 96, "memorized_share": 0.4}, 0)
    examples = []
    for e in task.examples(rng, 100, "memory"):
        # The stored code, and the same code with another last symbol: eight shared tokens, one that differs.
        assert e.answer
        both = [e.answer, e.answer[:-2] + ("0>" if e.answer[-2] != "0" else "1>")]
        memorized, generalized = both[:: 1 if len(examples) % 2 else -1]
        examples.append(replace(e, kind="conflict", answer=None, memorized=memorized, generalized=generalized))
    encoded = encode(asking, examples)
    assert all(
        len(x.context) - len(asking.tokenizer(e.prompt).input_ids) == x.shared == 8
        for x, e in zip(encoded, examples, strict=True)
    )
    plain = label(asking, examples)
    theirs = np.array(generated_labels(asking, examples, 50), dtype=object)
    assert {"memorized", "generalized"} <= set(theirs)
    assert (plain.behaviour_N == theirs)[~plain.tie_N].all()
    batches = prepare(asking, examples)
    cache_prefixes(asking, batches)
    assert (score(asking, batches).behaviour_N == theirs)[~plain.tie_N].all()


def test_confabulations_are_codes_that_were_not_stored_here(mini: Callable[[str], Asking]) -> None:
    asking = mini("addition")
    task = build_task("addition", {"digits": 2, "stored": 96, "memorized_share": 0.4}, 0)
    examples = task.examples(np.random.default_rng(0), 200, "conflict")
    scores = label(asking, examples)
    mark_confabulations(asking, examples, scores, task.has_memorized_format)
    texts = ["".join(text.split()) for text in decode(asking, examples)]
    expected = [
        float(b == "other" and bool(CODE.fullmatch(text))) for b, text in zip(scores.behaviour_N, texts, strict=True)
    ]
    assert scores.confabulated_N.tolist() == expected
    scores = label(asking, examples)
    mark_confabulations(asking, examples, scores, lambda text: None)  # where both formats are the same
    assert np.isnan(scores.confabulated_N).all()


def test_pairs_are_exactly_the_flips_and_their_states_match(mini: Callable[[str], Asking]) -> None:
    asking = mini("addition")
    task = build_task("addition", {"digits": 2, "stored": 96, "memorized_share": 0.4}, 0)
    rng = np.random.default_rng(0)
    candidates = list(draw_candidates(task, task.examples(rng, 150, "conflict"), rng))
    mined = list(mine_pairs(asking, candidates, chunk=64))
    assert sum(len(batch.candidates) for batch in mined) == len(candidates)
    a, b = (label(asking, [pair[side] for pair in candidates]).behaviour_N for side in (0, 1))
    expected = [{x, y} == {"memorized", "generalized"} for x, y in zip(a, b, strict=True)]
    assert np.concatenate([batch.is_pair_N for batch in mined]).tolist() == expected
    assert 0 < sum(expected) < len(expected)
    for batch in (batch for batch in mined if batch.pairs()):
        generalized, memorized = zip(*batch.pairs(), strict=True)
        for side, behaviour, states in (
            (generalized, "generalized", batch.states_generalized_PLD),
            (memorized, "memorized", batch.states_memorized_PLD),
        ):
            scores = label(asking, list(side), capture="block")
            assert set(scores.behaviour_N) == {behaviour}
            np.testing.assert_allclose(scores.states_NLD, states, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memorized": "banana"}, "answer: the tokenizer has no token for 'n' in 'banana'"),
        ({"prompt": "12+34~"}, "prompt: the tokenizer has no token for '~' in '12+34~'"),
        ({"prompt": "1" * 60 + "+1="}, "the model reads at most 47"),
        ({"memorized": "12", "generalized": "123"}, "begins with the whole of the other"),
        ({"prompt": "12+34=<mem", "memorized": "-1"}, "merges"),
        ({"prompt": " "}, "has no token"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    mini: Callable[[str], Asking], changes: dict[str, str], message: str
) -> None:
    example = replace(mini_examples("addition", 5)[0], kind="conflict", answer=None, memorized="12", generalized="34")
    with pytest.raises(InputError, match="item") as error:
        encode(mini("addition"), [replace(example, **changes)])
    assert message in str(error.value)


def test_an_answer_may_be_closed_by_a_token_that_says_more_space(mini: Callable[[str], Asking]) -> None:
    """Many tokenizers have a full stop and the line break behind it in one token; ".com" closes nothing."""
    words = word_tokenizer(["a", ".", ".\n", "\n\n", ".com", ". b", "..."], 16)
    asking = replace(mini("addition"), tokenizer=words, boundary=(".", "\n"))
    assert words.convert_ids_to_tokens(asking.boundary_ids()) == [".", ".\n", "\n\n"]
    words.add_tokens([".\t"])
    assert ".\t" in words.convert_ids_to_tokens(asking.boundary_ids()), "not what was known before"
    with pytest.raises(InputError, match="boundary"):
        replace(asking, boundary=("no such words",)).boundary_ids()


def test_batches_are_smaller_where_memory_is_short(
    mini: Callable[[str], Asking], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asking, examples = mini("addition"), mini_examples("addition", 60)
    (whole,) = prepare(asking, examples)
    assert not caplog.records
    tokens, answers = whole.ids_NT.shape[1], 2 * whole.suffix_RM.shape[1]
    each = bytes_of_prompt(asking.model, tokens, answers)
    config = asking.model.config
    assert each > 4 * tokens * 6 * config.n_layer * config.n_embd  # keys and values, and copies of them
    monkeypatch.setattr("mnemoscope.models.room.free_bytes", lambda device: 20 * each)
    fewer = prepare(asking, examples)
    assert [len(batch.examples_N) for batch in fewer] == [10] * 6  # half of what is free
    prepare(asking, examples)
    (said,) = caplog.records
    assert f"pairs.batch_size: {asking.batch_size} prompts of {tokens} tokens" in said.message
    assert said.message.endswith("10 at a time")
    one, other = score(asking, fewer), score(asking, [whole])
    assert (one.behaviour_N == other.behaviour_N)[~other.tie_N].all()
    monkeypatch.setattr("mnemoscope.models.room.free_bytes", lambda device: 1)
    assert len(prepare(asking, examples[:3])) == 3  # one at a time, however little there is
    monkeypatch.setattr("mnemoscope.models.room.free_bytes", lambda device: None)
    assert len(prepare(asking, examples)) == 1


def test_margins_equal_a_plain_pass_over_prompt_and_answer(mini: Callable[[str], Asking]) -> None:
    asking = mini("addition")
    examples = [e for e in mini_examples("addition", 120) if e.kind == "conflict"]
    scores = label(asking, examples)
    for example, margin in zip(examples, scores.margin_N, strict=True):
        logp = []
        start = len(asking.tokenizer(example.prompt).input_ids)
        for option in example.options:
            ids = torch.tensor([asking.tokenizer(example.prompt + option).input_ids])
            with torch.no_grad():
                logp_TV = asking.model(ids).logits[0].double().log_softmax(-1)
            logp.append(sum(float(logp_TV[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])))
        assert margin == pytest.approx(logp[1] - logp[0], abs=1e-4)
