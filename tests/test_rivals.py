"""Methods against plain transformers: formulas token by token, hooks by hand, edited weights."""

from __future__ import annotations

import math
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from arena_lists import greedy, ids_of, labels_by, plainly
from families import FAMILIES, prompts, tiny, tokenizer
from little_facts import LittleFacts
from mnemoscope.behaviour import Asking, Prompting
from mnemoscope.bench.answers import scores
from mnemoscope.bench.lists import DrawnBench
from mnemoscope.bench.prompts import Prompts
from mnemoscope.config import LoraConfig
from mnemoscope.interventions import Intervention, LowRank, SteeringVector, Toward
from mnemoscope.interventions.adapter import Adapter
from mnemoscope.interventions.decoding import Decoding
from mnemoscope.interventions.learning import Asked
from mnemoscope.interventions.methods import candidates
from mnemoscope.models import adapt, blocks_of, cache_of, core_of, heads_of, pass_inputs
from mnemoscope.rivals import adacad, attend, caa, coiecd, dpo, few_shot, grd, ircan, iti, knob, nwcad, reft
from mnemoscope.runs.errors import InputError


def ids_one(bench: DrawnBench) -> list[int]:
    return ids_of(bench.asking, bench.test["conflict"].examples[0].prompt)


@pytest.mark.parametrize(
    ("method", "toward"),
    [
        *(("cad", "generalized"), ("cad-bare", "memorized"), ("adacad", "memorized"), ("coiecd", "memorized")),
        *(("grd", "generalized"), ("nwcad", "memorized")),
    ],
)
def test_joined_passes_decode_as_a_plain_loop_of_two_passes_does(
    bench: DrawnBench, fitted: dict[tuple[str, Toward], Intervention], method: str, toward: Toward
) -> None:
    one, asking, prompts = fitted[method, toward], bench.asking, bench.test["conflict"]
    assert one.contrast is not None
    contrast = prompts.contrast(one.contrast)

    def answer(n: int) -> list[int]:
        prompt, bare = (ids_of(asking, e.prompt) for e in (prompts.examples[n], contrast[n]))

        def next_logits(ids: list[int]) -> Tensor:
            both = (plainly(asking.model, ids)[-1], plainly(asking.model, bare + ids[len(prompt) :])[-1])
            return one.join(*(logits_V[None, None] for logits_V in both))[0, 0]

        return greedy(asking, prompt, next_logits)

    assert scores(one, prompts).behaviour_N.tolist() == labels_by(asking, prompts, answer)


