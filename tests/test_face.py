"""The face: a model of a user's and a file of examples; the command line gives what Python gives."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from threadpoolctl import threadpool_info

import mnemoscope as ms
from families import prompts, tiny, tokenizer
from helpers import MINI_TASKS, hook_count, sign
from mnemoscope.behaviour import Asking, phrase_of, states_at_the_end
from mnemoscope.cli import commands
from mnemoscope.config import load_study
from mnemoscope.face.fitted import Fitted
from mnemoscope.face.recipe import METHODS, ONE_LAYER, SETTINGS, STEERING, Choices, fitting_study
from mnemoscope.face.stored import agreed, vector_file
from mnemoscope.interventions import Toward
from mnemoscope.interventions.decoding import Decoding
from mnemoscope.models import backbone_of, load_model
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.export import SITES_FOR
from mnemoscope.study.cells import cells_of
from mnemoscope.study.stages.judge import SteeredCell
from mnemoscope.tasks import KINDS
from mnemoscope.tasks.jsonl import JsonlTask
from test_cli import call

OPTIONS = [f"--option={name}={value}" for name, value in MINI_TASKS["addition"].items()]
QUICK: dict[str, Any] = {"settings": ONE_LAYER, "threads": 1}


def modes(model: torch.nn.Module) -> list[object]:
    """What a fit must leave as it is: of the model, and of the process."""
    process = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    numpy_threads = [library["num_threads"] for library in threadpool_info()]
    others = torch.utils.deterministic.fill_uninitialized_memory, torch.get_rng_state().tolist(), numpy_threads
    return [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], process, *others]


@dataclass
class User:
    """A model, data, and what was fitted on them."""

    folder: str
    model: Any
    words: Any
    data: Path
    out: Path
    fitted: ms.Fitted

    @property
    def cell(self) -> Path:
        return self.out / "cells" / "sums-0"

    @property
    def prompts(self) -> list[str]:
        rows = pd.read_parquet(self.cell / "records" / "detection.parquet").query("examples == 'conflict'")
        return [str(prompt) for prompt in rows.prompt.head(20)]

    def json(self, command: str, *arguments: str) -> Any:
        code, out, err = call(command, self.folder, *arguments, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture(scope="module")
def user(mini: Callable[[str], Asking], shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> User:
    mini("addition")
    place, folder = tmp_path_factory.mktemp("user"), str(shared_folder / "mini-addition")
    data, out = place / "sums.jsonl", place / "run"
    assert call("data", "addition", "-n", "400", *OPTIONS, "-o", str(data))[0] == 0
    fitted = ms.fit(folder, task=str(data), out=str(out), **QUICK)
    assert hook_count(fitted.model) == 0
    return User(folder, fitted.model, fitted.tokenizer, data, out, fitted)


def test_an_exchange_judges_on_tune_what_is_chosen_on_test(user: User) -> None:
    cell = cells_of(load_study(str(user.out / "study.yaml")), user.out)[0]
    bench = SteeredCell(cell).bench
    for side in Toward:
        sides = list[tuple[set[str], set[str]]]()
        for one in (bench, bench.exchange()):
            lists = one.choosing(side)
            chosen_on = [lists.targets, *(prompts for prompts, _ in lists.kept.values())]
            chosen = {e.group for prompts in chosen_on for e in prompts.examples}
            sides.append((chosen, {e.group for entry in one.judged[side.direction].values() for e in entry.examples}))
        (chosen, judged), (then_chosen, then_judged) = sides
        assert chosen
        assert judged
        assert not chosen & judged
        assert not then_chosen & then_judged
        assert not judged & then_judged
        assert chosen & then_judged
        assert judged & then_chosen


def test_a_fit_needs_pairs_of_the_fit_split_alone(user: User, tmp_path: Path) -> None:
    """Of few groups none may flip on tune or test: levers are chosen and judged on conflicts as drawn."""
    rows, task = [json.loads(line) for line in user.data.read_text().splitlines()], JsonlTask(file=str(user.data))
    split_of = {e.item: e.split for kind in KINDS for e in task.examples(np.random.default_rng(0), 10**4, kind)}
    seen, kept = set[str](), list[str]()
    for row in rows:
        split = split_of[row["item"]]
        if row["kind"] != "conflict" or split == "fit" or row["item"] not in seen:  # one phrasing flips into nothing
            kept.append(json.dumps(row | {"split": split}))
        seen.add(row["item"])
    (tmp_path / "few.jsonl").write_text("\n".join(kept))
    made = ms.fit(user.model, user.words, task=str(tmp_path / "few.jsonl"), out=tmp_path / "run", **QUICK)
    assert set(made.vectors) == set(Toward)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]["few"]
    assert all(made.levers[toward] for toward in Toward)
    assert results["probe"]["best"]["accuracy"]["n"] == 0
    assert "few" in (tmp_path / "run" / "report.html").read_text()


def aimed(task: dict[str, Any], direction: str) -> dict[str, Any]:
    """The block whose method is best for conflicts, the aim of a fit."""
    block = task["steering"][direction]
    return block.get("best_conflict") or block


def test_a_fit_gives_vectors_in_both_directions_a_detector_and_controls(user: User) -> None:
    assert {toward: vector.toward for toward, vector in user.fitted.vectors.items()} == {
        "generalized": "generalized",
        "memorized": "memorized",
    }
    assert user.fitted.detector is not None
    results = json.loads((user.out / "results.json").read_text())["tasks"]["sums"]
    tried = {(row["method"], row["layers"]) for row in results["sweep"] if row["direction"] == "to_generalized"}
    assert {method for method, _ in tried} == {"gradient", "low-rank", "lora"}
    assert {layers for method, layers in tried if method not in ("low-rank", "lora")} == {"1"}  # one of two
    assert set(results["left_out"]) == {"prompt", "cad"}  # without words, and bare questions
    for direction, vector in (("to_generalized", "generalized"), ("to_memorized", "memorized")):
        block, card = aimed(results, direction), user.fitted.vectors[vector].card
        shift = block["conflict"]["shift"]
        assert shift["n"] > 0
        assert card is not None
        assert card.shift == shift
        assert card.control is not None
        strongest = np.nanmax([control["conflict"]["shift"]["estimate"] for control in block["controls"].values()])
        assert card.control["estimate"] == pytest.approx(strongest)
        assert f"test shift {shift['estimate']:.3f} [{shift['low']:.3f}, {shift['high']:.3f}], n = " in str(card)
        assert f"strongest control of the same norm: {card.control['name']}" in str(card)
        assert set(card.divergence) == {"1"}
    for detector, auroc in (
        (user.fitted.detector, results["detection"]["auroc"]["p_memorized"]),
        (user.fitted.lower_detector, results["detection"]["gate"]),
    ):
        assert detector is not None
        assert detector.card is not None
        assert detector.card.auroc == auroc | {"input_only": results["detection"]["auroc"]["input_only"]["estimate"]}
        assert f"test AUROC {auroc['estimate']:.3f}" in str(detector.card)


def test_the_command_line_fits_the_same(user: User) -> None:
    """It finds the fit done that Python has made, and says what its report says."""
    before = {path: path.stat().st_mtime_ns for path in user.cell.rglob("*.safetensors")}
    quick = ("--settings", str(ONE_LAYER), "--threads", "1")
    said = user.json("fit", "--task", str(user.data), "-o", str(user.out), *quick)
    assert Path(said["report"]).is_file()
    results = json.loads((user.out / "results.json").read_text())["tasks"]["sums"]
    for direction in ("to_generalized", "to_memorized"):
        assert said["tasks"]["sums"][direction]["shift"] == aimed(results, direction)["conflict"]["shift"]
    assert before == {path: path.stat().st_mtime_ns for path in user.cell.rglob("*.safetensors")}
    assert str(user.fitted.summary()).startswith("sums")


def test_what_was_fitted_opens_again_and_detects_as_its_records_say(user: User) -> None:
    again = ms.Fitted.open(user.out, user.model, user.words)
    rows = pd.read_parquet(user.cell / "records" / "detection.parquet").query("examples == 'conflict'").head(20)
    for fitted in (user.fitted, again, ms.Fitted.open(user.cell, user.model, user.words)):
        reading = fitted.detect(user.prompts)
        np.testing.assert_allclose(reading.p_memorized, rows.p_memorized, atol=1e-4)
        np.testing.assert_array_equal(reading.unlike, rows.unlike)
        assert all(
            torch.equal(fitted.vectors[toward].shifts[layer], shift)
            for toward, vector in user.fitted.vectors.items()
            for layer, shift in vector.shifts.items()
        )
    said = user.json("detect", *user.prompts, "--from", str(user.out))
    found = [row["p_memorized"] for row in said["prompts"]]
    np.testing.assert_allclose(found, user.fitted.detect(user.prompts).p_memorized, rtol=1e-5)
    assert said["layer"] == again.detect(user.prompts).layer
    assert len(again.detect([]).p_memorized) == 0


@torch.no_grad()
def test_steering_is_that_of_the_vector_and_alpha_zero_of_nothing(user: User) -> None:
    fitted, prompts = user.fitted, user.prompts
    inputs = fitted.inputs(prompts)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": user.words.pad_token_id}
    plain, said = user.model(**inputs).logits, user.model.generate(**inputs, **options)
    with fitted.steer("generalized", alpha=0):
        assert hook_count(user.model) == 0
        assert torch.equal(user.model(**inputs).logits, plain)
        assert torch.equal(user.model.generate(**inputs, **options), said)
    width = inputs.input_ids.shape[1]
    with fitted.steer("generalized", alpha=20):  # so far that no model goes on as before
        steered = user.words.batch_decode(user.model.generate(**inputs, **options)[:, width:], skip_special_tokens=True)
    assert fitted.vector("context") is fitted.vector("generalized")  # type: ignore[arg-type]
    assert len(repr(fitted.vector("generalized")).splitlines()) == 1
    used = fitted.use("context", fitted.vector("context").lever)  # type: ignore[arg-type]
    answers = used.answers(prompts, "generalized", alpha=20, max_new_tokens=8, go_on=True)
    assert [row["steered"] for row in answers] == steered
    phrases = [row["steered"] for row in used.answers(prompts, "context", alpha=20, max_new_tokens=8)]
    assert phrases == list(map(phrase_of, steered))
    assert any(row["plain"] != row["steered"] for row in answers)
    best = json.loads((user.cell / "records" / "chosen.json").read_text())["conflict"]["best"]["to_generalized"]
    file = user.cell / "vectors" / f"to_generalized-{best}.safetensors"
    for source in (user.out, user.cell, file):
        asked = (
            *prompts,
            "--lever",
            fitted.vector("context").lever,
            "--toward",
            "generalized",
            "--alpha",
            "20",
            "--max-new-tokens",
            "8",
            "--go-on",
        )
        assert user.json("steer", *asked, "--from", str(source))["answers"] == answers
    assert {vector_file(source, "context") for source in (user.out, user.cell)} == {file}
    with pytest.raises(InputError, match="toward: 'both' is not one of"):
        vector_file(user.out, "both")
    code, _, err = call("export", str(user.out), "--to", "gguf", "--toward", "memory", "-o", str(user.out / "v.gguf"))
    assert code == 2
    assert err.startswith("error: positions: 'decision' cannot be exported") or "depends on the state" in err
    code, out, _ = call("steer", user.folder, prompts[0], "--toward", "generalized", "--from", str(file))
    assert code == 0
    assert out.startswith(f"> {prompts[0]}\n  unsteered:   ")


@torch.no_grad()
def test_a_gate_acts_where_the_records_say_and_in_generate_as_beforehand(user: User) -> None:
    fitted = user.fitted
    assert fitted.detector is not None
    said = pd.read_parquet(user.cell / "records" / "gate.parquet")
    said = said[(said.direction == "to_generalized") & (said.examples == "pairs")].sort_values("example")
    pairs = pd.read_parquet(user.cell / "records" / "pairs.parquet").query("is_pair and split == 'test'")
    asked = pairs.prompt_a.where(pairs.behaviour_a == "memorized", pairs.prompt_b).drop_duplicates().head(len(said))
    factors = fitted.gate(fitted.inputs(asked.tolist()), 0.5)
    assert factors.tolist() == said.acts.astype(float).tolist()
    gated = user.json("steer", *asked, "--toward", "generalized", "--gate", "0.5", "--from", str(user.out))
    assert gated["gate"] == {"asked": len(said), "acted": said.acts.sum()}
    assert [row["acted"] for row in gated["answers"]] == said.acts.tolist()
    lower, inputs = fitted.lower_detector, fitted.inputs(asked.tolist())
    assert lower is not None
    reading = lower.read(states_at_the_end(user.model, *inputs.values(), lower.site))
    p_N = np.sort(reading.p_memorized[reading.acts("generalized", 0)])
    widest = int(np.diff(p_N).argmax())
    gate = float(p_N[widest : widest + 2].mean())  # with some prompts above it and some below
    acts_N = reading.acts("generalized", gate)
    assert 0 < acts_N.sum() < len(acts_N)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": user.words.pad_token_id}
    with fitted.steer("generalized", gate=gate):
        found = user.model.generate(**inputs, **options)
    with fitted.steer("generalized", alpha=acts_N.astype(float).tolist()):
        assert torch.equal(found, user.model.generate(**inputs, **options))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks the library by an old name
def test_an_adapted_model_is_fitted_on_a_task_object_of_conflicts_alone(user: User, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=2, target_modules=["c_proj"], init_lora_weights=True, task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = get_peft_model(load_model(user.folder)[0], lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.005, generator=torch.Generator().manual_seed(0))
    lines = [line for line in user.data.read_text().splitlines() if "memorized" in json.loads(line)][:300]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    model.train()
    before = modes(model)
    fitted = ms.fit(model, user.words, JsonlTask(file=str(tmp_path / "sums.jsonl")), tmp_path / "run", **QUICK)
    assert modes(model) == before
    assert set(fitted.vectors) == {"generalized", "memorized"}
    model.eval()
    ms.Fitted.open(tmp_path / "run", model.merge_and_unload(), user.words)
    with pytest.raises(InputError, match=r"^weights: the vector was made on"):
        ms.Fitted.open(tmp_path / "run", user.model, user.words)
    if fitted.detector is None:
        with pytest.raises(InputError, match=r"^detector: .* has none \((fit|tune): \d prompts"):
            fitted.detect(["12+34="])


def test_prompts_are_formatted_as_they_were_in_the_fit() -> None:
    """The beginning of a reply is the task's; of a prompt of their own users give it, or are asked for it."""
    plain, chat, begun = ms.Prompting(), ms.Prompting(True, "Be brief."), ms.Prompting(True, reply="It is")
    assert agreed(chat, None) is chat
    assert agreed(chat, ms.Prompting(True)).system == "Be brief."
    assert agreed(begun, ms.Prompting(True, reply="So")).reply == "So"
    for stored, asked, message in (
        (plain, chat, "chat: True; allowed is False"),
        (chat, ms.Prompting(True, "Be long."), "system: 'Be long.'; this was fitted with 'Be brief.'"),
        (begun, ms.Prompting(True), "reply: this was fitted where the beginning of the reply was given"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            agreed(stored, asked)


def test_what_a_fit_cannot_take_is_one_line(user: User, tmp_path: Path) -> None:
    out, model, words = tmp_path / "out", user.model, user.words
    absent = "task: the file nowhere.jsonl does not exist"
    assert ONE_LAYER == 4  # as the help of the command line says
    few = f"settings: {ONE_LAYER - 1} is less than the {ONE_LAYER} that one layer takes"
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((model, None, "x.jsonl"), {}, "tokenizer: None; an open model needs its tokenizer"),
        ((user.folder, words, "x.jsonl"), {}, "tokenizer: a model that is given by name"),
        ((model, words), {}, "task: None; give a JSONL file"),
        ((model, words, "facts"), {"colour": 1}, "colour: fit has no such argument; it has settings, threads"),
        ((model, words, "facts"), {"workers": 2}, "workers: 2; allowed is 1, or more where model and task are given"),
        ((model, words, "facts"), {"dtype": "bfloat16"}, "dtype: 'bfloat16'; not for an open model, which is as it is"),
        ((model, words, "nowhere.jsonl"), {}, absent),
        ((user.folder, None, "nowhere.jsonl"), {}, absent),
        ((user.folder, None, "facts"), {"settings": ONE_LAYER - 1}, few),
        ((model, words, "adition"), {}, "task: 'adition' is unknown"),
        ((model, words, "facts"), {"prompting": ms.Prompting(True)}, "chat: the tokenizer of this model has no chat"),
    ]
    for arguments, choices, message in cases:
        with pytest.raises(InputError) as error:
            ms.fit(*arguments, out=out, **choices)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    assert not list(out.rglob("*.parquet"))
    for task, settings, message in (("nowhere.jsonl", SETTINGS, absent), ("facts", ONE_LAYER - 1, few)):
        arguments = ("--task", task, "--settings", str(settings), "-o", str(out))
        assert call("fit", str(user.folder), *arguments) == (2, "", f"error: {message}\n")


def test_what_fitted_cannot_do_is_one_line_in_python_and_on_the_command_line(user: User, tmp_path: Path) -> None:
    fitted, out = user.fitted, str(user.out)
    best = json.loads((user.cell / "records" / "chosen.json").read_text())["pairs"]["best"]["to_generalized"]
    file = str(user.cell / "vectors" / f"to_generalized-{best}.safetensors")
    other, words = tiny("llama"), tokenizer()
    for call_, message in (
        (
            lambda: ms.Fitted.open(user.out, other, words),
            "model_type: the (vector|intervention) was made on gpt2, this model has llama",
        ),
        (lambda: ms.Fitted.open(tmp_path / "absent", other, words), "from: .* does not exist"),
        (lambda: ms.Fitted.open(tmp_path, other, words), "from: .* is neither a vector, a detector, nor a run"),
        (
            lambda: fitted.vector("both"),
            "toward: 'both' is not one of generalized, memorized; of documents: context, memory",
        ),
        (lambda: fitted.gate(fitted.inputs(["1+2="]), 2.0), "gate: 2.0 is not a probability"),
        (lambda: fitted.detect(["12+34=", "zz"]), "prompt: the tokenizer has no token for 'zz' in 'zz'"),
        (lambda: fitted.detect([""]), "prompt: '' has 0 tokens"),
        (lambda: ms.Fitted.open(file, user.model, user.words).vector("memorized"), "toward: .* it has generalized"),
        (lambda: ms.Fitted.open(file, user.model, user.words).detect(["1+2="]), "detector: .* has none"),
    ):
        with pytest.raises(InputError, match=f"^{message}") as error:
            call_()
        assert "\n" not in str(error.value)
    chat = "chat: True; allowed is False: it was fitted on prompts formatted as they are"
    for arguments, message in (
        (("detect", "zz", "--from", out), "prompt: the tokenizer has no token for 'zz' in 'zz'"),
        (("detect", "1+2=", "--from", out, "--chat"), chat),
        (("detect", "1+2=", "--from", file), "a fit of your own has one"),
        (("steer", "1+2=", "--from", out, "--toward", "both"), "toward: 'both'"),
        (("steer", "1+2=", "--from", file, "--toward", "memorized"), "has no lever to memorized; it has generalized"),
        (("steer", "1+2=", "--from", file, "--toward", "generalized", "--gate", "0.5"), "detector: "),
        (("steer", "1+2=", "--from", out, "--toward", "generalized", "--gate", "2"), "Invalid value for '--gate'"),
        (("steer", "1+2=", "--from", str(tmp_path / "absent"), "--toward", "memorized"), "does not exist"),
    ):
        code, stdout, stderr = call(arguments[0], user.folder, *arguments[1:])
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), arguments
        assert stderr.startswith("error: ")
        assert message in stderr


