"""Labels, margins and states against plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import hook_count, label, mini_examples
from mnemoscope.behaviour import (
    Asking,
    Batch,
    Scores,
    cache_prefixes,
    decode,
    draw_candidates,
    encode,
    log_probabilities,
    mark_confabulations,
    mine_pairs,
    only_log_probability,
    prepare,
    read_states,
    score,
    score_contrasted,
    with_option,
)
from mnemoscope.errors import InputError
from mnemoscope.models import blocks_of, bytes_of_prompt, word_tokenizer
from mnemoscope.models.room import free_bytes
from mnemoscope.steering import SteeringVector, shifted
from mnemoscope.tasks import Example, build_task
from mnemoscope.tasks.addition import CODE
from test_models import tiny

TASK_NAMES = ["inference", "addition", "addition-digits"]


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


@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.parametrize("together", [1, 100])
def test_labels_equal_those_of_generate(mini: Callable[[str], Asking], name: str, together: int) -> None:
    asking, examples = mini(name), mini_examples(name, 500)
    ours = label(asking, examples)
    theirs = np.array(generated_labels(asking, examples, together), dtype=object)
    assert len(set(theirs)) >= 4, "a model that shows only one behaviour would make this test empty"
    assert (ours.behaviour_N == theirs)[~ours.tie_N].all()
    assert ours.tie_N.mean() < 0.01


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_label_depends_on_batch_size_order_margins_or_cache(mini: Callable[[str], Asking], name: str) -> None:
    asking, examples = mini(name), mini_examples(name, 300)
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


@pytest.mark.parametrize("name", TASK_NAMES)
def test_margins_equal_a_plain_pass_over_prompt_and_answer(mini: Callable[[str], Asking], name: str) -> None:
    asking = mini(name)
    examples = [e for e in mini_examples(name, 120) if e.kind == "conflict"]
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


def test_states_are_those_of_the_last_prompt_token(mini: Callable[[str], Asking]) -> None:
    asking = mini("inference")
    examples = mini_examples("inference", 60)
    scores = label(asking, examples, capture="block")
    assert scores.states_NLD is not None
    assert scores.states_NLD.shape == (60, 3, 64)
    for example, state_LD in zip(examples, scores.states_NLD, strict=True):
        ids = torch.tensor([asking.tokenizer(example.prompt).input_ids])
        with torch.no_grad():
            hidden = asking.model(ids, output_hidden_states=True).hidden_states
        for layer in range(2):
            np.testing.assert_allclose(state_LD[layer], hidden[layer + 1][0, -1].numpy(), atol=1e-5)


def test_answers_that_share_a_beginning_are_decided_where_they_part(mini: Callable[[str], Asking]) -> None:
    """The shared tokens move into the context, and the model must produce them itself to be labelled."""
    asking = mini("addition")
    rng = np.random.default_rng(0)
    task = build_task("addition", {"digits": 2, "stored": 96, "memorized_share": 0.4}, 0)
    examples = []
    for e in task.examples(rng, 100, "memory"):
        # The stored code, and the same code with another last symbol: eight shared tokens, one that differs.
        assert e.answer
        last = "0" if e.answer[-2] != "0" else "1"
        examples.append(
            replace(e, kind="conflict", answer=None, memorized=e.answer, generalized=e.answer[:-2] + last + ">")
        )
    encoded = encode(asking, examples)
    assert all(
        len(x.context) - len(asking.tokenizer(e.prompt).input_ids) == x.shared == 8
        for x, e in zip(encoded, examples, strict=True)
    )
    plain = label(asking, examples)
    theirs = np.array(generated_labels(asking, examples, 50), dtype=object)
    assert {"memorized", "other"} <= set(theirs)
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
    digits = mini("addition-digits")
    same_format = build_task("addition-digits", {"digits": 2, "stored": 96}, 0)
    scores = label(digits, examples := same_format.examples(np.random.default_rng(0), 20, "conflict"))
    mark_confabulations(digits, examples, scores, same_format.has_memorized_format)
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
    assert sum(expected) > 20
    for batch in mined:
        generalized, memorized = zip(*batch.pairs(), strict=True)
        for side, behaviour, states in (
            (generalized, "generalized", batch.states_generalized_PLD),
            (memorized, "memorized", batch.states_memorized_PLD),
        ):
            scores = label(asking, list(side), capture="block")
            assert set(scores.behaviour_N) == {behaviour}
            np.testing.assert_allclose(scores.states_NLD, states, atol=1e-5)


def test_reading_leaves_no_hook_even_after_an_error(mini: Callable[[str], Asking]) -> None:
    model = mini("addition").model
    before = hook_count(model)
    with pytest.raises(RuntimeError, match="on purpose"), read_states(model, "neuron"):
        raise RuntimeError("on purpose")
    with read_states(model, "neuron"):
        assert hook_count(model) > before
    assert hook_count(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memorized": "banana"}, "answer: the tokenizer cannot encode 'banana'"),
        ({"prompt": "12+34~"}, "prompt: the tokenizer cannot encode"),
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


def test_a_boundary_must_be_one_token(mini: Callable[[str], Asking]) -> None:
    with pytest.raises(InputError, match="boundary"):
        replace(mini("addition"), boundary=("no such words",)).boundary_ids()


def test_an_answer_may_be_closed_by_a_token_that_says_more_space(mini: Callable[[str], Asking]) -> None:
    """Many tokenizers have a full stop and the line break behind it in one token; ".com" closes nothing."""
    words = ["a", ".", ".\n", "\n\n", ".com", ". b", "..."]
    tokenizer = word_tokenizer(words, 16)
    asking = replace(mini("addition"), tokenizer=tokenizer, boundary=(".", "\n"))
    assert tokenizer.convert_ids_to_tokens(asking.boundary_ids()) == [".", ".\n", "\n\n"]
    tokenizer.add_tokens([".\t"])
    assert ".\t" in tokenizer.convert_ids_to_tokens(asking.boundary_ids()), "not what was known before"


def vector_on(layers: list[int], width: int, site: str = "block", scale: float = 1.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(1)
    shifts = {layer: scale * torch.randn(width, generator=generator) for layer in layers}
    return SteeringVector("generalized", shifts, site=site)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["inference", "addition"])
@pytest.mark.parametrize("margins", [True, False])
def test_no_cell_of_a_sweep_leaves_a_trace_in_the_next(mini: Callable[[str], Asking], name: str, margins: bool) -> None:
    asking, examples = mini(name), mini_examples(name, 200)
    cells = [
        vector_on([0, 1], 64),
        vector_on([1], 64),
        vector_on([0], 256, "neuron"),
        vector_on([], 64),
        vector_on([0], 64, "attention"),
    ]

    def cached() -> list[Batch]:
        batches = prepare(asking, examples)
        cache_prefixes(asking, batches)
        return batches

    def cell(batches: list[Batch], vector: SteeringVector) -> Scores:
        return score(asking, batches, margins=margins, applied=lambda: vector.apply(asking.model))

    together = cached()
    for vector in [*cells, *cells[::-1]]:
        alone, after_others = cell(cached(), vector), cell(together, vector)
        np.testing.assert_array_equal(alone.behaviour_N, after_others.behaviour_N)
        np.testing.assert_array_equal(alone.margin_N, after_others.margin_N)


def test_gradients_outlive_a_sweep_over_the_same_batches(mini: Callable[[str], Asking]) -> None:
    """What a graph needs must not be overwritten by a later cell, and a replayed block must not cut the graph."""
    asking = mini("addition")
    examples = [e for e in mini_examples("addition", 60) if e.kind == "conflict"]
    batches = prepare(asking, examples)
    gradients = []
    for cached, disturbed in ((False, False), (True, False), (True, True)):
        if cached:
            cache_prefixes(asking, batches)
        shifts = {layer: torch.full((64,), 0.1, requires_grad=True) for layer in (0, 1)}
        with shifted(asking.model, shifts, "block", "decision"):
            logp_N2 = log_probabilities(asking, batches[0])
        if disturbed:
            score(asking, batches, applied=lambda: vector_on([0, 1], 64).apply(asking.model))
        gradients.append(torch.autograd.grad((logp_N2[:, 1] - logp_N2[:, 0]).sum(), list(shifts.values())))
    for whole, prefixed, disturbed_D in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, prefixed, rtol=1e-3, atol=1e-3)
        assert torch.equal(prefixed, disturbed_D)


WORDS = [f"w{i}" for i in range(37)]


def random_asking(family: str) -> Asking:
    """A random model whose answers are closed by two words of three."""
    return Asking(tiny(family), word_tokenizer(WORDS, 32), tuple(WORDS[::3] + WORDS[1::3]), batch_size=16)


def shifted_logits(asking: Asking, vector: SteeringVector, ids: list[int], start: int) -> torch.Tensor:
    """The oracle: one row without padding or cache, each block's output overwritten from the decision position on."""

    def adder(shift_D: torch.Tensor) -> Callable[..., object]:
        def add(module: torch.nn.Module, args: object, output: object) -> object:
            states = (output[0] if isinstance(output, tuple) else output).clone()  # type: ignore[index]
            states[:, start:] += shift_D
            return (states, *output[1:]) if isinstance(output, tuple) else states  # type: ignore[index]

        return add

    handles = [blocks_of(asking.model)[n].register_forward_hook(adder(x)) for n, x in vector.shifts.items()]
    try:
        with torch.no_grad():
            return asking.model(torch.tensor([ids]), use_cache=False).logits[0].double()
    finally:
        for handle in handles:
            handle.remove()


