"""Training: the loss is that of the whole instance, the stop rule is the stated one, a run that fails says why."""

from __future__ import annotations

import math
import runpy
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers import MINI_TASKS, check_that_a_killed_training_goes_on
from mnemoscope.behaviour import Asking
from mnemoscope.config import HoldConfig, ModelConfig, StopConfig, TrainingConfig
from mnemoscope.models import blocks_of, build_gpt2, word_tokenizer
from mnemoscope.paper.checkpoints import Checkpoint
from mnemoscope.paper.loop import Evaluation, Measured, _State, train
from mnemoscope.paper.optimizers import Float32Muon, optimizers_for, orthogonalized
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Kind, Task, answer_of, build_task
from mnemoscope.watch.curve import Trained, how_to_mix, unmet
from mnemoscope.watch.instances import backward, batches, by_length

NEVER = StopConfig(novel_accuracy=0.8, recall=0.8, conflict_each=0.2, conflict_other=0.2)  # held in thirty steps
QUICK = TrainingConfig(
    steps=30, batch_size=16, evaluate_every=10, evaluation_examples=24, evaluation_most=48, stop=NEVER
)
NOTHING = StopConfig(novel_accuracy=0, recall=0, conflict_each=0, conflict_other=1)


def untrained(task: Task, context: int = 48) -> Asking:
    tokenizer = word_tokenizer(task.vocabulary or (), context)
    model = build_gpt2(tokenizer, ModelConfig(layers=2, width=32, heads=2, context=context), 0)
    return Asking(model, tokenizer, task.boundary)


@pytest.fixture
def task() -> Task:
    return build_task("addition", MINI_TASKS["addition"], 0)


def test_batches_hold_whole_instances_and_weigh_prompt_and_answer(task: Task) -> None:
    asking = untrained(task)
    config = QUICK.model_copy(update={"prompt_weight": 0.25})
    ids_BT, weights_BT = next(batches(asking, task, config, np.random.default_rng(3)))
    instances = list(islice(task.training(np.random.default_rng(3)), 16))
    for ids, weights, instance in zip(ids_BT, weights_BT, instances, strict=True):
        prompt, answer = answer_of(instance)
        expected = asking.tokenizer(prompt + answer).input_ids
        n, p = len(expected), len(asking.tokenizer(prompt).input_ids)
        assert ids[:n].tolist() == expected
        assert ids[n] == asking.tokenizer.eos_token_id
        assert weights[:p].tolist() == [0.25] * p
        assert weights[p : n + 1].tolist() == [1.0] * (n - p + 1)
        assert not weights[n + 1 :].any()


@pytest.mark.parametrize(
    ("changes", "steps", "met"),
    [({"stop": NOTHING}, [10], True), ({}, [10, 20, 30], False), ({"give_up_at": 15}, [10, 15], False)],
    ids=["the rule holds", "all steps", "an attempt without a rule"],
)
def test_when_training_ends(changes: dict[str, Any], steps: list[int], met: bool, task: Task) -> None:
    trained = train(untrained(task), task, QUICK.model_copy(update=changes), np.random.default_rng(0))
    assert ([row["step"] for row in trained.curve], trained.steps) == (steps, steps[-1])
    assert [row["met"] for row in trained.curve] == [met] * len(steps)
    assert [row["kept"] for row in trained.curve] == [step == steps[-1] for step in steps]
    assert bool(trained.unmet) != met


MIXED: list[str] = ["memorized", "generalized"] * 10
RIGHT = ["correct"] * 20


