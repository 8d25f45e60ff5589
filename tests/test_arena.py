"""Interventions of the arena against plain transformers: formulas token by token, hooks by hand, edited weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arena_lists import greedy, ids_of, labels_by, plainly
from little_facts import LittleFacts
from mnemoscope.behaviour import prepare, score
from mnemoscope.bench.answers import NOTHING, Neutral, is_exact, scores
from mnemoscope.bench.lists import DrawnBench
from mnemoscope.bench.varied import _both
from mnemoscope.interventions import OPPOSITE, Intervention, Quoted, SteeringVector, Toward, edited
from mnemoscope.interventions.adapter import Adapter
from mnemoscope.interventions.controls import has_equal_norm, of_equal_norm
from mnemoscope.interventions.descent import log_p
from mnemoscope.interventions.methods import candidates
from mnemoscope.interventions.methods.cad import ContextAware
from mnemoscope.interventions.shifts import norm_of
from mnemoscope.interventions.words import Place, Words
from mnemoscope.models import blocks_of, core_of, heads_of
from mnemoscope.rivals import adacad, caa, dpo, ircan, iti, knob, reft
from mnemoscope.rivals.coiecd import Constrained
from mnemoscope.rivals.heads import Ranked, factors_of
from mnemoscope.rivals.juice import TwoRuns
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Example


@contextmanager
def by_hand(module: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A hook of plain torch on the input of a module."""
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("toward", OPPOSITE)
@pytest.mark.parametrize("method", ["cad", "adacad", "coiecd"])
def test_joined_passes_decode_as_a_plain_loop_of_two_passes_does(
    bench: DrawnBench, fitted: dict[tuple[str, Toward], Intervention], method: str, toward: Toward
) -> None:
    one, asking, prompts = fitted[method, toward], bench.asking, bench.test["conflict"]
    assert one.passes == 2
    assert one.contrast

    def answer(n: int) -> list[int]:
        prompt, bare = (ids_of(asking, e.prompt) for e in (prompts.examples[n], prompts.bares[n]))  # type: ignore[union-attr]

        def next_logits(ids: list[int]) -> Tensor:
            behind = ids[len(prompt) :]
            both = (plainly(asking.model, ids)[-1], plainly(asking.model, bare + behind)[-1])
            return one.join(*(logits_V[None, None] for logits_V in both))[0, 0]

        return greedy(asking, prompt, next_logits)

    assert scores(one, prompts).behaviour_N.tolist() == labels_by(asking, prompts, answer)


def two_distributions() -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    logits = [torch.from_numpy(3 * rng.standard_normal((3, 2, 9))).float() for _ in range(2)]
    p, q = (np.exp(x.double().numpy()) / np.exp(x.double().numpy()).sum(-1, keepdims=True) for x in logits)
    return p, q, *logits


def test_contrast_is_its_formula() -> None:
    p, q, prompt, bare = two_distributions()
    for toward, (first, other) in (("generalized", (p, q)), ("memorized", (q, p))):
        wanted = 1.75 * np.log(first) - 0.75 * np.log(other)
        found = ContextAware(toward=toward, weight=0.75).join(prompt, bare).log_softmax(-1).double().numpy()  # type: ignore[arg-type]
        np.testing.assert_allclose(found, wanted - np.log(np.exp(wanted).sum(-1, keepdims=True)), atol=1e-5)
    half = ContextAware(toward="generalized", weight=0.75).scaled(0.5).join(prompt, bare)
    torch.testing.assert_close(half, ContextAware(toward="generalized", weight=0.375).join(prompt, bare))


def test_adaptive_contrast_is_its_formula_token_by_token() -> None:
    p, q, prompt, bare = two_distributions()
    weights = adacad.divergence(prompt, bare).numpy()
    found = adacad.Adaptive(toward="generalized").join(prompt, bare).log_softmax(-1).double().numpy()
    for n, m in np.ndindex(3, 2):
        one, two = p[n, m], q[n, m]
        middle = (one + two) / 2
        weight = sum(float((x * np.log(x / middle)).sum()) for x in (one, two)) / 2
        assert weights[n, m] == pytest.approx(weight, abs=1e-5)
        wanted = (1 + weight) * np.log(one) - weight * np.log(two)
        np.testing.assert_allclose(found[n, m], wanted - np.log(np.exp(wanted).sum()), atol=1e-5)
    assert float(adacad.divergence(prompt, prompt).abs().max()) < 1e-6
    apart = torch.tensor([[[40.0, 0.0]]])
    assert float(adacad.divergence(apart, apart.flip(-1))) == pytest.approx(math.log(2), abs=1e-5)


