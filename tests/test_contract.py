"""The contract of interventions, for every method there is, and for those that a test plants."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

import mnemoscope as ms
from arena_lists import LONGEST, PLANTED, SIZES, ids_of, labels_by, plainly
from families import tiny
from helpers import hook_count
from little_facts import LittleFacts
from mnemoscope.behaviour import Asking, score, without_prefix
from mnemoscope.bench.answers import NOTHING, scores, texts_of
from mnemoscope.bench.lists import DrawnBench
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import Gate, Intervention, SteeringVector, Toward, load_intervention
from mnemoscope.interventions.artefact import tensors_file
from mnemoscope.interventions.methods import method_names, name_of
from mnemoscope.models import backbone_of
from mnemoscope.runs.errors import InputError

Fitted = dict[tuple[str, Toward], Intervention]
# These change no pass.
ASKING = ("prompt", "few-shot", "delete", "cad", "cad-bare", "adacad", "coiecd", "grd", "nwcad", "fides", "sharper")
EVERY = [*method_names(), *map(name_of, PLANTED)]


def few(bench: DrawnBench, name: str = "conflict", n: int = 8) -> Prompts:
    return bench.test[name].of(range(min(n, len(bench.test[name]))))


@pytest.mark.parametrize("method", EVERY)
def test_labels_are_those_of_greedy_decoding(bench: DrawnBench, fitted: Fitted, method: str) -> None:
    asking = bench.asking
    for toward, name in (("generalized", "conflict"), ("memorized", "conflict"), ("memorized", "bare")):
        one, prompts = fitted[method, toward], few(bench, name)  # type: ignore[index]
        ids = [ids_of(asking, text) for text in texts_of(one, prompts, LONGEST).texts]
        ends = [next((i for i, token in enumerate(row) if token in asking.boundary_ids()), None) for row in ids]
        # A text is shown without its end token, which closes an answer as well.
        answers = [
            row[: end + 1] if end is not None else [*row, asking.boundary_ids()[0]]
            for row, end in zip(ids, ends, strict=True)
        ]
        assert scores(one, prompts).behaviour_N.tolist() == labels_by(asking, prompts, lambda n, a=answers: a[n])
    assert hook_count(asking.model) == 0


@pytest.mark.parametrize("method", EVERY)
def test_strength_zero_is_the_model_itself_bit_by_bit(bench: DrawnBench, fitted: Fitted, method: str) -> None:
    model, prompts = bench.asking.model, few(bench)
    ids = ids_of(bench.asking, prompts.examples[0].prompt)
    plain, nothing = plainly(model, ids), fitted[method, "generalized"].scaled(0.0)
    with nothing.apply(model):
        assert torch.equal(plainly(model, ids), plain)
    assert scores(nothing, prompts).behaviour_N.tolist() == scores(NOTHING, prompts).behaviour_N.tolist()
    assert texts_of(nothing, prompts, LONGEST).texts == texts_of(NOTHING, prompts, LONGEST).texts


@pytest.mark.parametrize("method", EVERY)
def test_a_batch_is_its_prompts_one_by_one_cached_or_not(bench: DrawnBench, fitted: Fitted, method: str) -> None:
    one, prompts = fitted[method, "memorized"], few(bench)
    together = scores(one, prompts).behaviour_N.tolist()
    alone = [scores(one, prompts.of([n])).behaviour_N[0] for n in range(len(prompts))]
    assert together == alone
    if not one.contrast and not one.in_one_go and not one.everywhere:
        uncached = [without_prefix(batch) for batch in prompts.batches]
        found = score(bench.asking, uncached, margins=False, applied=lambda: one.apply(bench.asking.model))
        assert found.behaviour_N.tolist() == together


@pytest.mark.parametrize("method", EVERY)
def test_what_is_saved_comes_back_as_it_was(bench: DrawnBench, fitted: Fitted, method: str, tmp_path: Path) -> None:
    asking, prompts = bench.asking, few(bench)
    one = fitted[method, "memorized"].bound_to(asking.model, asking.tokenizer)
    path = tmp_path / "one.safetensors"
    one.save(path)
    back = load_intervention(path, asking.model, asking.tokenizer)
    assert type(back) is type(one)
    assert back.facts() == one.facts()
    assert all(torch.equal(part, back.tensors()[name]) for name, part in one.tensors().items())
    assert scores(back, prompts).behaviour_N.tolist() == scores(one, prompts).behaviour_N.tolist()
    described = tensors_file(path).with_suffix(".json")
    described.write_text(described.read_text().replace(f'"{one.method}"', '"another"', 1))
    with pytest.raises(InputError, match="digest"):
        load_intervention(path)


@pytest.mark.parametrize("method", ["prompt", "cad", "lora"])
def test_a_fresh_process_loads_every_kind(bench: DrawnBench, fitted: Fitted, method: str, tmp_path: Path) -> None:
    one = fitted[method, "memorized"]  # type: ignore[index]
    one.save(tmp_path / "one.safetensors")
    code = "import pathlib, sys; from mnemoscope.interventions import load_intervention as load; "
    code += "print(load(pathlib.Path(sys.argv[1])).lever)"
    asked = [sys.executable, "-c", code, str(tmp_path / "one.safetensors")]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == one.lever


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_peft_opens_the_folder_of_an_adapter(bench: DrawnBench, fitted: Fitted, tmp_path: Path) -> None:
    one, model = fitted["lora", "memorized"], bench.asking.model
    inputs = bench.asking.padded([e.prompt for e in bench.test["conflict"].examples[:4]])
    for name in ("one", "one/adapter_model.safetensors"):  # the latter where a card is written into it
        one.save(tmp_path / name)
    assert not any(path.is_dir() for path in (tmp_path / "one").iterdir())
    with torch.no_grad():
        with one.apply(model):
            mine = model(**inputs).logits
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "one").eval()(**inputs).logits
        plain = model(**inputs).logits
    assert not torch.equal(plain, mine)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", EVERY)
def test_the_passes_that_it_claims_are_those_that_are_counted(
    bench: DrawnBench, fitted: Fitted, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model, for each token that is generated."""
    one, prompts = fitted[method, "generalized"], few(bench, n=3)
    passes = list[int]()
    handle = backbone_of(bench.asking.model).register_forward_hook(lambda *_: passes.append(1))
    counted = {}
    for tokens in (1, 3):
        passes.clear()
        longest = max(len(ids_of(bench.asking, text)) for text in texts_of(one, prompts, tokens).texts)
        counted[tokens] = len(passes) - 1  # the last reads what was written, without the intervention
    handle.remove()
    more = counted[3] - counted[1]
    assert counted[1] == one.passes
    assert more % one.passes == 0
    assert 0 <= more <= 2 * one.passes
    assert longest <= 3


