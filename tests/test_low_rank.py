"""Low-rank shifts: learned from the wanted answer and from the model's own, and beside their controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import GivenBench, mini_examples
from mnemoscope.behaviour import Asking, prepare
from mnemoscope.bench.answers import steered
from mnemoscope.interventions import LowRank, SteeringVector
from mnemoscope.interventions.controls import control_draws
from mnemoscope.interventions.methods import low_rank
from mnemoscope.interventions.sources import ANSWERED, FitLists, Labels, with_prefixes
from mnemoscope.tasks import Example, build_task


@pytest.fixture
def asking(mini: Callable[[str], Asking]) -> Asking:
    return replace(mini("addition"), batch_size=16)


def of_family(*families: str, n: int = 40) -> list[Example]:
    found = [e for e in mini_examples("addition", 600) if e.kind == "conflict" and e.family in families]
    return found[:n]


def bench_of(asking: Asking, steps: int, bare: Sequence[Example] | None = None) -> tuple[GivenBench, list[Example]]:
    """Swapped sums, which the model adds up, to be answered with their codes; a teacher's prompts beside them."""
    swapped = of_family("swapped")
    plain = [replace(e, prompt="+".join(reversed(e.prompt.rstrip("=").split("+"))) + "=") for e in swapped]
    batches = with_prefixes(asking, swapped)
    both, items = {"memorized": batches, "generalized": batches}, [e.item for e in swapped]
    novel = with_prefixes(asking, [e for e in mini_examples("addition", 60) if e.kind == "novel"])
    found = FitLists(asking, both, both, {"memorized": novel, "generalized": novel}, low_rank_steps=steps)  # type: ignore[arg-type]
    found = replace(found, items={"memorized": (items, items), "generalized": (items, items)})
    if bare is None:
        found = replace(found, bare=(plain, plain))
    pairs = list(zip(plain[:20], swapped[:20], strict=True))
    task = build_task("addition", {}, 0)
    return GivenBench(asking, task, 0, given=found, both=pairs), swapped


def vector_of(bench: GivenBench, labels: Labels = ANSWERED) -> SteeringVector:
    found = low_rank._vector(bench, "memorized", (0, 1), labels)
    return replace(found, setting={"layers": [0, 1]})


@pytest.mark.parametrize("bare", [None, ()])
def test_a_low_rank_shift_learns_from_a_teacher_and_from_the_wanted_answer(
    asking: Asking, bare: Sequence[Example] | None
) -> None:
    """On the examples that it was taught: a teacher that reads the stored order knows their codes."""
    bench, swapped = bench_of(asking, 150, bare)
    vector = vector_of(bench)
    nothing = vector * 0.0
    assert vector.positions == "all"
    novel = [e for e in mini_examples("addition", 60) if e.kind == "novel"]  # taught to stay
    for examples, wanted in ((swapped, "memorized"), (novel, "correct")):
        batches = prepare(asking, examples)
        was_N, is_N = (steered(asking, batches, one).behaviour_N == wanted for one in (nothing, vector))
        assert is_N[was_N == (wanted == "correct")].mean() > 0.3
    assert all(parameter.grad is None for parameter in asking.model.parameters())


def test_factors_scale_what_was_learned_once(asking: Asking) -> None:
    half, *_, whole = low_rank.candidates(bench_of(asking, 5)[0], "memorized")
    assert isinstance(half, SteeringVector)
    assert isinstance(whole, SteeringVector)
    assert (half.strength, whole.strength) == (0.5, 1.0)
    for layer, edit in whole.low_rank.items():
        torch.testing.assert_close(half.low_rank[layer].write_KD, edit.write_KD / 2)
        torch.testing.assert_close(half.low_rank[layer].read_KD, edit.read_KD)


@pytest.mark.parametrize("name", ["random_sign", "gaussian", "indifference", "permuted_answers"])
def test_controls_write_as_much_in_units_of_spread(asking: Asking, name: str) -> None:
    bench = bench_of(asking, 5)[0]
    vector, spread_LD = vector_of(bench), bench.sources("block").spread_LD

    def norm(low_rank: dict[int, LowRank]) -> float:
        return float(
            np.sqrt(sum(((e.write_KD.numpy() / spread_LD[layer]) ** 2).sum() for layer, e in low_rank.items()))
        )

    first, second = (dict(drawn.low_rank) for _, drawn in control_draws(name, bench, vector, 2, (0,)))
    assert norm(first) == pytest.approx(norm(dict(vector.low_rank)), rel=1e-4)
    assert not torch.equal(first[1].write_KD, second[1].write_KD)
    again = dict(control_draws(name, bench, vector, 1, (0,)))
    torch.testing.assert_close(again[0].low_rank[1].write_KD, first[1].write_KD, rtol=1e-3, atol=1e-4)


def test_gaussian_controls_move_every_state_as_far_in_units_of_spread(asking: Asking) -> None:
    bench = bench_of(asking, 5)[0]
    sources, vector = bench.sources("block"), vector_of(bench)
    states_P2LD = torch.from_numpy(sources.states_P2LD)
    (_, drawn), *_ = control_draws("gaussian", bench, vector, 1, (0,))
    for layer, edit in vector.low_rank.items():
        spread_D = torch.from_numpy(sources.spread_LD[layer])
        states_ND = states_P2LD[:, :, layer].flatten(0, 1).float()
        wanted_ND, found_ND = (one.added(states_ND).double() / spread_D for one in (edit, drawn.low_rank[layer]))
        assert wanted_ND.norm(dim=1).min() > 0
        torch.testing.assert_close(found_ND.norm(dim=1), wanted_ND.norm(dim=1), rtol=1e-3, atol=1e-6)
        assert torch.cosine_similarity(found_ND, wanted_ND).abs().mean() < 0.6


def test_controls_that_choose_neurons_do_not_exist(asking: Asking) -> None:
    bench = bench_of(asking, 3)[0]
    vector = vector_of(bench)
    for name in ("random_neurons", "low_correlation", "shuffled_labels"):
        assert list(control_draws(name, bench, vector, 2, (0,))) == []


def test_labels_of_a_shuffle_are_not_taught_by_the_model(asking: Asking) -> None:
    """Its teacher would know the answers."""
    bench = bench_of(asking, 5)[0]
    answered, shuffled = (vector_of(bench, labels) for labels in (ANSWERED, Labels(1)))
    assert not torch.allclose(answered.low_rank[1].write_KD, shuffled.low_rank[1].write_KD, atol=1e-3)
