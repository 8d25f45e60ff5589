"""Sweeps: prompts read once, with cached prefixes and replayed blocks, give what whole passes give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from families import WORDS, tiny, tokenizer
from helpers import mini_examples, shifted_by_hand
from mnemoscope.behaviour import (
    Asking,
    Batch,
    Scores,
    cache_prefixes,
    log_probabilities,
    only_log_probability,
    prepare,
    read_only_options,
    score,
    score_read,
    with_options,
)
from mnemoscope.interventions import SteeringVector, edited
from mnemoscope.models import blocks_of
from mnemoscope.tasks import Example


def vector_on(layers: list[int], width: int, site: str = "block", scale: float = 1.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(1)
    shifts = {layer: scale * torch.randn(width, generator=generator) for layer in layers}
    return SteeringVector("generalized", shifts, site=site)  # type: ignore[arg-type]


@pytest.mark.parametrize("margins", [True, False])
def test_no_cell_of_a_sweep_leaves_a_trace_in_the_next(mini: Callable[[str], Asking], margins: bool) -> None:
    asking, examples = mini("addition"), mini_examples("addition", 200)
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
        with edited(asking.model, shifts, "block"):
            logp_N2 = log_probabilities(asking, batches[0])
        if disturbed:
            score(asking, batches, applied=lambda: vector_on([0, 1], 64).apply(asking.model))
        gradients.append(torch.autograd.grad((logp_N2[:, 1] - logp_N2[:, 0]).sum(), list(shifts.values())))
    for whole, prefixed, disturbed_D in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, prefixed, rtol=1e-3, atol=1e-3)
        assert torch.equal(prefixed, disturbed_D)


def random_asking(family: str) -> Asking:
    """A random model whose answers are closed by two words of three."""
    return Asking(tiny(family), tokenizer(), tuple(WORDS[::3] + WORDS[1::3]), batch_size=16)


@torch.no_grad()
def shifted_logits(asking: Asking, vector: SteeringVector, ids: list[int], start: int) -> torch.Tensor:
    """One row without padding or cache, shifted by hand from the decision position on."""
    with shifted_by_hand(asking.model, vector.shifts, start):
        return asking.model(torch.tensor([ids]), use_cache=False).logits[0].double()


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
        prompt = [int(x) for x in rng.integers(3, 64, rng.integers(2, 9))]
        answer: list[int] = []
        for _ in range(rng.integers(1, longest + 1)):
            answer.append(int(shifted_logits(asking, vector, prompt + answer, len(prompt) - 1)[-1].argmax()))
        if rng.random() < 0.2:
            answer = [int(rng.integers(3, 64))]
        other = [3 + (answer[0] - 2) % 61, *(int(x) for x in rng.integers(3, 64, rng.integers(0, longest)))]
        texts = [" ".join(asking.tokenizer.convert_ids_to_tokens(x)) for x in (prompt, answer, other)]
        flipped = texts[2:0:-1] if rng.random() < 0.5 else texts[1:]
        if not {0, 1, 2} & {*answer, *other}:
            examples.append(Example(str(number), texts[0], "conflict", "g", "f", "test", *flipped))
    return examples


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize(("layers", "longest"), [([], 3), ([0, 1, 2], 1), ([1], 3), ([2], 1)])
def test_a_sweep_on_any_architecture_equals_plain_single_passes(family: str, layers: list[int], longest: int) -> None:
    asking = random_asking(family)
    vector = vector_on(layers, 32, scale=0.02)  # about as large as the states of these models
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

        def read(_: Batch, single: Batch) -> torch.Tensor:
            with vector.apply(asking.model, start=single.ids_NT.shape[1] - 1):
                return read_only_options(asking.model, single, closed=True)

        by_logits = score_read(asking, reading, read)
        assert (by_logits.behaviour_N == np.array(wanted, dtype=object))[~by_logits.tie_N].all()
        np.testing.assert_allclose(by_logits.margin_N, margins, atol=1e-4)


def test_a_cell_runs_only_the_blocks_above_its_first_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = random_asking("gpt2")
    batches = prepare(asking, greedy_examples(asking, vector_on([], 32), 1)[:16])
    cache_prefixes(asking, batches)
    kind = type(blocks_of(asking.model)[0])
    runs, forward = [], kind.forward

    def counting(block: torch.nn.Module, *args: object, **kwargs: object) -> object:
        runs.append(block)
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    for vector, blocks_run in (
        (vector_on([0, 1, 2], 32), [1, 2]),
        (vector_on([1], 32), [2]),
        (vector_on([1], 32, "attention"), [1, 2]),
        (vector_on([2], 32), []),
    ):
        runs.clear()
        score(asking, batches, applied=lambda v=vector: v.apply(asking.model))  # type: ignore[misc]
        assert {asking.model.transformer.h[n] for n in blocks_run} == set(runs)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_only_option_has_the_probability_that_it_has_beside_the_other(
    mini: Callable[[str], Asking], cached: bool, layer: int
) -> None:
    """In one pass as in two, with and without a shift for each prompt, whose gradient is the same too."""
    asking = mini("addition")
    (both,) = prepare(asking, [e for e in mini_examples("addition", 40) if e.kind == "conflict"])
    if cached:
        cache_prefixes(asking, [both])
    n = len(both.examples_N)
    option_N = torch.arange(n) % 2
    batch = with_options(both, option_N[None])
    assert batch.option_R.tolist() == option_N.tolist()
    assert len(set(batch.length_R.tolist())) > 1
    assert log_probabilities(asking, batch).gather(1, 1 - option_N[:, None]).isnan().all()

    def of(prepared: Batch) -> Callable[[], torch.Tensor]:
        return lambda: log_probabilities(asking, prepared).gather(1, option_N[:, None])[:, 0]

    def only() -> torch.Tensor:
        return only_log_probability(asking, batch)

    found = []
    for read, start in ((of(both), None), (of(batch), None), (only, both.ids_NT.shape[1] - 1)):
        shift_ND = torch.randn(n, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        plain_N = read()
        # Block 0 is not run again where its output is known.
        with edited(asking.model, {layer: shift_ND}, "block", start=start):
            logp_N = read()
        found.append((plain_N, logp_N, torch.autograd.grad(logp_N.sum(), shift_ND)[0]))
    assert not torch.allclose(found[0][0], found[0][1], atol=0.1)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, atol=1e-4, rtol=1e-4)