def test_of_several_cells_the_one_of_the_model_is_opened(user: User, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("a", "b"):
        shutil.copytree(user.cell, run / "cells" / name)
    with pytest.raises(InputError, match=r"^from: several cells .* name one of .*a, .*b$"):
        ms.Fitted.open(run, user.model, user.words)
    assert ms.Fitted.open(run / "cells" / "b", user.model, user.words).detector is not None
    facts = json.loads((run / "cells" / "a" / "cell.json").read_text())
    facts["binding"] |= {"weights": "another", "half": "another"}
    (run / "cells" / "a" / "cell.json").write_text(json.dumps(facts))
    sign(run / "cells" / "a")
    assert ms.Fitted.open(run, user.model, user.words).vectors.keys() == user.fitted.vectors.keys()
    with pytest.raises(InputError, match=r"^weights: no cell of .* was fitted on this model"):
        ms.Fitted.open(run, tiny("gpt2"), tokenizer())


def test_every_lever_is_found_by_its_name_and_answers_the_same_everywhere(user: User) -> None:
    again = ms.Fitted.open(user.out, user.model, user.words)
    chosen = json.loads((user.cell / "records" / "chosen.json").read_text())
    for toward, named in user.fitted.levers.items():
        assert next(iter(named.values())).method == chosen["levers"][f"to_{toward}"]
        assert {"shift", "low-rank", "adapter"} == set(named) == set(again.levers[toward])
        for lever in named:
            said = user.fitted.use(toward, lever).generate(user.prompts, toward)
            assert again.use(toward, lever).generate(user.prompts, toward) == said
            asked = (*user.prompts, "--toward", toward, "--lever", lever, "--from", str(user.out))
            assert [row["steered"] for row in user.json("steer", *asked)["answers"]] == said
        best = user.fitted.use(toward, next(iter(named)))
        assert user.fitted.generate(user.prompts, toward) == best.generate(user.prompts, toward)
    with pytest.raises(InputError, match=r"lever: 'words' to memory is not in .*; it has .*adapter"):
        again.use("memory", "words")  # type: ignore[arg-type]


@torch.no_grad()
def test_two_passes_answer_as_their_definition_by_hand_and_cost_two(tmp_path: Path) -> None:
    model, words = tiny("llama"), tokenizer()
    one = Decoding(toward="generalized", method="cad", setting={"weight": 1.5, "contrast": "bare"})
    fitted = Fitted(tmp_path, model, words, {"generalized": {"decoding": one}}, None, None)
    text, bare = prompts()[0], prompts()[1]
    prompt = f"{text}\n{bare}"
    whole, cut = (words(text, return_tensors="pt").input_ids for text in (prompt, bare))
    width = whole.shape[1]
    for _ in range(6):
        logits = 2.5 * model(whole).logits[:, -1] - 1.5 * model(cut).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        whole, cut = torch.cat([whole, token], 1), torch.cat([cut, token], 1)
    passes = list[int]()
    with backbone_of(model).register_forward_pre_hook(lambda *_: passes.append(1)):
        said = fitted.generate([prompt], "context", max_new_tokens=6, go_on=True)  # type: ignore[arg-type]
        assert said == words.batch_decode(whole[:, width:], skip_special_tokens=True)
        assert len(passes) == 6 * one.passes
    assert fitted.generate([prompt], "context", max_new_tokens=6, go_on=True, bare=[bare]) == said  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bare: prompt 1 quotes no text"):
        fitted.generate([bare], "context")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lever: decoding act on prompts"):
        fitted.use("context", "decoding").steer("context")  # type: ignore[arg-type]


def test_a_fit_halves_what_it_tries(user: User) -> None:
    """Methods without learning see few examples first; one layer alone is learned at."""
    chosen = json.loads((user.cell / "records" / "chosen.json").read_text())
    sweep = pd.read_parquet(user.cell / "records" / "sweep.parquet")
    for direction, part in sweep[~sweep.method.isin(("low-rank", "lora"))].groupby("direction"):
        first, whole = part[part.n <= STEERING["screened"]], part[part.n > STEERING["screened"]]
        assert set(whole.layers) <= set(first.layers)
        assert len(whole[whole.method == "learned"]) <= 1
        assert len(whole[whole.method == "gradient"]) < len(first[first.method == "gradient"])
        assert chosen["pairs"]["best"][direction] == chosen["conflict"]["best"][direction]


def test_what_a_vector_may_cost_is_the_users_to_say() -> None:
    """The command's defaults are those of the recipe."""
    asked = inspect.signature(commands.fit).parameters
    for given in ({}, {"lost": 0.3, "neither": 0.4}):
        (cell,) = fitting_study({"folder": "x"}, "facts", {}, Choices(**given)).cells.values()
        found = (cell.steering.collateral_limit, cell.steering.neither_limit)
        assert found == (tuple(given.values()) or (asked["lost"].default, asked["neither"].default))
    with pytest.raises(InputError, match=r"^neither: 2.0; allowed is a share"):
        Choices(neither=2.0)
    with pytest.raises(InputError, match=r"^aim: 'pair'; allowed are pairs and conflict"):
        Choices(aim="pair")
    with pytest.raises(InputError, match=r"^positions: 'end'; allowed are decision and all"):
        Choices(positions="end")


def test_items_of_one_phrasing_are_refused_before_a_model_is_opened(tmp_path: Path) -> None:
    lines = [
        {"item": f"i{n}", "prompt": f"{n}+1=", "memorized": " a", "generalized": " b", "group": f"g{n}"}
        for n in range(40)
    ]
    file = tmp_path / "once.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"^task: every item of its fit split has one phrasing; pairs need items with"):
        ms.fit("no-such-model", task=str(file), out=tmp_path / "run")


def test_settings_are_dealt_to_layers_all_over_the_model() -> None:
    (everywhere,) = fitting_study({"folder": "x"}, "facts", {}, Choices(positions="all")).cells.values()
    assert everywhere.steering.positions == "all"
    assert set(everywhere.steering.grids) <= set(SITES_FOR["gguf"]) & set(SITES_FOR["checkpoint"])
    (cell,) = fitting_study({"folder": "x"}, "facts", {}).cells.values()
    assert {*cell.steering.methods} - {"low-rank"} == {*everywhere.steering.methods} - {"learned"}
    assert {"low-rank", "learned"} == {*cell.steering.methods} ^ {*everywhere.steering.methods}
    methods = METHODS  # others have few settings of their own
    (learned,) = cell.steering.grids.values()
    assert len(methods) * len(learned.layer_sets(30)) * len(learned.tops) * len(learned.strengths) == SETTINGS == 20
    assert learned.layer_sets(30) == [(5,), (10,), (15,), (20,), (25,)]
    assert learned.layer_sets(2) == [(0,), (1,)]