def expected(asking: Asking, vector: SteeringVector, example: Example) -> tuple[str, float]:
    """Label and margin by the oracle."""
    prompt = asking.tokenizer(example.prompt).input_ids
    closing = set(asking.boundary_ids())
    labels, logp = [], []
    for name, option in zip(("memorized", "generalized"), example.options, strict=True):
        ids = prompt + asking.tokenizer(option).input_ids
        logits_TV = shifted_logits(asking, vector, ids, len(prompt) - 1)[len(prompt) - 1 :]
        top = logits_TV.argmax(-1).tolist()
        chosen_T1 = logits_TV[:-1].log_softmax(-1).gather(1, torch.tensor(ids[len(prompt) :])[:, None])
        logp.append(float(chosen_T1.sum()))
        labels += [name] * (top[:-1] == ids[len(prompt) :] and top[-1] in closing)
    return (labels or ["other"])[0], logp[1] - logp[0]


def greedy_examples(asking: Asking, vector: SteeringVector, longest: int) -> list[Example]:
    """Prompts of several lengths; one option is what the steered model answers, of one token or up to ``longest``."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(60):
        prompt = [int(x) for x in rng.integers(3, 40, rng.integers(2, 9))]
        answer: list[int] = []
        for _ in range(rng.integers(1, longest + 1)):
            answer.append(int(shifted_logits(asking, vector, prompt + answer, len(prompt) - 1)[-1].argmax()))
        if rng.random() < 0.2:
            answer = [int(rng.integers(3, 40))]
        other = [3 + (answer[0] - 2) % 37, *(int(x) for x in rng.integers(3, 40, rng.integers(0, longest)))]
        texts = [" ".join(asking.tokenizer.convert_ids_to_tokens(x)) for x in (prompt, answer, other)]
        flipped = texts[2:0:-1] if rng.random() < 0.5 else texts[1:]
        if not {0, 1, 2} & {*answer, *other}:
            examples.append(Example(str(number), texts[0], "conflict", "g", "f", "test", *flipped))
    return examples


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("layers", [[], [0, 1, 2], [1], [2]])
@pytest.mark.parametrize("longest", [1, 3])
def test_a_sweep_on_any_architecture_equals_plain_single_passes(family: str, layers: list[int], longest: int) -> None:
    asking = random_asking(family)
    vector = vector_on(layers, 16, scale=0.02)  # about as large as the states of these models
    examples = greedy_examples(asking, vector, longest)
    batches = prepare(asking, examples)
    assert any((batch.mask_NT == 0).any() for batch in batches), "some prompts must be padded"
    cache_prefixes(asking, batches)
    wanted, margins = zip(*(expected(asking, vector, example) for example in examples), strict=True)
    assert len(set(wanted)) == 3
    few = prepare(replace(asking, batch_size=8), examples)
    cache_prefixes(asking, few, most_bytes=1)
    assert [batch.prefix is None for batch in few] == [False, *[True] * (len(few) - 1)], "no more is kept than allowed"
    for reading in (batches, few, prepare(asking, examples)):
        scores = score(asking, reading, applied=lambda: vector.apply(asking.model))
        assert (scores.behaviour_N == np.array(wanted, dtype=object))[~scores.tie_N].all()
        assert scores.tie_N.mean() < 0.1
        np.testing.assert_allclose(scores.margin_N, margins, atol=1e-4)
        quick = score(asking, reading, margins=False, applied=lambda: vector.apply(asking.model))
        assert (quick.behaviour_N == scores.behaviour_N)[~scores.tie_N].all()


def test_a_cell_runs_only_the_blocks_above_its_first_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = random_asking("gpt2")
    batches = prepare(asking, greedy_examples(asking, vector_on([], 16), 1)[:16])
    cache_prefixes(asking, batches)
    kind = type(blocks_of(asking.model)[0])
    runs, forward = [], kind.forward

    def counting(block: torch.nn.Module, *args: object, **kwargs: object) -> object:
        runs.append(block)
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    for vector, blocks_run in (
        (vector_on([0, 1, 2], 16), [1, 2]),
        (vector_on([1], 16), [2]),
        (vector_on([1], 16, "attention"), [1, 2]),
        (vector_on([2], 16), []),
    ):
        runs.clear()
        score(asking, batches, applied=lambda v=vector: v.apply(asking.model))  # type: ignore[misc]
        assert {asking.model.transformer.h[n] for n in blocks_run} == set(runs)


@pytest.mark.parametrize("cached", [False, True])
def test_one_option_each_has_the_probability_that_it_has_beside_the_other(
    mini: Callable[[str], Asking], cached: bool
) -> None:
    asking = mini("addition")
    (batch,) = prepare(asking, [e for e in mini_examples("addition", 12) if e.kind == "conflict"])
    if cached:
        cache_prefixes(asking, [batch])
    both_N2 = log_probabilities(asking, batch)
    option_N = torch.arange(len(batch.examples_N)) % 2
    chosen = with_option(batch, option_N)
    assert chosen.option_R.tolist() == option_N.tolist()
    found_N2 = log_probabilities(asking, chosen)
    wanted_N = both_N2.gather(1, option_N[:, None])
    torch.testing.assert_close(found_N2.gather(1, option_N[:, None]), wanted_N)
    assert found_N2.gather(1, 1 - option_N[:, None]).isnan().all()
    vector = {1: torch.full((64,), 0.3)}
    with shifted(asking.model, vector, "block", "decision"):  # block 0 is not run again where its output is known
        both_N2, found_N2 = log_probabilities(asking, batch), log_probabilities(asking, chosen)
    torch.testing.assert_close(found_N2.gather(1, option_N[:, None]), both_N2.gather(1, option_N[:, None]))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_only_option_is_read_in_one_pass_as_in_two(mini: Callable[[str], Asking], cached: bool, layer: int) -> None:
    """With and without a shift for each prompt, whose gradient is the same too."""
    asking = mini("addition")
    (both,) = prepare(asking, [e for e in mini_examples("addition", 40) if e.kind == "conflict"])
    if cached:
        cache_prefixes(asking, [both])
    n = len(both.examples_N)
    batch = with_option(both, torch.arange(n) % 2)
    assert len(set(batch.length_R.tolist())) > 1

    def two(asking: Asking, batch: Batch) -> torch.Tensor:
        return log_probabilities(asking, batch).gather(1, batch.option_R[:, None])[:, 0]

    found = []
    for read, start in ((two, None), (only_log_probability, both.ids_NT.shape[1] - 1)):
        shift_ND = torch.randn(n, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        plain_N = read(asking, batch)
        with shifted(asking.model, {layer: shift_ND}, "block", "decision", start=start):
            logp_N = read(asking, batch)
        found.append((plain_N, logp_N, torch.autograd.grad(logp_N.sum(), shift_ND)[0]))
    assert not torch.allclose(found[0][0], found[0][1], atol=0.1)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_tokenizer_needs_no_pad_token(mini: Callable[[str], Asking]) -> None:
    asking = mini("addition")
    examples = mini_examples("addition", 40)
    batch = asking.padded([e.prompt for e in examples])
    theirs = asking.tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True, padding_side="left")
    assert torch.equal(batch.input_ids, theirs.input_ids)
    assert torch.equal(batch.attention_mask, theirs.attention_mask)
    without = copy.deepcopy(asking.tokenizer)
    without.pad_token = None
    bare = replace(asking, tokenizer=without)
    assert decode(bare, examples) == decode(asking, examples)
    assert label(bare, examples).behaviour_N.tolist() == label(asking, examples).behaviour_N.tolist()


def test_contrasted_decoding_is_what_a_loop_over_tokens_gives(mini: Callable[[str], Asking]) -> None:
    asking = mini("addition")
    examples = [e for e in mini_examples("addition", 80) if e.kind == "conflict"]
    others = [
        replace(example, prompt=other.prompt)
        for example, other in zip(examples, examples[1:] + examples[:1], strict=True)
    ]
    # No weight is the prompt itself, minus one the other prompt.
    for weight, alone in ((0.0, examples), (-1.0, others)):
        (found,), wanted = score_contrasted(asking, examples, others, [weight]), label(asking, alone)
        assert found.behaviour_N.tolist() == wanted.behaviour_N.tolist()
        np.testing.assert_allclose(found.margin_N, wanted.margin_N, atol=1e-3)
    _, found = score_contrasted(replace(asking, batch_size=7), examples, others, [0.1, 0.7])
    for example, other, behaviour in zip(examples[:25], others, found.behaviour_N, strict=False):
        ids = [asking.tokenizer(e.prompt, return_tensors="pt").input_ids for e in (example, other)]
        answer: list[int] = []
        while len(answer) < 12 and (not answer or answer[-1] not in asking.boundary_ids()):
            tail = torch.tensor([answer], dtype=torch.long)
            mine, theirs = (asking.model(torch.cat([i, tail], dim=1)).logits[0, -1] for i in ids)
            answer.append(int((1.7 * mine - 0.7 * theirs).argmax()))
        said = asking.tokenizer.decode(answer[:-1]).strip()
        texts = {"memorized": example.memorized, "generalized": example.generalized}
        plain = {b: asking.tokenizer.decode(asking.tokenizer(t).input_ids).strip() for b, t in texts.items()}
        assert behaviour == next((b for b, text in plain.items() if text == said), "other")


def test_batches_are_smaller_where_memory_is_short(
    mini: Callable[[str], Asking], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asking, examples = mini("inference"), mini_examples("inference", 60)
    (whole,) = prepare(asking, examples)
    assert not caplog.records
    tokens = whole.ids_NT.shape[1]
    each = bytes_of_prompt(asking.model, tokens, 2)
    config = asking.model.config
    assert each > 4 * tokens * 6 * config.n_layer * config.n_embd  # keys and values, and copies of them
    monkeypatch.setattr("mnemoscope.models.room.free_bytes", lambda device: 20 * each)
    fewer = prepare(asking, examples)
    assert [len(batch.examples_N) for batch in fewer] == [10] * 6  # half of what is free
    prepare(asking, examples)
    (said,) = caplog.records
    assert f"pairs.batch_size: {asking.batch_size} prompts of {tokens} tokens" in said.message
    assert said.message.endswith("10 at a time")
    assert score(asking, fewer).behaviour_N.tolist() == score(asking, [whole]).behaviour_N.tolist()
    monkeypatch.setattr("mnemoscope.models.room.free_bytes", lambda device: 1)
    assert len(prepare(asking, examples[:3])) == 3  # one at a time, however little there is
    monkeypatch.setattr("mnemoscope.models.room.free_bytes", lambda device: None)
    assert len(prepare(asking, examples)) == 1


def test_somebody_says_how_much_memory_is_free() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert free_bytes(torch.device("meta")) is None
