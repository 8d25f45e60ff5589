"""Directions: every method at its norm, gradients against finite differences, controls, and the choice of a setting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import GivenBench, label, mini_examples, vector_of
from mnemoscope.behaviour import Asking, log_probabilities, only_log_probability, prepare, with_options, with_suffixes
from mnemoscope.bench.answers import steered
from mnemoscope.bench.choose import COST, STANDING_IN, Rated, Rule, Tuned, choose, in_order, rate
from mnemoscope.bench.lists import Lists
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import SteeringVector, Toward
from mnemoscope.interventions.controls import CONTROLS, DRAWN, SHUFFLED, control_draws
from mnemoscope.interventions.learning import wanted_batches
from mnemoscope.interventions.methods import low_rank, nmd
from mnemoscope.interventions.methods.learned import learned_together
from mnemoscope.interventions.shifts import rho
from mnemoscope.interventions.sources import ANSWERED, TAUGHT, FitLists, Labels, Tried, margin_gradients, with_prefixes
from mnemoscope.statistics import Estimate, proportion
from mnemoscope.tasks import Example, build_task

METHODS = ("nmd", "standardized-nmd", "gradient", "logistic", "whitened", "pca", "learned")


@pytest.fixture
def asking(mini: Callable[[str], Asking]) -> Asking:
    return mini("addition")


def conflicts(n: int) -> list[Example]:
    return [e for e in mini_examples("addition", 6 * n) if e.kind == "conflict"][:n]


@pytest.fixture
def bench(asking: Asking) -> GivenBench:
    return bench_of(asking)


def stored(example: Example) -> str:
    """The prompt in the order in which its code was learned, which a teacher reads."""
    operands = example.prompt.rstrip("=").split("+")
    return "+".join(operands[::-1] if example.family == "swapped" else operands) + "="


def bench_of(asking: Asking, steps: int = 20, positions: str = "decision") -> GivenBench:
    """Conflicts, whichever way they are answered; pairs are two different conflicts."""
    examples = conflicts(60)
    lists = {"generalized": with_prefixes(asking, examples[:40]), "memorized": with_prefixes(asking, examples[20:])}
    kept = {t: with_prefixes(asking, [e for e in mini_examples("addition", 60) if e.kind == "novel"]) for t in lists}
    pairs = list(zip(examples[:30], examples[30:], strict=True))
    names = {"generalized": [e.item for e in examples[:40]], "memorized": [e.item for e in examples[20:]]}
    items = {toward: (mine, mine) for toward, mine in names.items()}
    bare = [replace(e, prompt=stored(e)) for e in examples[20:]]
    found = FitLists(asking, lists, lists, kept, steps=steps, items=items, bare=(bare, bare), low_rank_steps=steps)  # type: ignore[arg-type]
    tried = Tried(positions=positions)  # type: ignore[arg-type]
    return GivenBench(asking, build_task("addition", {}, 0), 0, tried, given=found, both=pairs)


@pytest.mark.parametrize(("site", "cached"), [("block", False), ("attention", True), ("mlp", False), ("neuron", True)])
def test_the_margin_gradient_equals_finite_differences(asking: Asking, site: str, cached: bool) -> None:
    examples = conflicts(12)
    (batch,) = with_prefixes(asking, examples) if cached else prepare(asking, examples)
    width = 256 if site == "neuron" else 64
    gradient_LD = margin_gradients(asking, batch, site, (2, width)).mean(0)  # type: ignore[arg-type]
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        vector = SteeringVector("generalized", {layer: direction}, site=site)  # type: ignore[arg-type]
        step = 2e-3
        up, down = (
            label(asking, examples, applied=lambda v=vector, a=a: v.apply(asking.model, alpha=a)).margin_N.mean()
            for a in (step, -step)
        )
        expected = (up - down) / (2 * step)
        assert float(gradient_LD[layer] @ direction.numpy()) == pytest.approx(expected, rel=0.03, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_norm_layers_and_neurons(asking: Asking, bench: GivenBench, method: str) -> None:
    """And gives the same numbers beside shuffles, in whatever order, as when it is called alone."""
    for top, layers in ((0.25, (0, 1)), (1.0, (1,))):
        vector = vector_of(bench, method, top=top, layers=layers)
        shift_LD = vector.dense(2, 64)
        assert set(vector.layers) <= set(layers)
        assert 0 < (shift_LD != 0).sum() <= np.ceil(top * 64 * len(layers))
        assert np.linalg.norm(shift_LD / bench.sources("block").norm_L[:, None]) == pytest.approx(0.2, rel=1e-5)
        if method != "learned":
            assert (vector + vector_of(bench, method, Toward.MEMORIZED, top=top, layers=layers)).layers == []
    vector_of(bench, method, Toward.MEMORIZED, Labels(5), top=0.5)
    kept, alone = (vector_of(one, method, Toward.MEMORIZED, top=0.5) for one in (bench, bench_of(asking)))
    np.testing.assert_array_equal(kept.dense(2, 64), alone.dense(2, 64))


def test_nmd_is_the_papers_shift(bench: GivenBench) -> None:
    """alpha * sign(rho) * |NMD| on the neurons with the highest |rho|, against a loop over neurons."""
    states = bench.sources("block").states_P2LD.astype(np.float64)
    generalized_PLD, memorized_PLD = states[:, 0], states[:, 1]
    labels_N = np.repeat([1.0, -1.0], len(generalized_PLD))
    expected_LD, rho_LD = np.zeros((2, 64)), np.zeros((2, 64))
    for layer, neuron in np.ndindex(2, 64):
        states_N = np.concatenate([generalized_PLD[:, layer, neuron], memorized_PLD[:, layer, neuron]])
        rho_LD[layer, neuron] = np.corrcoef(states_N, labels_N)[0, 1]
        difference = generalized_PLD[:, layer, neuron].mean() - memorized_PLD[:, layer, neuron].mean()
        expected_LD[layer, neuron] = np.sign(rho_LD[layer, neuron]) * abs(difference)
    expected_LD[np.abs(rho_LD) < np.sort(np.abs(rho_LD), axis=None)[-32]] = 0
    found = vector_of(bench, "nmd", top=0.25)
    np.testing.assert_allclose(found.dense(2, 64), nmd.alpha(bench, found) * expected_LD, rtol=1e-4, atol=1e-9)


def test_a_shift_of_all_tokens_is_fitted_and_judged_on_all_tokens(asking: Asking) -> None:
    examples, vector = conflicts(60), vector_of(bench_of(asking, positions="all"), "learned", strength=0.1)
    assert vector.positions == "all"
    # Prefixes that were cached without the shift must not be read on from.
    cached, whole = (
        steered(asking, batches, vector) for batches in (with_prefixes(asking, examples), prepare(asking, examples))
    )
    by_hand = label(asking, examples, applied=lambda: vector.apply(asking.model))
    for found in (cached, whole):
        np.testing.assert_allclose(found.margin_N, by_hand.margin_N, atol=1e-4)
    assert (cached.margin_N - label(asking, examples).margin_N).mean() > 0


@pytest.mark.parametrize("method", ["nmd", "gradient", "whitened", "learned"])
def test_in_spreads_massive_neurons_carry_nothing_and_set_no_size(bench: GivenBench, method: str) -> None:
    bench.sources("block").states_P2LD[:, :, 1, 5] *= 400.0  # as large models have them
    sources, vector = bench.sources("block", "spread"), vector_of(bench, method, unit="spread")
    shift_LD = vector.dense(2, 64).astype(np.float64)
    assert shift_LD[1, 5] == 0
    spread_LD = sources.states_P2LD.std(axis=(0, 1), dtype=np.float64)
    others_LD = np.delete(shift_LD, 5, axis=1) / np.delete(spread_LD, 5, axis=1)
    squares_L = (shift_LD[0] / spread_LD[0]) ** 2 @ np.ones(64) / 64, (others_LD[1] ** 2).sum() / 63
    assert np.sqrt(sum(squares_L)) == pytest.approx(0.2, rel=1e-4)
    for name in ("random_sign", "gaussian"):
        ((_, drawn),) = control_draws(name, bench, vector, 1, (0,))
        drawn_LD = drawn.dense(2, 64).astype(np.float64)
        assert drawn_LD[1, 5] == 0
        norms = [np.linalg.norm(sources.relative(one_LD), axis=1) for one_LD in (shift_LD, drawn_LD)]
        np.testing.assert_allclose(*norms, rtol=1e-4)


# --- controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_keep_each_layers_norm(bench: GivenBench, name: str) -> None:
    method = "learned" if name in TAUGHT else "nmd"
    vector = vector_of(bench, method, top=0.3)
    original, drawn = vector.dense(2, 64), dict(control_draws(name, bench, vector, 6, (0,)))
    first, second = (drawn[number].dense(2, 64) for number in (0, 1))
    assert list(drawn) == list(range(6))
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), np.linalg.norm(original, axis=1), rtol=1e-5)
    if name in ("random_neurons", "low_correlation"):
        np.testing.assert_allclose(np.sort(np.abs(first)), np.sort(np.abs(original)), rtol=1e-6)
    if name == "random_sign":
        np.testing.assert_allclose(np.abs(first), np.abs(original), rtol=1e-6)
    if name == "low_correlation":
        for layer, rank_D in enumerate(np.abs(rho(bench, "block"))):
            used = first[layer] != 0
            assert rank_D[used].max() <= rank_D[~used].min()
    ((_, alone),) = control_draws(name, bench, vector, 1, (0,))  # whatever number is drawn
    np.testing.assert_array_equal(alone.dense(2, 64), first)
    everything = list(control_draws(name, bench, vector_of(bench, method), 2, (0,)))
    assert len(everything) == (0 if name in ("random_neurons", "low_correlation") else 2)
    if name not in DRAWN:
        other = vector_of(bench, "nmd" if method == "learned" else "learned")
        assert list(control_draws(name, bench, other, 2, (0,))) == []


def test_half_of_the_labels_swap(bench: GivenBench) -> None:
    """So that the mean difference itself is not left over with a random sign."""
    sources, shuffled = bench.sources("block"), Labels(3)
    assert shuffled.signs(30).sum() == 0
    assert (ANSWERED.signs(30) == 1).all()
    assert not np.array_equal(shuffled.signs(30), Labels(4).signs(30))
    differences_PLD, moments = sources.differences_PLD(shuffled), sources.moments(shuffled)
    np.testing.assert_array_equal(np.abs(differences_PLD), np.abs(sources.differences_PLD()))
    np.testing.assert_allclose(moments.nmd_LD, differences_PLD.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.state_norm_L, sources.norm_L)


def test_shuffled_labels_ask_both_sides_equally_often(asking: Asking) -> None:
    """Asked mostly of one side, either answer in half of the cases would still teach to leave that side."""
    small, examples = replace(asking, batch_size=8), conflicts(60)
    many, few = with_prefixes(small, examples[:48]), with_prefixes(small, examples[48:])
    lists = {"generalized": many, "memorized": few}
    found = FitLists(small, lists, lists, {})  # type: ignore[arg-type]
    asked = list(wanted_batches(found, Toward.GENERALIZED, Labels(0)))
    assert np.mean([any(one.batch is batch for batch in few) for one in asked]) == 0.5
    assert all(abs(int((2 * one.option_N - 1).sum())) <= 1 for one in asked)
    assert len(list(wanted_batches(found, Toward.GENERALIZED, ANSWERED))) == 2 * len(many)


def test_permuted_answers_are_those_of_other_items_and_neither_of_ones_own(asking: Asking) -> None:
    lists = bench_of(replace(asking, batch_size=8)).lists
    examples, found = {example.item: example for example in conflicts(60)}, lists.permuted(3)
    assert found
    texts = {item: asking.tokenizer.decode(tokens).strip() for item, tokens in found.items()}
    memorized, sums = (
        {str(getattr(e, side)).strip() for e in examples.values()} for side in ("memorized", "generalized")
    )
    for item, text in texts.items():
        assert text in memorized | sums
        assert text not in [option.strip() for option in examples[item].options]
    assert abs(2 * sum(text in memorized for text in texts.values()) - len(texts)) <= 1
    assert found != lists.permuted(4)
    asked = list(wanted_batches(lists, Toward.GENERALIZED, Labels(3, permuted=True)))
    given = [tokens for one in asked for tokens in one.instead or ()]
    assert len(given) == 4 * 40, "both sides, or it would teach to leave one"
    assert {tuple(tokens) for tokens in given} == {tuple(tokens) for tokens in found.values()}
    first = conflicts(1)[0]
    two = [replace(e, memorized=first.memorized, generalized=first.generalized) for e in conflicts(8)]
    alone = FitLists(asking, {"generalized": prepare(asking, two)}, {"generalized": []}, {})  # type: ignore[arg-type]
    assert not replace(alone, items={"generalized": ([e.item for e in two], [])}).can_permute(), (
        "without a third answer"
    )


@pytest.mark.parametrize("cached", [False, True])
def test_what_a_permuted_answer_is_worth_is_its_own_log_probability(asking: Asking, cached: bool) -> None:
    """Against plain examples that have it as their only answer."""
    examples = conflicts(6)
    texts = [example.memorized or "" for example in (*examples[1:], examples[0])]
    (batch,) = with_prefixes(asking, examples) if cached else prepare(asking, examples)
    order = batch.examples_N.tolist()
    tokens = [asking.tokenizer(texts[i], add_special_tokens=False).input_ids for i in order]
    given = with_suffixes(with_options(batch, torch.zeros(1, 6, dtype=torch.long)), tokens)
    plain = {"kind": "memory", "memorized": None, "generalized": None}
    with torch.no_grad():
        alone = [prepare(asking, [replace(examples[i], answer=texts[i], **plain)])[0] for i in order]
        expected = torch.stack([log_probabilities(asking, one)[0, 0] for one in alone])
        np.testing.assert_allclose(only_log_probability(asking, given).numpy(), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(("site", "positions"), [("block", "decision"), ("mlp", "all"), ("neuron", "decision")])
def test_what_is_learned_together_is_what_is_learned_alone(asking: Asking, site: str, positions: str) -> None:
    sources = bench_of(replace(asking, batch_size=16), 6).sources(site)  # type: ignore[arg-type]
    for permuted in (False, True):
        fits = [(strength, Labels(seed, permuted)) for seed in range(2) for strength in (0.3, 0.1)]
        together = learned_together(sources, Toward.MEMORIZED, (1,), positions, fits)  # type: ignore[arg-type]
        for fit, found_LD in zip(fits, together, strict=True):
            (alone_LD,) = learned_together(sources, Toward.MEMORIZED, (1,), positions, [fit])  # type: ignore[arg-type]
            assert np.linalg.norm(alone_LD[1]) > 0
            assert not alone_LD[0].any()
            np.testing.assert_allclose(found_LD, alone_LD, atol=1e-4 * np.abs(alone_LD).max())
        assert not np.allclose(together[0], together[2], rtol=0.1)


# --- low-rank shifts --------------------------------------------------------------------------------------------------


def low_rank_of(bench: GivenBench, labels: Labels = ANSWERED) -> SteeringVector:
    learned = low_rank._vector(bench, Toward.MEMORIZED, low_rank.How((0, 1), 4, low_rank.RATES[0], "own"), labels)
    return replace(learned, setting={"layers": [0, 1]})


@pytest.mark.parametrize("taught", [True, False])
def test_a_low_rank_shift_learns_from_a_teacher_and_from_the_wanted_answer(asking: Asking, taught: bool) -> None:
    """On the examples that it was taught."""
    bench = bench_of(replace(asking, batch_size=16), 60)
    bench = bench if taught else replace(bench, given=replace(bench.given, bare=None))
    vector, examples = low_rank_of(bench), conflicts(60)[20:]
    assert vector.positions == "all"
    was_N, is_N = (steered(asking, prepare(asking, examples), one).margin_N for one in (vector * 0.0, vector))
    assert is_N.mean() < was_N.mean(), "towards the memorized answers"
    assert all(parameter.grad is None for parameter in asking.model.parameters())
    half, _, whole, *_ = low_rank.candidates(bench, Toward.MEMORIZED)
    assert isinstance(half, SteeringVector)
    assert isinstance(whole, SteeringVector)
    assert (half.strength, whole.strength) == (0.5, 1.0)
    for layer, edit in whole.low_rank.items():
        torch.testing.assert_close(half.low_rank[layer].write_KD, edit.write_KD / 2)
    shuffled = low_rank_of(bench, Labels(1))  # its teacher would know the answers
    assert not torch.allclose(vector.low_rank[1].write_KD, shuffled.low_rank[1].write_KD, atol=1e-3)


@pytest.mark.parametrize("name", ["random_sign", "gaussian", *TAUGHT])
def test_controls_of_a_low_rank_shift_write_as_much_in_units_of_spread(asking: Asking, name: str) -> None:
    """Gaussian ones move every state as far; those that choose neurons do not exist."""
    bench = bench_of(replace(asking, batch_size=16), 5)
    vector, sources = low_rank_of(bench), bench.sources("block")

    def norm(one: SteeringVector) -> float:
        rows = (e.write_KD.numpy() / sources.spread_LD[layer] for layer, e in one.low_rank.items())
        return float(np.sqrt(sum((row_KD**2).sum() for row_KD in rows)))

    first, second = (drawn for _, drawn in control_draws(name, bench, vector, 2, (0,)))
    assert norm(first) == pytest.approx(norm(vector), rel=1e-4)
    assert not torch.equal(first.low_rank[1].write_KD, second.low_rank[1].write_KD)
    for layer, edit in vector.low_rank.items() if name == "gaussian" else ():
        states_ND = torch.from_numpy(sources.states_P2LD[:, :, layer]).flatten(0, 1)
        spread_D = torch.from_numpy(sources.spread_LD[layer])
        wanted_ND, found_ND = (one.added(states_ND).double() / spread_D for one in (edit, first.low_rank[layer]))
        torch.testing.assert_close(found_ND.norm(dim=1), wanted_ND.norm(dim=1), rtol=1e-3, atol=1e-6)
        assert torch.cosine_similarity(found_ND, wanted_ND).abs().mean() < 0.6
    for other in ("random_neurons", "low_correlation", "shuffled_labels"):
        assert list(control_draws(other, bench, vector, 2, (0,))) == []


# --- the choice of a setting ------------------------------------------------------------------------------------------


def lists_of(asking: Asking, targets: list[Example]) -> Lists:
    right = [e for e in mini_examples("addition", 60) if e.kind == "novel"]
    labels = label(asking, right).behaviour_N
    right = [e for e, found in zip(right, labels, strict=True) if found == "correct"]
    kept = Prompts(asking, right, [None] * len(right))
    return Lists(Prompts(asking, targets, [None] * len(targets)), {"novel": (kept, "correct")})


def test_the_setting_is_chosen_that_gains_most_beyond_its_losses_and_controls(
    asking: Asking, bench: GivenBench
) -> None:
    """Against every setting held against its losses and controls one by one."""
    lists = lists_of(asking, conflicts(60))
    vectors = [vector_of(bench, "gradient", top=0.5, strength=strength) for strength in (0.01, 0.2, 2.0)]
    rated = [rate(one, lists.targets, place) for place, one in enumerate(vectors)]

    def worth_of(one: Rated, rule: Rule) -> float:
        assert isinstance(one.one, SteeringVector)
        worst = 0.0
        for name in (*STANDING_IN, SHUFFLED):
            draws = rule.refits if name == SHUFFLED else rule.draws
            drawn = control_draws(name, bench, one.one, draws, (0,)) if draws else ()
            hits = [(steered(asking, lists.targets.batches, v).behaviour_N == "generalized").mean() for _, v in drawn]
            worst = max([worst, *([float(np.mean(hits))] if hits else [])])
        prompts, _ = lists.kept["novel"]
        lost = (steered(asking, prompts.batches, one.one).behaviour_N != "correct").mean()
        return one.wanted.estimate - lost - COST * min(worst, rule.control) - rule.excess * max(0, worst - rule.control)

    for control, excess in ((1.0, 2.0), (0.0, 2.0), (0.0, 0.5), (0.02, 6.0)):
        rule = Rule(control=control, excess=excess, draws=3, refits=2)
        expected = [worth_of(one, rule) for one in rated]
        found = choose(bench, lists, rated, rule)
        assert [tuned.worth for tuned in found] == pytest.approx([expected[tuned.rated.place] for tuned in found])
        leading = max(found, key=lambda tuned: tuned.worth)
        assert leading.worth == pytest.approx(max(expected)), "what was left out had lost"
        near = [n for n, worth in enumerate(expected) if worth >= leading.worth - leading.rated.wanted.error]
        assert found[0].rated.place == min(near), "of a near tie the weakest shift"
        assert choose(bench, lists, rated, replace(rule, errors=0.0))[0].rated.place == int(np.argmax(expected))


def tuned(method: str, worth: float, *, kept: bool = True, strength: float = 0.3, error: float = 0.05) -> Tuned:
    """A choice whose rate has this standard error."""
    wanted = Estimate(0.5, 0.5 - 1.959964 * error, 0.5 + 1.959964 * error, 100, 50)
    one = SteeringVector("generalized", {}, strength=strength, method=method)
    return Tuned(Rated(one, wanted, Estimate.undefined()), 0.0, kept, 0.0, worth, kept)


def test_a_near_tie_is_decided_by_a_stated_order() -> None:
    """What tune cannot tell apart may be ordered otherwise by rounding: then the choice must not move."""
    learnt, mean, weak = tuned("learned", 0.80), tuned("nmd", 0.84), tuned("learned", 0.79, strength=0.1)
    assert in_order([mean, learnt]) == in_order([learnt, mean]) == [learnt, mean]
    assert in_order([learnt, mean, weak])[0] == weak, "of one method the weakest shift"
    assert in_order([tuned("learned", 0.78), mean])[0] == mean, "more than a standard error behind"
    for moved in (-0.003, 0.003):
        assert in_order([tuned("learned", 0.82 + moved), tuned("nmd", 0.82)])[0].one.method == "learned"
    harmful = tuned("learned", 0.84, kept=False)
    assert in_order([harmful, mean]) == [mean, harmful]
    unknown = replace(mean.rated.wanted, low=math.nan, high=math.nan, groups=3)
    untold = replace(mean, rated=replace(mean.rated, wanted=unknown))
    assert in_order([untold, tuned("learned", 0.1)])[0].one.method == "learned", "too few groups tell nothing"


@pytest.mark.parametrize(("answered_neither", "kept"), [(2, True), (8, False)])
def test_a_limit_counts_where_it_is_surely_broken(
    asking: Asking, bench: GivenBench, answered_neither: int, kept: bool
) -> None:
    lists, hits = lists_of(asking, conflicts(40)), np.arange(8) < answered_neither
    one = vector_of(bench, "gradient", top=0.5)
    neither = proportion(hits, np.arange(8))
    assert neither.estimate > 0.12
    (found,) = choose(bench, lists, [Rated(one, proportion(~hits, np.arange(8)), neither)], Rule(neither=0.12))
    assert found.kept == kept