def test_the_entropy_band_is_its_formula_token_by_token() -> None:
    p, q, prompt, bare = two_distributions()
    band, weight = 0.25, 0.5
    found = Constrained(toward="generalized", band=band, weight=weight).join(prompt, bare).double().numpy()
    outside = 0
    for n, m in np.ndindex(3, 2):
        one, two = p[n, m], q[n, m]
        entropy = -float((two * np.log(two)).sum())
        information = np.exp(-np.log(one) - entropy)
        share = information / information.sum()
        below, above = share < share.min() / band, share > share.max() * band
        below &= below.sum() != 1
        base = np.where(below | above, np.log(one), np.log(two))
        outside += int((below | above).sum())
        np.testing.assert_allclose(found[n, m], base + weight * (np.log(one) - np.log(two)), atol=1e-4)
    assert 0 < outside < found.size


def test_shifted_heads_are_hooks_on_the_output_projection(bench: DrawnBench) -> None:
    model, prompts = bench.asking.model, bench.test["conflict"]
    one = iti.candidates(bench, "generalized")[-1]
    sources = bench.sources("head")
    heads, width = heads_of(model, 0)
    states = sources.states_P2LD.reshape(len(sources.states_P2LD), 2, -1, heads, width).astype(np.float64)
    rank = iti.accuracies(states, [pair.group for pair, _ in bench.pairs])
    chosen = np.argsort(-rank.ravel(), kind="stable")[: one.setting["heads"]]
    shifts = np.zeros((rank.size, width))
    for place in chosen:
        layer, head = divmod(int(place), heads)
        sides = states[:, :, layer, head]
        unit = sides[:, 0].mean(0) - sides[:, 1].mean(0)
        unit /= np.linalg.norm(unit)
        shifts[place] = one.setting["factor"] * (sides.reshape(-1, width) @ unit).std() * unit
    ids = ids_of(bench.asking, prompts.examples[0].prompt)
    with one.apply(model):
        ours = plainly(model, ids)[-1]
    # By hand: each layer's shift is added to what its output projection reads, at the last column.
    shift_LD = torch.from_numpy(shifts.reshape(len(rank), -1)).float()
    handles = [
        block.attn.c_proj.register_forward_pre_hook(partial(_added_at_the_end, shift_LD[layer]))
        for layer, block in enumerate(blocks_of(model))
    ]
    theirs = plainly(model, ids)[-1]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, plainly(model, ids)[-1], rtol=1e-3, atol=1e-3)