@pytest.mark.parametrize(
    ("wrong", "looked", "met"),
    [(0, 100, True), (1, 400, True), (2, 100, False)],
    ids=["at first sight", "by four looks", "missed at first sight"],
)
def test_the_rule_looks_at_as_many_examples_as_it_takes(
    wrong: int, looked: int, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twenty answers some are wrong: 0, 5 or 10 %, for a bound of 91 %."""
    task = build_task("inference", MINI_TASKS["inference"], 0)
    stop = StopConfig(novel_accuracy=0.91, recall=0.9, conflict_each=0.25, conflict_other=0.1)
    config = QUICK.model_copy(update={"stop": stop, "evaluation_examples": 100, "evaluation_most": 1600})
    novel = ["wrong"] * wrong + RIGHT[wrong:]
    evaluation, asked = Evaluation(untrained(task), task, config, np.random.default_rng(0)), set[int]()
    answers: dict[Kind, list[str]] = {"novel": novel, "memory": RIGHT, "conflict": MIXED}

    def labels(kind: Kind, begin: int, end: int) -> np.ndarray:
        asked.add(end)
        return np.array((answers[kind] * 400)[begin:end])

    monkeypatch.setattr(evaluation.watchers["inference"], "labels", labels)
    measured = evaluation.measure()
    assert measured.shares["novel_accuracy"] == 1 - wrong / 20
    assert (max(asked), not unmet(stop, *measured)) == (looked, met)
    if met:
        assert measured.surely["novel_accuracy"] >= 0.91


def forgetful() -> Task:
    """A task without memory examples."""
    task = build_task("addition", MINI_TASKS["addition"], 0)
    everything = task.examples
    task.examples = lambda rng, n, kind: [] if kind == "memory" else everything(rng, n, kind)  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize(
    ("name", "changes", "refused"),
    [
        (
            "addition",
            {"stop": {"novel_accuracy": 0.99}},
            r"training\.stop\.novel_accuracy: 0.99 cannot .* at most 0.858",
        ),
        ("addition", {"stop": {"conflict_each": 0.4}}, r"training\.stop\.conflict_each: 0.4 cannot .* at most 0.3"),
        ("addition", {"stop": {"conflict_other": 0.01}}, r"training\.stop\.conflict_other: 0.01 cannot .* at least"),
        ("addition", {"hold": HoldConfig(dial="digits")}, r"training\.hold\.dial: 'digits'; task 'addition' has"),
        ("inference", {"context": 24}, r"model\.context: 24 tokens; a training instance has 34"),
        ("forgetful", {}, "has no memory example"),
    ],
)
def test_what_cannot_be_trained_or_decided_is_refused(name: str, changes: dict[str, Any], refused: str) -> None:
    """Before a step is taken. Examples ask one question and fit; training instances ask three."""
    config, changes = QUICK.model_copy(update={"evaluation_most": 24}), dict(changes)
    stop, context = NOTHING.model_copy(update=changes.pop("stop", {})), changes.pop("context", 48)
    task = build_task(name, MINI_TASKS[name], 0) if name in MINI_TASKS else forgetful()
    config = config.model_copy(update={"stop": stop, **changes})
    with pytest.raises(InputError, match=refused):
        train(untrained(task, context), task, config, np.random.default_rng(0))


def test_a_dial_follows_the_mixture(task: Task) -> None:
    hold = HoldConfig(target=0.4, proportional=1.0, integral=0.5, learned=0.9)
    config = QUICK.model_copy(update={"hold": hold})
    state = _State(untrained(task).model, config, 0.3)
    state._losses = [0.0]
    ends, rows = dict.fromkeys(GOOD, 0.0), [(0.5, 0.9, 0.1), (0.95, 0.8, 0.2), (0.5, 0.2, 0.8), (0.95, 0.0, 0.0)]
    for step, (novel, memorized, generalized) in enumerate(rows, 1):
        state.steps, shares = 10 * step, {"novel_accuracy": novel, "conflict_memorized": memorized}
        state._losses = [0.0]
        state.note(Measured({**GOOD, **shares, "conflict_generalized": generalized}, ends))
    odds = [math.log(row["dial"] / (1 - row["dial"])) for row in state.curve]
    first = math.log(0.3 / 0.7)
    expected = [first, first - 0.4 - 0.5 * 0.4, first + 0.2 - 0.5 * (0.4 - 0.2), first - 0.5 * (0.4 - 0.2)]
    assert odds == pytest.approx(expected)
    assert [state.dial_at(step) for step in (0, 9, 25)] == [0.3, 0.3, state.curve[1]["dial"]]


def test_instances_follow_the_dial_also_where_a_stream_goes_on(task: Task) -> None:
    asking, config = untrained(task), QUICK.model_copy(update={"hold": HoldConfig()})
    of_step = {0: 0.02, 16: 0.98}

    def dial_at(step: int) -> float:
        return of_step[max(known for known in of_step if known <= step)]

    whole = list(islice(batches(asking, task, config, np.random.default_rng(0), 0, dial_at), 96))
    later = list(islice(batches(asking, task, config, np.random.default_rng(0), 50, dial_at), 46))
    assert all(
        torch.equal(one, other) for a, b in zip(whole[50:], later, strict=True) for one, other in zip(a, b, strict=True)
    )
    code = asking.tokenizer("<mem-").input_ids[0]
    shares = [
        float(np.mean([(ids == code).any(1).float().mean() for ids, _ in part])) for part in (whole[:16], whole[80:])
    ]
    assert shares[0] < 0.2 < 0.8 < shares[1]
    assert task.memorized_share == 0.4  # type: ignore[attr-defined]


GOOD = {"novel_accuracy": 0.97, "recall": 0.97}
GOOD |= {"conflict_memorized": 0.25, "conflict_generalized": 0.65, "conflict_other": 0.1}
BAD = {"recall": 0.5, "conflict_other": 0.11}
PARTS = {f"inference.{key}": value for key, value in GOOD.items()}
PARTS |= {f"cipher.{key}": value for key, value in (GOOD | BAD).items()}


def test_the_rule_names_what_is_missing_and_the_part_that_misses_it() -> None:
    stop = StopConfig(novel_accuracy=0.97, recall=0.97)
    assert unmet(stop, GOOD) == []
    missed = ["recall 0.500{} (wanted >= 0.97)", "conflict_other 0.110{} (wanted <= 0.1)"]
    assert unmet(stop, GOOD | BAD) == [text.format("") for text in missed]
    assert unmet(stop, GOOD | BAD | PARTS) == [text.format(" in cipher") for text in missed]
    for memorized, advice in ((0.9, "memory wins"), (0.1, "the rule wins")):  # and which dials to turn
        row = GOOD | {"conflict_memorized": memorized, "conflict_generalized": 1 - memorized}
        text = how_to_mix(Trained([row], 500, 1.0, ["conflict_generalized 0.1 (wanted >= 0.25)"], "float32"))
        assert all(said in text for said in (advice, "memorized_share", "wanted >= 0.25"))


def test_every_parameter_has_one_optimizer_and_embeddings_are_adams(task: Task) -> None:
    model = untrained(task).model
    muon, adam = optimizers_for(model, QUICK)
    groups = [{id(p) for g in o.param_groups for p in g["params"]} for o in (muon, adam)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    assert id(model.transformer.wte.weight) in groups[1]
    assert len(groups[0]) == 2 * 4  # attention in and out, MLP up and down, in each of two blocks


def test_averaged_weights_are_measured_and_kept(task: Task) -> None:
    """Against averages taken beside the same steps."""
    config = QUICK.model_copy(update={"averaged": 4})
    asking, other = untrained(task), untrained(task)
    state, expected = _State(other.model, config), [weight.detach().clone() for weight in other.model.parameters()]
    rng = np.random.default_rng(0)
    Evaluation(other, task, config, rng)  # its examples are drawn first
    stream = batches(other, task, config, rng)
    for step, batch in enumerate(islice(stream, config.steps), 1):
        state.step(*batch)
        share = 1 / min(step, 4)
        expected = [
            old + share * (new.detach() - old) for old, new in zip(expected, other.model.parameters(), strict=True)
        ]
    train(asking, task, config, np.random.default_rng(0))
    for found, wanted in zip(asking.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, atol=1e-6, rtol=1e-5)
    latest = [weight.detach().clone() for weight in other.model.parameters()]
    with state.averaged():
        assert not all(torch.equal(a, b) for a, b in zip(other.model.parameters(), latest, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), latest, strict=True))


MINI_CIPHER = {"letters": 10, "length": 2, "stored": 8}
MINI_JOINT = {"parts": {"inference": MINI_TASKS["inference"], "cipher": MINI_CIPHER}}


@pytest.mark.parametrize("hold", [None, HoldConfig(learned=0.0)], ids=["left alone", "held"])
def test_a_killed_training_goes_on_to_the_same_bytes(hold: HoldConfig | None, task: Task, tmp_path: Path) -> None:
    """Stopped before the first measurement, and several times behind it; each time in a new model."""
    config = QUICK.model_copy(update={"steps": 90, "hold": hold})
    kept = Checkpoint(tmp_path / "training.safetensors", "this")
    check_that_a_killed_training_goes_on(lambda: untrained(task), task, config, kept)
    assert Checkpoint(kept.path, "another").load([]) is None
    assert Checkpoint(kept.path, "this", attempt=1).load([]) is None
    kept.path.write_bytes(kept.path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"training.safetensors is damaged"):
        kept.load([])


def test_short_and_long_instances_of_a_batch_give_the_gradient_of_the_whole() -> None:
    """Against one padded pass over the same batch."""
    task = build_task("joint", MINI_JOINT, 0)
    asking = untrained(task)
    ids_BT, weights_BT = next(batches(asking, task, QUICK, np.random.default_rng(3)))
    logits_BTV = asking.model(input_ids=ids_BT[:, :-1]).logits
    logp_BT = torch.log_softmax(logits_BTV, -1).gather(2, ids_BT[:, 1:, None])[..., 0]
    expected = -(logp_BT * weights_BT[:, 1:]).sum() / weights_BT[:, 1:].sum()
    gradients = torch.autograd.grad(expected, list(asking.model.parameters()))
    assert len(by_length(ids_BT, weights_BT)) == 2
    assert backward(asking.model, ids_BT, weights_BT) == pytest.approx(expected.item(), rel=1e-5)
    for weight, gradient in zip(asking.model.parameters(), gradients, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-4)


def test_passes_in_bfloat16_give_the_gradient_of_float32_but_for_rounding(task: Task) -> None:
    """Of a first step, and by what the matrices of the blocks gave."""
    gradients, seen = [], []
    for precision in ("float32", "bfloat16"):
        asking, given = untrained(task), set[torch.dtype]()
        for block in blocks_of(asking.model):
            block.mlp.c_fc.register_forward_hook(lambda module, inputs, output, given=given: given.add(output.dtype))
        state = _State(asking.model, QUICK.model_copy(update={"precision": precision}))
        state.optimizers, state._schedules = [], []
        state.step(*next(batches(asking, task, QUICK, np.random.default_rng(3))))
        gradients.append(torch.cat([p.grad.flatten() for p in asking.model.parameters() if p.grad is not None]))
        seen.append(given)
        assert {p.dtype for p in asking.model.parameters()} == {torch.float32}
    assert seen == [{torch.float32}, {torch.bfloat16}]
    exact, rounded = gradients
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.02
    assert exact.dtype == rounded.dtype == torch.float32


def test_the_rule_must_hold_in_every_part_of_a_joint_task() -> None:
    task = build_task("joint", MINI_JOINT, 0)
    asking = untrained(task)
    config = QUICK.model_copy(update={"stop": NOTHING})
    evaluation = Evaluation(asking, task, config, np.random.default_rng(0))
    # What closes an answer is each part's own.
    ends = {name: watcher.asking.boundary for name, watcher in evaluation.watchers.items()}
    assert ends == {"inference": (".", " ."), "cipher": ("",)}
    assert set(asking.boundary_ids()) == {asking.tokenizer(".").input_ids[0], asking.tokenizer.eos_token_id}
    measured, surely = evaluation.measure()
    for name, at_least in {"recall": True, "conflict_other": False}.items():
        values = [measured[f"{part}.{name}"] for part in evaluation.watchers]
        assert measured[name] == (min if at_least else max)(values)
        assert surely[name] <= measured[name] if at_least else surely[name] >= measured[name]
    (row,) = train(asking, task, config, np.random.default_rng(0)).curve
    assert set(measured) <= set(row)


@pytest.mark.parametrize("shape", [(2, 24, 96), (2, 96, 24)])
def test_orthogonalized_is_the_iteration_step_by_step(shape: tuple[int, ...]) -> None:
    """Against the quintic iteration on X itself in float64, also for matrices of small singular values."""
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator).double(), full_matrices=False)
    matrices = left @ torch.diag_embed(torch.logspace(0, -4, 24).double().expand(2, -1)) @ right
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    wanted = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = wanted @ wanted.mT
        wanted = a * wanted + (b * gram + c * gram @ gram) @ wanted
    found = orthogonalized(matrices.float(), coefficients, 5, 1e-7)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
    torch.testing.assert_close(orthogonalized(matrices.float(), coefficients, 0, 1e-7).norm(dim=(1, 2)), torch.ones(2))


def test_muon_in_float32_steps_where_the_library_steps() -> None:
    """Up to the bfloat16 of the library: one direction, one root mean square, the same decay and momentum."""
    torch.manual_seed(0)
    shapes = [(16, 48), (16, 16), (48, 16), (16, 48)]
    first = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in first] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.3}
    optimizers = Float32Muon(ours, **options), torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradients = [torch.randn(shape) for shape in shapes]
        for optimizer, weights in zip(optimizers, (ours, theirs), strict=True):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for begun, our, their in zip(first, ours, theirs, strict=True):
        step = their.detach() - begun
        assert (our.detach() - their.detach()).norm() < 0.02 * step.norm()


def test_the_loop_of_the_library_with_our_recipe_takes_our_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against ``transformers.Trainer``, as the benchmark calls it: one recipe, two loops, the same weights."""
    pytest.importorskip("accelerate")
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    benchmark = SimpleNamespace(**runpy.run_path(str(folder / "training.py")))
    task = build_task("inference", MINI_TASKS["inference"], 0)
    changes = {"averaged": 1, "steps": 6, "evaluate_every": 3, "warmup_steps": 2, "decay_steps": 3}
    config = QUICK.model_copy(update=changes | {"prompt_weight": 0.1, "precision": "bfloat16"})
    trained = []
    for contestant in (benchmark.ours, benchmark.with_our_recipe):
        asking, steps, seen = untrained(task), list[int](), list[tuple[int, list[str]]]()
        turns = SimpleNamespace(stepped=steps.append, measured=lambda *look, seen=seen: seen.append(look))
        contestant(benchmark.Begun(asking, task, config, 0), turns)  # without turns of others
        weights = torch.cat([weight.detach().flatten() for weight in asking.model.parameters()])
        trained.append((weights, steps, seen))
    (ours, *looks), (theirs, *their_looks) = trained
    begun = torch.cat([weight.detach().flatten() for weight in untrained(task).model.parameters()])
    assert looks == their_looks
    assert (ours - theirs).norm() < 1e-3 * (ours - begun).norm()
