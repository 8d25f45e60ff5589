"""Known answers: what every method must find, and must not, in a model whose switch was set by hand.

Shapes: N states, P pairs, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from helpers import GivenBench, vector_of
from known_switch import (
    CODE,
    FILLER,
    GATHERS,
    LAYERS,
    READERS,
    READS,
    SWITCH,
    VERDICT,
    VOTES,
    Decider,
    KnownSwitch,
    known_model,
)
from mnemoscope.behaviour import Batch, PairBatch, Scores, draw_candidates, mine_pairs, score
from mnemoscope.bench.answers import steered
from mnemoscope.interventions import Held, SteeringVector, Toward, edited
from mnemoscope.interventions.controls import control_draws
from mnemoscope.interventions.sources import ANSWERED, FitLists, Labels, with_prefixes
from mnemoscope.models import SITES, Site
from mnemoscope.statistics.contrast import Contrast, ContrastAccumulator
from mnemoscope.tasks import SPLITS, Split, draw

SIDES = tuple(Toward)  # of a pair, in this order
PAIRS = 200  # fitted on
WHAT_DIFFERS = ("nmd", "standardized-nmd", "logistic", "whitened", "pca")
METHODS = (*WHAT_DIFFERS, "gradient", "learned")  # the last two ask what acts, the others what differs
# What tells the behaviours apart at each site: neurons by layer. Elsewhere nothing does.
TELLS: dict[Site, dict[int, np.ndarray]] = {
    "block": {GATHERS: SWITCH, READS: np.concatenate([SWITCH, VERDICT])},
    "attention": {GATHERS: SWITCH},
    "mlp": {READS: VERDICT},
    "neuron": {READS: READERS},
}


class Known(NamedTuple):
    """Where the whole switch of a model is, at one site."""

    decider: Decider
    layer: int
    neurons: np.ndarray
    vote: float  # how far one vote moves these neurons, as a norm


KNOWN: dict[Site, Known] = {
    "block": Known("switch", GATHERS, SWITCH, 2.0),
    "attention": Known("switch", GATHERS, SWITCH, 2.0),
    "mlp": Known("verdict", READS, VERDICT, 2**0.5),
    "neuron": Known("verdict", READS, READERS, 8**0.5),
}


model_of = cache(known_model)


@cache
def mined(split: Split, candidates: int) -> PairBatch:
    task, rng = KnownSwitch(), np.random.default_rng(SPLITS.index(split))
    drawn = draw_candidates(task, draw(task, rng, candidates, "conflict", split), rng)
    (batch,) = mine_pairs(model_of("switch"), drawn, chunk=candidates)
    return batch


@cache
def sides(split: Split, decider: Decider) -> dict[Toward, list[Batch]]:
    """200 fit pairs or 100 test pairs, by the behaviour of their phrasings; row n of both is one pair."""
    pairs = mined("fit", 500).pairs()[:PAIRS] if split == "fit" else mined(split, 250).pairs()[:100]
    asking = model_of(decider)
    return {toward: with_prefixes(asking, [p[i] for p in pairs]) for i, toward in enumerate(SIDES)}


@cache
def bench_at(decider: Decider) -> GivenBench:
    fit = sides("fit", decider)
    targets: dict[Toward, list[Batch]] = {"generalized": fit["memorized"], "memorized": fit["generalized"]}
    nothing: dict[Toward, list[Batch]] = {"generalized": [], "memorized": []}
    lists = FitLists(model_of(decider), targets, nothing, nothing)
    return GivenBench(lists.asking, KnownSwitch(), 0, given=lists, both=mined("fit", 500).pairs()[:PAIRS])


def fit_groups() -> list[str]:
    return [pair[0].group for pair in mined("fit", 500).pairs()[:PAIRS]]


def states_at(site: Site) -> np.ndarray:
    return bench_at(KNOWN[site].decider).sources(site).states_P2LD


def vector(
    site: Site, method: str, toward: Toward = Toward.GENERALIZED, layer: int | None = None, labels: Labels = ANSWERED
) -> SteeringVector:
    """As many neurons as the switch has, moved so far that they outvote the largest majority."""
    known = KNOWN[site]
    bench = bench_at(known.decider)
    sources = bench.sources(site)
    strength = (VOTES + 2) * known.vote / sources.norm_L[known.layer]
    top = len(known.neurons) / sources.shape_LD[1]
    return vector_of(bench, method, toward, labels, site=site, layers=(known.layer,), top=top, strength=strength)


def found(one: SteeringVector) -> list[int]:
    (shift_D,) = one.shifts.values()
    return np.flatnonzero(shift_D.numpy()).tolist()


def shift_rate(one: SteeringVector) -> float:
    """Share of the test phrasings that a vector steers."""
    decider = KNOWN[one.site].decider
    batches = sides("test", decider)[one.toward.opposite]
    return share_of(steered(model_of(decider), batches, one), one.toward)


def share_of(scores: Scores, behaviour: str) -> float:
    return float(np.mean(scores.behaviour_N == behaviour))


def scores_of(decider: Decider, side: Toward, **options: Any) -> Scores:
    """What the model does with one side of the test pairs."""
    return score(model_of(decider), sides("test", decider)[side], **options)


def idle(site: Site) -> np.ndarray:
    """As many neurons as the switch has, that vary between phrasings and do nothing."""
    neurons = np.setdiff1d(np.arange(256), READERS) if site == "neuron" else FILLER
    return neurons[:: len(neurons) // 4][: len(KNOWN[site].neurons)]


def told_at(site: Site) -> np.ndarray:
    """Where the behaviours differ, bool (L, D)."""
    told_LD = np.zeros((LAYERS, 256 if site == "neuron" else 64), bool)
    for layer, neurons in TELLS[site].items():
        told_LD[layer, neurons] = True
    return told_LD


def contrast_of(site: Site, states_P2LD: np.ndarray, groups: Sequence[str]) -> Contrast:
    accumulator = ContrastAccumulator.empty(site, *states_P2LD.shape[2:], permutations=999)
    accumulator.add(states_P2LD[:, 0], states_P2LD[:, 1], groups)
    return accumulator.result()


def test_the_majority_decides_in_every_model() -> None:
    """The premise of all the others: votes alone make the behaviour, 4 nats each, whatever the head reads it from."""
    batch = mined("fit", 500)
    for scores, place in ((batch.scores_a, 0), (batch.scores_b, 1)):
        words_N = [pair[place].prompt.split() for pair in batch.candidates]
        votes_N = np.array([sum(2 * (int(w[3:]) % 2) - 1 for w in ws if w.startswith("fit")) for ws in words_N])
        np.testing.assert_array_equal(scores.behaviour_N, np.where(votes_N > 0, "generalized", "memorized"))
        np.testing.assert_allclose(scores.margin_N, 4 * votes_N, atol=1e-3)
        assert not scores.tie_N.any()
    assert 0.4 < batch.is_pair_N.mean() < 0.6
    assert all(share_of(scores_of("verdict", side), side) == 1.0 for side in SIDES)


@pytest.mark.parametrize("site", SITES)
def test_the_contrast_knows_layer_and_neurons_at_every_site(site: Site) -> None:
    told_LD = told_at(site)
    contrast = contrast_of(site, states_at(site), fit_groups())
    np.testing.assert_array_equal(contrast.p_family_wise_LD == 1 / 1000, told_LD)
    np.testing.assert_array_equal(contrast.top_neurons(told_LD.mean()), told_LD)
    if site == "block":
        assert not contrast.nmd_LD[:, CODE].any()  # both phrasings ask for the same answers


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_switch_and_steers_by_it(site: Site, method: str) -> None:
    known = KNOWN[site]
    bench = bench_at(known.decider)
    for toward in Toward:
        one = vector(site, method, toward)
        assert found(one) == sorted(known.neurons)
        assert shift_rate(one) >= 0.95
        shift_LD = one.dense(*bench.sources(site).shape_LD)
        elsewhere_LD = np.zeros_like(shift_LD)
        elsewhere_LD[:, idle(site)] = shift_LD[:, known.neurons]
        assert shift_rate(one.with_dense(elsewhere_LD)) == 0.0
        rates = [shift_rate(drawn) for _, drawn in control_draws("gaussian", bench, one, 10, (0,))]
    assert np.mean(rates) <= 0.15


def ablated_scores(site: Site, decider: Decider, layer: int, neurons: np.ndarray) -> list[Scores]:
    """Both sides of the test pairs with some neurons held at their mean over the fit pairs."""
    asking, fit = model_of(decider), sides("fit", decider)
    mean_LD = np.mean([score(asking, fit[side], capture=site).states_NLD for side in SIDES], axis=(0, 1))
    chosen_D = torch.zeros(mean_LD.shape[1])
    chosen_D[neurons] = 1.0
    held = Held(torch.from_numpy(mean_LD[layer]), chosen_D)
    applied = partial(edited, asking.model, {layer: held}, site)
    return [scores_of(decider, side, applied=applied) for side in SIDES]


@pytest.mark.parametrize("site", SITES)
def test_without_the_switch_there_is_no_choice_and_without_others_all_of_it(site: Site) -> None:
    known = KNOWN[site]
    before = [scores_of(known.decider, side) for side in SIDES]
    assert (before[0].margin_N - before[1].margin_N).min() > 7.9  # one vote against one: twice 4 nats
    generalized, memorized = ablated_scores(site, known.decider, known.layer, known.neurons)
    np.testing.assert_allclose(generalized.margin_N, memorized.margin_N, atol=1e-3)
    np.testing.assert_array_equal(generalized.behaviour_N, memorized.behaviour_N)
    for left, scores in zip(ablated_scores(site, known.decider, known.layer, idle(site)), before, strict=True):
        np.testing.assert_allclose(left.margin_N, scores.margin_N, atol=1e-3)
        np.testing.assert_array_equal(left.behaviour_N, scores.behaviour_N)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("decider", ["switch", "verdict"])
def test_a_patch_flips_every_pair_where_the_switch_passes_and_none_elsewhere(decider: Decider, site: Site) -> None:
    passes: dict[Site, list[int]] = {"block": [GATHERS, READS], "attention": [GATHERS], "mlp": [], "neuron": []}
    if decider == "verdict":
        passes |= {"mlp": [READS], "neuron": [READS]}
    model = model_of(decider).model
    states = {side: scores_of(decider, side, capture=site).states_NLD for side in SIDES}
    for layer in range(LAYERS):
        for side, donor in zip(SIDES, reversed(SIDES), strict=True):
            held = Held(torch.from_numpy(states[donor][:, layer])[:, None], torch.ones(1))
            scores = scores_of(decider, side, applied=partial(edited, model, {layer: held}, site, "once"))
            assert share_of(scores, donor) == (1.0 if layer in passes[site] else 0.0)


def test_shuffled_labels_find_nothing() -> None:
    """Significance keeps its level, and no method names the switch but the one that has no use for labels.

    The switch still comes up somewhat more often than by chance: the pairs were chosen for being on its two sides.
    """
    alarms, named = 0, dict.fromkeys(WHAT_DIFFERS, 0)
    read_P2LD = states_at("block")
    for seed in range(10):
        labels = Labels(seed)
        swapped_P = labels.signs(PAIRS)[:, None, None, None] < 0
        states_P2LD = np.where(swapped_P, read_P2LD[:, ::-1], read_P2LD)
        alarms += (contrast_of("block", states_P2LD, fit_groups()).p_family_wise_LD < 0.05).any()
        for method in WHAT_DIFFERS:
            named[method] += len({*found(vector("block", method, labels=labels))} & {*SWITCH})
    assert alarms <= 3  # at the level of 0.05 more have a probability of 0.1 %
    everywhere = 10 * len(SWITCH)
    assert named.pop("pca") == everywhere
    assert max(named.values()) < everywhere / 4  # 4 of the 48 neurons that vary would be 1 / 12