@pytest.mark.parametrize("method", [name for name in EVERY if name not in ASKING])
def test_a_context_in_which_no_pass_ran_says_so(bench: DrawnBench, fitted: Fitted, method: str) -> None:
    model = bench.asking.model
    with pytest.raises(InputError, match="no pass of it ran"), fitted[method, "generalized"].apply(model):
        pass
    assert hook_count(model) == 0


def test_a_copy_that_was_compiled_before_is_not_answered_unsteered() -> None:
    model, ids = tiny("gpt2"), torch.tensor([[3, 4, 5]])
    vector = SteeringVector("generalized", {0: torch.ones(32)})
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(input_ids=ids)
        with pytest.raises(InputError, match="no pass of it ran"), vector.apply(model):
            compiled(input_ids=ids)


@pytest.mark.parametrize("method", EVERY)
def test_it_is_refused_where_a_model_cannot_take_it(fitted: Fitted, bench: DrawnBench, method: str) -> None:
    one = fitted[method, "generalized"]
    if isinstance(one, SteeringVector):
        far = replace(one, edits={99: next(iter(one.edits.values()))})
        with pytest.raises(InputError, match="layers: 99 is not in"):
            far.check_shape(bench.asking.model)
    else:
        one.check_shape(bench.asking.model)


def test_planted_methods_run_through_an_arena_a_study_and_the_command_line(
    little: Asking, mini: Callable[[str], Asking], shared_folder: Path, mini_study_file: Path, tmp_path: Path
) -> None:
    """One new file each, nothing else changed: fit, choice, judge, report, save, load, gate."""
    sizes = SIZES | {"varied": 0, "written": 4, "cuts": 2, "controls": 1}
    page = ms.arena(little.model, little.tokenizer, LittleFacts(), tmp_path / "arena", methods=PLANTED, sizes=sizes)
    assert all(name_of(path) in page.read_text() for path in PLANTED)
    results = json.loads((tmp_path / "arena" / "arena" / "results.json").read_text())
    assert set(results["methods"]) == set(map(name_of, PLANTED))
    asking, raw = mini("addition"), yaml.safe_load(mini_study_file.read_text())
    cell = raw["cells"]["addition"]
    cell["steering"]["methods"] = ["planted.last_pair", "planted.clamp"]
    cell["steering"]["grids"] = {"block": {"layers": ["all"], "tops": [0.5], "strengths": [0.1, 0.3]}}
    cell |= {"effects": {"pairs": 10, "doses": [0, 1], "ablated": [0.1], "draws": 1, "patched": False}}
    cell |= {"detection": {"fitted": False}, "neutral": {"cuts": 0}, "samples": {"prompts": 0}}
    cell["model"] = {"folder": str(shared_folder / "mini-addition")}
    del cell["training"]
    study, run = tmp_path / "study.yaml", tmp_path / "run"
    study.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "mnemoscope", "run", str(study), "--out", str(run)]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    assert refused.returncode == 2
    assert "importing it would run its code" in refused.stderr
    command += ["--allow-code", "planted.last_pair", "--allow-code", "planted.clamp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "results.json").read_text())["tasks"]["addition"]["steering_by_method"]
    assert set(found) == {"last-pair", "clamp"}
    (vectors,) = run.glob("cells/*/vectors")
    one = ms.SteeringVector.load(vectors / "to_generalized-clamp.safetensors", asking.model, asking.tokenizer)
    prompts = asking.padded(["12+34=", "56+21="])
    with torch.no_grad():
        plain = asking.model(**prompts).logits
        with one.apply(asking.model):
            steered = asking.model(**prompts).logits
        for acts, wanted in ((False, plain), (True, steered)):
            gate = Gate("block", 0, lambda states_ND, acts=acts: torch.full((len(states_ND),), acts))  # type: ignore[misc]
            with one.apply(asking.model, gate=gate):
                assert torch.equal(asking.model(**prompts).logits, wanted)
    assert not torch.equal(steered, plain)