def _added_at_the_end(shift_D: Tensor, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states = args[0].clone()
    states[:, -1] += shift_D
    return (states, *args[1:])


def test_heads_of_a_first_run_are_added_in_the_second(bench: DrawnBench) -> None:
    """By hand: what output projections read in a plain run is added, scaled, from the prompt's last token on."""
    model, asking, prompts = bench.asking.model, bench.asking, bench.test["conflict"]
    factors = factors_of(model, Ranked([(0, 1), (1, 2)], [(2, 0), (1, 0)]), 2, 3.0, 1.0)
    assert factors[1].view(4, 16)[:, 0].tolist() == [-1.0, 0.0, 3.0, 0.0]

    def answer(n: int) -> list[int]:
        prompt = ids_of(asking, prompts.examples[n].prompt)
        return greedy(asking, prompt, lambda ids: _second_run(model, ids, factors, len(prompt) - 1)[-1])

    one = TwoRuns(toward="memorized", factors=factors)
    few = prompts.of(np.arange(6))
    assert scores(one, few).behaviour_N.tolist() == labels_by(asking, few, answer)
    ids = ids_of(asking, few.examples[0].prompt)
    with one.apply(model):
        ours = plainly(model, ids)[-1]
    torch.testing.assert_close(ours, _second_run(model, ids, factors, len(ids) - 1)[-1], rtol=1e-4, atol=1e-4)


def _second_run(model: Any, ids: list[int], factors: dict[int, Tensor], start: int) -> Tensor:
    given: dict[int, Tensor] = {}
    projections = {layer: blocks_of(model)[layer].attn.c_proj for layer in factors}

    def keep(layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        given[layer] = args[0].clone()

    handles = [p.register_forward_pre_hook(partial(keep, layer)) for layer, p in projections.items()]
    plainly(model, ids)
    for handle in handles:
        handle.remove()

    def add(layer: int, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0].clone()
        states[:, start:] += factors[layer] * given[layer][:, start:]
        return (states, *args[1:])

    handles = [p.register_forward_pre_hook(partial(add, layer)) for layer, p in projections.items()]
    logits = plainly(model, ids)
    for handle in handles:
        handle.remove()
    return logits


def test_scaled_neurons_are_scaled_columns_of_the_down_projection(bench: DrawnBench) -> None:
    model, ids = bench.asking.model, ids_of(bench.asking, bench.test["conflict"].examples[0].prompt)
    neurons = ircan.common_neurons(bench, "generalized")[:4]
    width = blocks_of(model)[0].mlp.c_proj.weight.shape[0]
    with ircan.scaled(neurons, 3.0, width, "generalized", {}).apply(model):
        ours = plainly(model, ids)
    projections = {layer: blocks_of(model)[layer].mlp.c_proj for layer, _ in neurons}
    before = {layer: module.weight.detach().clone() for layer, module in projections.items()}
    for layer, neuron in neurons:
        projections[layer].weight.data[neuron] *= 3.0  # GPT-2's weight is transposed
    theirs = plainly(model, ids)
    for layer, module in projections.items():
        module.weight.data.copy_(before[layer])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = plainly(model, ids)
    with ircan.scaled(neurons, 1.0, width, "generalized", {}).apply(model):
        assert torch.equal(plainly(model, ids), plain)


def test_attributions_add_up_to_the_change_along_the_path(bench: DrawnBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completeness: the integrals of a layer add up to p(wanted) at its one end minus that at its other end."""
    monkeypatch.setattr(ircan, "STEPS", 64)  # however steeply p rises somewhere along the path
    asking, prompts = bench.asking, bench.fit_conflicts
    found_NLD = ircan.attributions(bench, "generalized")
    example = ircan.spread_groups(prompts.examples)[0]
    bare = prompts.bares[prompts.examples.index(example)]
    assert bare is not None
    ids, layer = ids_of(asking, example.prompt), 1
    projection, given = blocks_of(asking.model)[layer].mlp.c_proj, list[Tensor]()
    handle = projection.register_forward_pre_hook(lambda _, args: given.append(args[0][0, -1].clone()))
    plainly(asking.model, ids_of(asking, bare.prompt))
    handle.remove()
    wanted = ids_of(asking, example.prompt + str(example.generalized))[len(ids)]

    def patch(states: Tensor) -> Tensor:
        return torch.cat([states[:, :-1], given[0][None, None]], dim=1)

    with by_hand(projection, patch):
        at_bare = float(plainly(asking.model, ids)[-1].softmax(-1)[wanted])
    with_text = float(plainly(asking.model, ids)[-1].softmax(-1)[wanted])
    assert found_NLD[0, layer].sum() == pytest.approx(with_text - at_bare, abs=0.02)


def test_caa_is_the_mean_difference_at_the_last_token_of_either_answer(bench: DrawnBench) -> None:
    asking, states = bench.asking, {"generalized": [], "memorized": []}  # type: ignore[var-annotated]
    for example in bench.fit_conflicts.examples:
        for side, found in states.items():
            ids = torch.tensor([ids_of(asking, example.prompt + str(getattr(example, side)))])
            with torch.no_grad():
                found.append(asking.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1].double())
    wanted = torch.stack(states["generalized"]).mean(0) - torch.stack(states["memorized"]).mean(0)
    np.testing.assert_allclose(caa.differences(bench)[1], wanted.numpy(), atol=1e-4)


def test_a_learned_knob_changes_more_answers_than_the_one_it_starts_from(bench: DrawnBench) -> None:
    """Loss of the interchange that it is learned by, at the layer in the middle, against the mean difference."""
    states_P2D = torch.from_numpy(bench.sources("block").states_P2LD[:, :, 1]).float()
    start_D = (states_P2D[:, 0] - states_P2D[:, 1]).mean(0)

    def loss(knob_D: Tensor) -> float:
        found = []
        for batch, donor_ND, option_N in knob._interchanges(bench, states_P2D):
            edits = {1: knob.exchanged(knob_D, knob.coordinate(donor_ND, knob_D))}
            applied = partial(edited, bench.asking.model, edits, "block", "decision")
            with torch.no_grad():
                found.append(float(log_p(bench.asking, applied, batch, option_N).mean()))
        return -float(np.mean(found))

    longer = replace(bench, config=bench.config.model_copy(update={"steps": 40}))
    assert loss(knob.learned(longer, 1)) < loss(start_D / start_D.norm())


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
    tried = {one.contrast for one in candidates("cad", bench, "generalized")}
    assert tried == {"bare", "cut"}


def test_a_text_with_both_answers_says_the_other_one_last_and_nothing_else_changes() -> None:
    example = Example("i", "p", "conflict", "g", "f", "test", memorized=" lead", generalized=" him")
    text = "Anna: A whimsical man, him who reads him.\n"
    assert _both(text, example) == f"{text.rstrip()} Anna: A whimsical man, him who reads lead."
    assert _both("A whimsical man.", example) is None


def test_every_conflict_has_a_bare_question_that_is_answered_by_heart(bench: DrawnBench) -> None:
    for lists in (bench.tune, bench.test, bench.fit):
        bares = [bare for bare in lists["conflict"].bares if bare]
        assert len(bares) == len(lists["conflict"])
        assert set(score(bench.asking, prepare(bench.asking, bares)).behaviour_N) == {"memorized"}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses an old name of the library
def test_an_adapter_is_what_peft_makes_of_it(bench: DrawnBench) -> None:
    """The same adapter, applied by peft alone."""
    peft = pytest.importorskip("peft")
    from copy import deepcopy

    model, ids = bench.asking.model, ids_of(bench.asking, bench.test["conflict"].examples[0].prompt)
    described = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(deepcopy(model), described)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    theirs = plainly(adapted, ids)
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    adapter = {n: (m.lora_A["default"].weight.data, 2 * m.lora_B["default"].weight.data) for n, m in layers.items()}
    before = {name: parameter for name, parameter in model.named_parameters()}
    plain = plainly(model, ids)
    one = Adapter(toward="generalized", parts=adapter)
    with one.apply(model):
        torch.testing.assert_close(plainly(model, ids), theirs, atol=1e-4, rtol=1e-4)
    half = deepcopy(model).bfloat16()  # a change that is too small for the weights of bfloat16 is not lost
    small = {name: (down, up * 1e-3) for name, (down, up) in adapter.items()}
    inputs: dict[str, Tensor] = {}
    name = next(name for name in small if name.endswith("c_fc"))
    module = core_of(half).get_submodule(name)
    with by_hand(module, lambda x: inputs.setdefault("x", x)):
        before_half = {}
        handle = module.register_forward_hook(lambda _, args, output: before_half.setdefault("y", output))
        with Adapter(toward="generalized", parts={name: small[name]}, strength=4.0).apply(half):
            after: dict[str, Tensor] = {}
            last = module.register_forward_hook(lambda _, args, output: after.setdefault("y", output))
            plainly(half, ids)
        handle.remove()
        last.remove()
    down, up = small[name]
    wanted = before_half["y"] + 4 * (inputs["x"].float() @ down.T @ up.T)
    assert not torch.equal(after["y"], before_half["y"])
    assert (after["y"] == wanted.bfloat16()).float().mean() > 0.99  # some lie between two numbers of bfloat16
    with one.scaled(0.0).apply(model):
        assert torch.equal(plainly(model, ids), plain)
    assert torch.equal(plainly(model, ids), plain)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("method", ["lora", "dpo"])
def test_training_an_adapter_leaves_the_model_as_it_was(bench: DrawnBench, method: str) -> None:
    model = bench.asking.model
    before = {
        name: (parameter.detach().clone(), parameter.requires_grad) for name, parameter in model.named_parameters()
    }
    modules = [type(module) for module in model.modules()]
    candidates(method, bench, "memorized")
    assert [type(module) for module in model.modules()] == modules
    assert not hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_a_low_rank_edit_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 8), (4, 8), (4,)))
    rotation = reft.orthonormal(torch.randn(4, 8, generator=generator))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), atol=1e-5, rtol=0)
    edit = reft.low_rank(rotation, weight, bias)
    found = h + edit.added(h)
    for n, t in np.ndindex(2, 3):
        wanted = h[n, t] + rotation.T @ (weight @ h[n, t] + bias - rotation @ h[n, t])
        torch.testing.assert_close(found[n, t], wanted, atol=1e-5, rtol=1e-5)
    # Inside the subspace the state is W h + b, outside of it nothing moves.
    torch.testing.assert_close(found @ rotation.T, h @ weight.T + bias, atol=1e-5, rtol=1e-5)
    assert torch.equal(h + (edit * 0.0).added(h), h)


def test_a_knob_set_to_its_own_value_changes_nothing(bench: DrawnBench) -> None:
    model, ids = bench.asking.model, ids_of(bench.asking, bench.test["conflict"].examples[0].prompt)
    knob_D = knob.learned(bench, 1)
    assert float(knob_D.norm()) == pytest.approx(1.0, abs=1e-5)
    states_NTD = torch.randn(2, 3, len(knob_D), generator=torch.Generator().manual_seed(0))
    own_N = knob.coordinate(states_NTD, knob_D)[:, 0]
    assert torch.equal(knob.exchanged(knob_D, own_N)(states_NTD), states_NTD)
    set_to = states_NTD + knob.held(knob_D, 2.5).added(states_NTD)
    torch.testing.assert_close(set_to @ knob_D, torch.full((2, 3), 2.5), atol=1e-4, rtol=0)
    plain = plainly(model, ids)
    with SteeringVector("generalized", {1: knob.held(knob_D, 5.0)}).apply(model):
        assert not torch.allclose(plainly(model, ids), plain)


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


def test_exact_match_is_of_the_first_line_in_its_normal_form() -> None:
    assert is_exact(" Paris.\nQuestion", " paris")
    assert is_exact("the Hague", "Hague")
    assert not is_exact(" Paris is", " Paris")
    assert not is_exact("", " Paris")


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


def test_what_a_method_cannot_take_is_one_line(bench: DrawnBench) -> None:
    without = DrawnBench.of(bench.asking, LittleFacts(bares=False), bench.config)
    for method in ("cad", "adacad", "coiecd", "ircan"):
        with pytest.raises(InputError, match="has no bare question"):
            candidates(method, without, "generalized")
    with pytest.raises(InputError, match="methods: 'other' is not one of cad, gradient"):
        candidates("other", bench, "generalized")
    assert replace(bench).has_bares


def test_preference_is_its_formula(bench: DrawnBench) -> None:
    """An adapter that starts as the model itself: nothing is preferred more than before, whichever answer is wanted."""
    from copy import deepcopy

    from mnemoscope.config import LoraConfig
    from mnemoscope.models import adapt

    adapted = adapt(deepcopy(bench.asking.model), LoraConfig(rank=2), 0)
    asking = replace(bench.lists.asking, model=adapted)
    batch = bench.lists.conflicts["generalized"][0]
    wanted = torch.arange(len(batch.examples_N)) % 2
    assert dpo.preference(asking)(batch, wanted).item() == pytest.approx(2 / dpo.BETA * math.log(2), abs=1e-4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    losses = []
    for number, n in enumerate(batch.examples_N.tolist()):
        example, changes = bench.fit_conflicts.examples[n], []
        for answer in (example.memorized, example.generalized):
            ids, prompt = ids_of(asking, example.prompt + str(answer)), ids_of(asking, example.prompt)
            rows = [plainly(one, ids).log_softmax(-1) for one in (adapted, bench.asking.model)]
            sums = [sum(float(row[t - 1, ids[t]]) for t in range(len(prompt), len(ids))) for row in rows]
            changes.append(sums[0] - sums[1])
        other, chosen = changes if wanted[number] else changes[::-1]
        losses.append(2 / dpo.BETA * math.log1p(math.exp(-dpo.BETA * (chosen - other))))
    assert dpo.preference(asking)(batch, wanted).item() == pytest.approx(np.mean(losses), abs=1e-3)