def test_rules_of_decoding_are_their_formulas_token_by_token() -> None:
    rng, band, weight = np.random.default_rng(0), 0.25, 0.5
    prompt, bare = (torch.from_numpy(3 * rng.standard_normal((6, 4, 9))).float() for _ in range(2))
    p, q = (logits.double().softmax(-1).numpy() for logits in (prompt, bare))

    def of(toward: Toward, alpha: float = 1.0) -> Tensor:
        one = Decoding(toward=toward, method="cad", setting={"weight": 0.75, "contrast": "bare"})
        return one.scaled(alpha).join(prompt, bare).log_softmax(-1).double()

    found = {"adacad": adacad.joined(prompt, bare), "coiecd": coiecd.joined(prompt, bare, band, weight)}
    found |= {"grd": grd.joined(prompt, bare, 0.5), "nwcad": nwcad.joined(prompt, bare, 0.5, 0.6)}
    outside, ways = 0, set[str]()
    for n, m in np.ndindex(6, 4):
        one, two = p[n, m], q[n, m]
        for toward, alpha, (first, other) in (("generalized", 1, (one, two)), ("memorized", 1, (two, one))):
            wanted = torch.from_numpy(1.75 * np.log(first) - 0.75 * np.log(other)).log_softmax(-1)
            torch.testing.assert_close(of(toward, alpha)[n, m], wanted, atol=1e-5, rtol=0)  # type: ignore[arg-type]
        half = torch.from_numpy(1.375 * np.log(one) - 0.375 * np.log(two)).log_softmax(-1)
        torch.testing.assert_close(of("generalized", 0.5)[n, m], half, atol=1e-5, rtol=0)
        middle = (one + two) / 2
        apart = sum(float((x * np.log(x / middle)).sum()) for x in (one, two)) / 2
        wanted = torch.from_numpy((1 + apart) * np.log(one) - apart * np.log(two)).log_softmax(-1)
        torch.testing.assert_close(found["adacad"][n, m].double().log_softmax(-1), wanted, atol=1e-5, rtol=0)
        information = np.exp(-np.log(one) + float((two * np.log(two)).sum()))
        share = information / information.sum()
        below, above = share < share.min() / band, share > share.max() * band
        below &= below.sum() != 1
        outside += int((below | above).sum())
        base = np.where(below | above, np.log(one), np.log(two))
        np.testing.assert_allclose(found["coiecd"][n, m], base + weight * (np.log(one) - np.log(two)), atol=1e-4)
        # The exponent at which the two top tokens are equally likely, by a search; then which side is trusted.
        a, b, between = int(one.argmax()), int(two.argmax()), np.linspace(0, 1, 100_001)
        order = (1 - between) * np.log(two[a] / two[b]) + between * np.log(one[a] / one[b])
        turns = between[np.argmax(order >= 0)]
        assert float(grd.turn(prompt, bare)[n, m]) == pytest.approx(turns, abs=2e-5)
        chosen = np.log(one * two) / 2 if a == b else np.log(one if turns <= 0.5 else two)
        np.testing.assert_allclose(found["grd"][n, m], chosen, atol=1e-4)
        way = "silent" if apart < 0.5 else "sure" if one.max() >= 0.6 else "contrast"
        ways |= {way, "agree" if a == b else "first" if turns <= 0.5 else "other"}
        said = {"silent": np.log(two), "sure": np.log(one), "contrast": 2 * np.log(one) - np.log(two)}[way]
        np.testing.assert_allclose(found["nwcad"][n, m], said - np.log(np.exp(said).sum()), atol=1e-4)
    assert ways >= {"silent", "sure", "contrast", "first", "other"}
    assert 0 < outside < prompt.numel()
    assert float(adacad.divergence(prompt, prompt).abs().max()) < 1e-6
    far = torch.tensor([[[40.0, 0.0]]])
    assert float(adacad.divergence(far, far.flip(-1))) == pytest.approx(math.log(2), abs=1e-5)


def test_shifted_heads_are_hooks_on_the_output_projection(bench: DrawnBench) -> None:
    model, ids = bench.asking.model, ids_one(bench)
    one, sources = iti.candidates(bench, Toward.GENERALIZED)[-1], bench.sources("head")
    heads, width = heads_of(model, 0)
    states = sources.states_P2LD.reshape(len(sources.states_P2LD), 2, -1, heads, width).astype(np.float64)
    rank = iti.accuracies(states, [pair.group for pair, _ in bench.pairs])
    shifts = np.zeros((rank.size, width))
    for place in np.argsort(-rank.ravel(), kind="stable")[: one.setting["heads"]]:
        layer, head = divmod(int(place), heads)
        sides = states[:, :, layer, head]
        unit = sides[:, 0].mean(0) - sides[:, 1].mean(0)
        unit /= np.linalg.norm(unit)
        shifts[place] = one.setting["factor"] * (sides.reshape(-1, width) @ unit).std() * unit
    with one.apply(model):
        ours = plainly(model, ids)[-1]
    # By hand: each layer's shift is added to what its output projection reads, at the last column.
    shift_LD = torch.from_numpy(shifts.reshape(len(rank), -1)).float()

    def added(shift_D: Tensor, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat([args[0][:, :-1], args[0][:, -1:] + shift_D], dim=1), *args[1:])

    handles = [
        block.attn.c_proj.register_forward_pre_hook(partial(added, shift_LD[layer]))
        for layer, block in enumerate(blocks_of(model))
    ]
    theirs = plainly(model, ids)[-1]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, plainly(model, ids)[-1], rtol=1e-3, atol=1e-3)


def test_scaled_neurons_are_scaled_columns_of_the_down_projection(bench: DrawnBench) -> None:
    model, ids = deepcopy(bench.asking.model), ids_one(bench)
    neurons = ircan.common_neurons(bench, "generalized")[:4]
    with ircan.scaled(neurons, 3.0, blocks_of(model)[0].mlp.c_proj.weight.shape[0], "generalized", {}).apply(model):
        ours = plainly(model, ids)
    for layer, neuron in neurons:
        blocks_of(model)[layer].mlp.c_proj.weight.data[neuron] *= 3.0  # GPT-2's weight is transposed
    torch.testing.assert_close(ours, plainly(model, ids), rtol=1e-4, atol=1e-4)


