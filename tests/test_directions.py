"""Directions: the gradient against finite differences, and the choice of a setting by what exceeds its control."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from helpers import label, mini_examples
from mnemoscope.behaviour import Asking, cache_prefixes, prepare
from mnemoscope.contrast import Contrast, ContrastAccumulator
from mnemoscope.directions import (
    METHODS,
    TOWARD,
    Setting,
    Sources,
    _worst_control,
    choose,
    margin_gradient,
    shift_rate,
    steered,
)
from mnemoscope.models import SITES
from mnemoscope.steering import SteeringVector


@pytest.fixture
def asking(mini: Callable[[str], Asking]) -> Asking:
    return mini("addition")


def conflicts(n: int) -> list:
    return [e for e in mini_examples("addition", 4 * n) if e.kind == "conflict"][:n]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("cached", [False, True])
def test_the_margin_gradient_equals_finite_differences(asking: Asking, site: str, cached: bool) -> None:
    examples = conflicts(12)
    batches = prepare(asking, examples)
    if cached:
        cache_prefixes(asking, batches)
    width = 256 if site == "neuron" else 64
    gradient_LD = margin_gradient(asking, batches, site, width)  # type: ignore[arg-type]
    assert gradient_LD.shape == (2, width)
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


def sources_of(asking: Asking, examples: list) -> Sources:
    scores = label(asking, examples, capture="block")
    states_NLD = scores.states_NLD
    assert states_NLD is not None
    half = len(examples) // 2
    accumulator = ContrastAccumulator.empty("block", 2, 64, permutations=99, seed=0)
    accumulator.add(states_NLD[:half], states_NLD[half : 2 * half], [e.group for e in examples[:half]])
    return Sources(accumulator.result(), margin_gradient(asking, prepare(asking, examples), "block", 64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top", [0.25, 1.0])
def test_every_method_turns_both_ways_and_keeps_its_share_of_neurons(asking: Asking, method: str, top: float) -> None:
    sources = sources_of(asking, conflicts(40))
    forth, back = (Setting(d, method, top, 0.2).vector(sources) for d in TOWARD)
    assert (forth.toward, back.toward) == ("generalized", "memorized")
    assert (forth + back).layers == []
    assert (forth.dense(2, 64) != 0).sum() <= np.ceil(top * 128)
    relative_L = np.linalg.norm(forth.dense(2, 64), axis=1) / sources.contrast.state_norm_L
    if method == "nmd-relative":
        np.testing.assert_allclose(relative_L, 0.2, rtol=1e-5)
    if method == "gradient":
        assert np.linalg.norm(relative_L) == pytest.approx(0.2, rel=1e-5)


def test_the_gradient_moves_the_margin_where_it_points(asking: Asking) -> None:
    examples = conflicts(60)
    sources = sources_of(asking, examples)
    before = label(asking, examples).margin_N.mean()
    for direction, sign in (("to_generalized", 1), ("to_memorized", -1)):
        vector = Setting(direction, "gradient", 1.0, 0.1).vector(sources)
        after = steered(asking, prepare(asking, examples), vector).margin_N.mean()
        assert sign * (after - before) > 1.0


def test_the_setting_is_chosen_that_exceeds_its_control(asking: Asking) -> None:
    """Against every setting held against its controls one by one; the limit bounds what a control may do."""
    examples = conflicts(60)
    sources = sources_of(asking, examples)
    batches = prepare(asking, examples)
    settings = [Setting("to_generalized", "gradient", 0.5, strength) for strength in (0.01, 0.2, 50.0)]
    rated = [(s, shift_rate(steered(asking, batches, s.vector(sources)), "to_generalized")) for s in settings]
    chosen, margin = choose(asking, batches, sources, rated, draws=3, control_limit=1.0)
    by_hand = {s: rate - _worst_control(asking, batches, sources, s, 3, (0,)) for s, rate in rated}
    assert margin == max(by_hand.values())
    assert by_hand[chosen] == margin
    limited, _ = choose(asking, batches, sources, rated, draws=3, control_limit=0.02)
    assert _worst_control(asking, batches, sources, limited, 3, (0,)) <= 0.02


def test_contrast_and_gradient_have_the_shape_of_the_model(asking: Asking) -> None:
    sources = sources_of(asking, conflicts(20))
    assert isinstance(sources.contrast, Contrast)
    assert sources.gradient_LD.shape == sources.contrast.nmd_LD.shape == (2, 64)