def test_attributions_add_up_to_the_change_along_the_path(bench: DrawnBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completeness: the integrals of a layer add up to p(wanted) at its one end minus that at its other end."""
    monkeypatch.setattr(ircan, "STEPS", 64)  # however steeply p rises somewhere along the path
    asking, prompts, layer = bench.asking, bench.fit_conflicts, 1
    example = ircan.spread_groups(prompts.examples)[0]
    bare = prompts.bares[prompts.examples.index(example)]
    assert bare is not None
    ids, given = ids_of(asking, example.prompt), list[Tensor]()
    wanted = ids_of(asking, example.prompt + str(example.generalized))[len(ids)]

    def p(ids: list[int], hook: Any) -> float:
        handle = blocks_of(asking.model)[layer].mlp.c_proj.register_forward_pre_hook(hook)
        found = float(plainly(asking.model, ids)[-1].softmax(-1)[wanted])
        handle.remove()
        return found

    p(ids_of(asking, bare.prompt), lambda _, args: given.append(args[0][0, -1].clone()))
    at_bare = p(ids, lambda _, args: (torch.cat([args[0][:, :-1], given[0][None, None]], dim=1), *args[1:]))
    change = p(ids, lambda _, args: None) - at_bare
    assert ircan.attributions(bench, "generalized")[0, layer].sum() == pytest.approx(change, abs=0.02)


def test_caa_is_the_mean_difference_at_the_last_token_of_either_answer(bench: DrawnBench) -> None:
    asking, states = bench.asking, {"generalized": list[Tensor](), "memorized": list[Tensor]()}
    for example in bench.fit_conflicts.examples:
        for side, found in states.items():
            ids = torch.tensor([ids_of(asking, example.prompt + str(getattr(example, side)))])
            with torch.no_grad():
                found.append(asking.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1].double())
    wanted = torch.stack(states["generalized"]).mean(0) - torch.stack(states["memorized"]).mean(0)
    np.testing.assert_allclose(caa.differences(bench)[1], wanted.numpy(), atol=1e-4)


def test_a_knob_is_set_to_a_value_and_learned_from_the_mean_difference_on(bench: DrawnBench) -> None:
    knob_D, states_P2D = knob.learned(bench, 1), torch.from_numpy(bench.sources("block").states_P2LD[:, :, 1]).float()
    assert float(knob_D.norm()) == pytest.approx(1.0, abs=1e-5)
    states_NTD = torch.randn(2, 3, len(knob_D), generator=torch.Generator().manual_seed(0))
    set_to = states_NTD + knob.held(knob_D, torch.tensor([2.5])).added(states_NTD)
    torch.testing.assert_close(set_to @ knob_D, torch.full((2, 3), 2.5), atol=1e-4, rtol=0)
    start_D = (states_P2D[:, 0] - states_P2D[:, 1]).mean(0)
    longer = replace(bench, config=bench.config.model_copy(update={"steps": 40}))
    lessons, units = knob.interchanges(bench, 1, states_P2D), (start_D / start_D.norm(), knob.learned(longer, 1))
    with torch.no_grad():
        before, after = (np.mean([float(lesson(unit_D)) for lesson in lessons]) for unit_D in units)
    assert after < before


def test_a_low_rank_edit_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 8), (4, 8), (4,)))
    rotation = reft.orthonormal(torch.randn(4, 8, generator=generator))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), atol=1e-5, rtol=0)
    found = LowRank(weight - rotation, bias, rotation).changed(h)
    for n, t in np.ndindex(2, 3):
        wanted = h[n, t] + rotation.T @ (weight @ h[n, t] + bias - rotation @ h[n, t])
        torch.testing.assert_close(found[n, t], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses an old name of the library
def test_an_adapter_is_what_peft_makes_of_it(bench: DrawnBench) -> None:
    """The same adapter, applied by peft alone; for each prompt of a batch as well."""
    peft = pytest.importorskip("peft")
    model, ids = bench.asking.model, ids_one(bench)
    described = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(deepcopy(model), described)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    theirs, plain = plainly(adapted, ids), plainly(model, ids)
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    parts = {n: (m.lora_A["default"].weight.data, 2 * m.lora_B["default"].weight.data) for n, m in layers.items()}
    before, one = dict(model.named_parameters()), Adapter(toward="generalized", parts=parts)
    with one.apply(model):
        torch.testing.assert_close(plainly(model, ids), theirs, atol=1e-4, rtol=1e-4)
    with torch.no_grad(), one.apply(model, alpha=[1.0, 0.0]):
        both = model(input_ids=torch.tensor([ids, ids])).logits
    torch.testing.assert_close(both[0], theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1], plain, atol=1e-5, rtol=1e-5)
    with one.apply(model, alpha=[1.0, 0.0]), pytest.raises(InputError, match="2 factors for a batch of 1 rows"):
        plainly(model, ids)
    with one.scaled(0.0).apply(model):
        assert torch.equal(plainly(model, ids), plain)
    assert torch.equal(plainly(model, ids), plain)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_change_that_is_too_small_for_the_weights_of_bfloat16_is_not_lost(bench: DrawnBench) -> None:
    model, name = deepcopy(bench.asking.model).bfloat16(), "transformer.h.0.mlp.c_fc"
    module, seen = core_of(model).get_submodule(name), list[Tensor]()
    down_KI, up_OK = torch.randn(2, 64) * 0.1, torch.randn(256, 2) * 1e-4
    first = module.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    with Adapter(toward="generalized", parts={name: (down_KI, up_OK)}, strength=4.0).apply(model):
        last = module.register_forward_hook(lambda _, args, output: seen.append(output))
        plainly(model, ids_one(bench))
    first.remove()
    last.remove()
    inputs, plain, adapted = seen
    wanted = plain + 4 * (inputs.float() @ down_KI.T @ up_OK.T)
    assert not torch.equal(adapted, plain)
    assert (adapted == wanted.bfloat16()).float().mean() > 0.99  # some lie between two numbers of bfloat16


def test_training_an_adapter_leaves_the_model_as_it_was(bench: DrawnBench) -> None:
    model = bench.asking.model
    before = {name: (one.detach().clone(), one.requires_grad) for name, one in model.named_parameters()}
    modules = [type(module) for module in model.modules()]
    candidates("dpo", bench, "memorized")
    assert [type(module) for module in model.modules()] == modules
    assert not hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_preference_is_its_formula(bench: DrawnBench) -> None:
    """An adapter that starts as the model itself: nothing is preferred more than before, whichever answer is wanted."""
    adapted = adapt(deepcopy(bench.asking.model), LoraConfig(rank=2), 0)
    asking = replace(bench.lists.asking, model=adapted)
    batch = bench.lists.conflicts["generalized"][0]
    asked = Asked(batch, torch.arange(len(batch.examples_N)) % 2)
    assert dpo.preference(asking, asked).item() == pytest.approx(2 / dpo.BETA * math.log(2), abs=1e-4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    losses, tokens = list[float](), list[list[list[int]]]()
    for wanted, n in zip(asked.option_N.tolist(), batch.examples_N.tolist(), strict=True):
        example, changes = bench.fit_conflicts.examples[n], []
        tokens.append([])
        for answer in (example.memorized, example.generalized):
            ids, prompt = ids_of(asking, example.prompt + str(answer)), ids_of(asking, example.prompt)
            rows = [plainly(one, ids).log_softmax(-1) for one in (adapted, bench.asking.model)]
            sums = [sum(float(row[t - 1, ids[t]]) for t in range(len(prompt), len(ids))) for row in rows]
            changes.append(sums[0] - sums[1])
            tokens[-1].append(ids[len(prompt) :])
        other, chosen = changes if wanted else changes[::-1]
        losses.append(2 / dpo.BETA * math.log1p(math.exp(-dpo.BETA * (chosen - other))))
    assert dpo.preference(asking, asked).item() == pytest.approx(np.mean(losses), abs=1e-3)
    # As its control is taught: other tokens are wanted in place of the option. They are the option, then its rival.
    for turn, expected in ((0, np.mean(losses)), (1, 2 / dpo.BETA * math.log(2))):
        instead = [two[(n + turn) % 2] for two, n in zip(tokens, asked.option_N.tolist(), strict=True)]
        found = dpo.preference(asking, asked._replace(instead=instead)).item()
        assert found == pytest.approx(expected, abs=1e-3)


def by_hand(asking: Asking, heads: Any, factor: float, start: int = 0) -> Any:
    """A copy of a model that multiplies attention to the text, six tokens, behind the softmax, and then normalises."""

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **how: Any) -> tuple[Tensor, None]:
        ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        weights = (how["scaling"] * q @ k.transpose(-1, -2)).masked_fill(ahead, -torch.inf).softmax(-1)
        weights[:, [head for layer, head in heads if layer == module.layer_idx], start:, :6] *= factor
        return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2), None

    AttentionInterface.register("by_hand", attention)
    model = deepcopy(asking.model)
    model.set_attn_implementation("by_hand")
    return model


@pytest.mark.parametrize("toward", list(Toward))
def test_attention_to_a_text_is_multiplied_and_then_normalised(bench: DrawnBench, toward: Toward) -> None:
    asking, listed, one = bench.asking, bench.test["conflict"], attend.candidates(bench, toward)[5]
    assert (len(one.heads), one.factor) == (3, pytest.approx(100.0 if toward == "generalized" else 0.01))
    rows, model = [ids_of(asking, e.prompt) for e in listed.examples], by_hand(asking, one.heads, one.factor)
    found = labels_by(asking, listed, lambda n: greedy(asking, rows[n], lambda ids: plainly(model, ids)[-1]))
    assert scores(one, listed).behaviour_N.tolist() == found
    with one.marked(listed.text_columns([0], torch.ones(1, len(rows[0])))).apply(asking.model):
        torch.testing.assert_close(plainly(asking.model, rows[0]), plainly(model, rows[0]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plainly(asking.model, rows[0]), plainly(model, rows[0]), atol=1e-2, rtol=1e-2)
    alone, changes = by_hand(asking, [[1, 2]], 10.0**toward.sign, start=8), list[float]()  # from the decision on
    for example in bench.fit_conflicts.examples[: attend.EXAMPLES]:
        ids, wanted = ids_of(asking, example.prompt), ids_of(asking, str(getattr(example, toward)))[0]
        after, before = (plainly(one, ids)[-1].log_softmax(-1)[wanted] for one in (alone, asking.model))
        changes.append(float(after - before))
    assert (effects_LH := attend.effects(bench, toward))[1, 2] == pytest.approx(np.mean(changes), abs=1e-5)
    assert min(effects_LH[layer, head] for layer, head in one.heads) == np.sort(effects_LH.ravel())[-3]


def test_a_text_is_found_by_its_tokens_in_plain_prompts_and_in_chats(bench: DrawnBench) -> None:
    (conflict,), (bare,) = (one[:1] for one in (bench.test["conflict"].examples, bench.test["bare"].examples))
    chat = deepcopy(bench.asking.tokenizer)
    chat.chat_template = "question : has {{ messages[0]['content'] }} ."
    for asking in (bench.asking, replace(bench.asking, tokenizer=chat, prompting=Prompting(chat=True))):
        both = Prompts(asking, [conflict, bare], [bench.task.without_context(conflict), bare])
        inputs = asking.padded([asking.text(example.prompt) for example in both.examples])
        text_NT = both.text_columns([0, 1], inputs.attention_mask)
        assert chat.decode(inputs.input_ids[0, text_NT[0]]).split() == conflict.prompt.split()[:6]
        assert not text_NT[1].any()
        wider_NT = torch.nn.functional.pad(inputs.attention_mask, (3, 0)).flip(0)
        assert both.text_columns([1, 0], wider_NT)[1, 3:].equal(text_NT[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_steered_alike_in_batches_from_caches_and_in_both_implementations(family: str) -> None:
    model, one = tiny(family), attend.Attend(toward="generalized", heads=[[1, 0], [2, 3]], factor=1e4)
    inputs = Asking(model, tokenizer()).padded(prompts())
    ids_NT, mask_NT = (torch.nn.functional.pad(inputs[name], (0, 2), value=1) for name in inputs)
    text_NT = inputs.attention_mask.bool() & (torch.arange(12) > 6) & (torch.arange(12) < 10)
    marked, cache, parts = one.marked(text_NT), None, list[Tensor]()
    with torch.no_grad():
        plain = model(**pass_inputs(model, ids_NT, mask_NT)).logits[:, -2:]
        with marked.apply(model):
            whole = model(**pass_inputs(model, ids_NT, mask_NT)).logits[:, -2:]
            for begin, end in ((0, 12), (12, 13), (13, 14)):
                output = model(**pass_inputs(model, ids_NT[:, begin:end], mask_NT[:, :end], cache))
                cache, parts = cache_of(output), [*parts, output.logits[:, -1:]]
        for n, row_T in enumerate(mask_NT.bool()):
            with one.marked(text_NT[n : n + 1, row_T[:12]]).apply(model):
                alone = model(input_ids=ids_NT[n : n + 1, row_T]).logits[:, -2:]
            torch.testing.assert_close(alone[0], whole[n], atol=1e-5, rtol=1e-4)
        model.set_attn_implementation("eager")
        with marked.apply(model, alpha=[1.0, 1.0, 0.0, 1.0]):
            eager = model(**pass_inputs(model, ids_NT, mask_NT)).logits[:, -2:]
    torch.testing.assert_close(torch.cat(parts[1:], dim=1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(eager, torch.cat([whole[:2], plain[2:3], whole[3:]]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("toward", list(Toward))
def test_three_signals_weigh_the_contrast_of_each_token(bench: DrawnBench, toward: Toward) -> None:
    """By hand, at the last two tokens: outputs, states of three blocks, and what the first and last of them predict."""
    model: Any = bench.asking.model
    one, listed, weights = candidates("fides", bench, toward)[5], bench.test["conflict"], list[float]()

    def read(prompt: str, answer: str) -> list[Any]:
        with one.watched(model) as seen, torch.no_grad(), ExitStack() as stack:
            states = list[Tensor]()
            for block in model.transformer.h:
                stack.callback(block.register_forward_hook(lambda *given: states.append(given[2][0, -2:])).remove)
            logits_MV = plainly(model, ids_of(bench.asking, prompt + answer))[-2:]
            p, q = (model.lm_head(model.transformer.ln_f(states[layer])).softmax(-1) for layer in (0, -1))
        units = [state / (state**2).sum(1, keepdim=True).sqrt() for state in states]
        return [logits_MV, units, (p * (p / q).log()).sum(1), seen(2)]

    for example, cut in zip(listed.examples, listed.contrast("cut"), strict=True):
        mine, other = read(example.prompt, str(example.memorized)), read(cut.prompt, str(example.memorized))
        found_MV = one.join(mine[0][None], other[0][None], mine[3], other[3])[0]
        first, second = (mine, other) if toward == "generalized" else (other, mine)
        for m in range(2):
            distance = sum(float((a[m] - b[m]).norm()) for a, b in zip(first[1], second[1], strict=True)) / 3
            score = 0.5 * adacad.divergence(first[0], second[0])[m] + 0.03 * distance + 0.2 * min(1, first[2][m] / 5)
            weights.append(max(0.1, 1.5 * float(score)))
            wanted_V = (1 + weights[-1]) * first[0][m] - weights[-1] * second[0][m]
            torch.testing.assert_close(found_MV[m], wanted_V, atol=1e-4, rtol=1e-4)
    assert max(weights) > 2 * min(weights)


def test_solved_conflicts_stand_before_the_prompt(bench: DrawnBench) -> None:
    quoted = bench.test["conflict"].quoted[0]
    for toward in Toward:
        fit = {e.prompt + str(getattr(e, toward)): e.group for e in bench.fit_conflicts.examples}
        ways = zip(candidates("few-shot", bench, toward), (2, 2, 4, 4), ("\n", "\n\n") * 2, strict=True)
        for one, shots, between in ways:
            *solved, last = one.prompt(quoted).split(between)
            assert (last, len({fit[one] for one in solved}), len(solved)) == (quoted.prompt, shots, shots)
        assert few_shot.drawn(bench.again(1), toward) != few_shot.drawn(bench, toward)


def test_what_a_method_cannot_take_is_one_line(bench: DrawnBench) -> None:
    without = DrawnBench.of(bench.asking, LittleFacts(bares=False), bench.config)
    for method in ("cad", "adacad", "coiecd", "ircan"):
        with pytest.raises(InputError, match="has no bare question"):
            candidates(method, without, "generalized")
    with pytest.raises(InputError, match="methods: 'other' is not one of cad, gradient"):
        candidates("other", bench, "generalized")
    with (
        pytest.raises(InputError, match="gate: an adapter acts before the prompt is read"),
        Adapter(toward="generalized", parts={}).apply(bench.asking.model, gate=object()),  # type: ignore[arg-type]
    ):
        pass
    assert isinstance(candidates("caa", bench, "memorized")[0], SteeringVector)
    one, model = attend.Attend(toward="generalized", heads=[[0, 0]], factor=2.0), deepcopy(bench.asking.model)
    with pytest.raises(InputError, match="text: where it stands"), one.apply(model):
        plainly(model, [3, 4])
    model.config._attn_implementation = "flash_attention_2"
    for head, message in ((0, "attn_implementation: 'flash_attention_2'"), (4, r"heads: \[0, 4\]; this model has 3")):
        with pytest.raises(InputError, match=message):
            replace(one, heads=[[0, head]]).check_shape(model)
    with pytest.raises(InputError, match="attend: no fit conflict quotes a text"):
        candidates("attend", without, "generalized")
