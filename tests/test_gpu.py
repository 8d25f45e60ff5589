"""On an accelerator: opening, hooks, precision, static caches, several devices, labels, a miniature fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mnemoscope as ms
from families import prompts, tiny, tokenizer
from helpers import MINI_TASKS, label, mini_examples
from mnemoscope.behaviour import Asking, decode
from mnemoscope.face.doctor import examine
from mnemoscope.face.recipe import ONE_LAYER
from mnemoscope.interventions import SteeringVector
from mnemoscope.models import load_model
from mnemoscope.tasks import build_task
from mnemoscope.tasks.jsonl import write_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator on this machine"),
]
FAMILIES = ("gpt2", "llama", "gemma2")


def saved(folder: Path, model: Any, words: Any) -> str:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_accelerator_is_well(family: str, dtype: Any, tmp_path: Path) -> None:
    model, words = load_model(saved(tmp_path, tiny(family), tokenizer()), dtype=dtype, device_map="cuda")
    assert model.device.type == "cuda"
    assert [check for check in examine(model, words, prompts()) if not check.passed] == []


def test_a_static_cache_which_would_be_compiled_is_steered_like_a_growing_one() -> None:
    model, words = tiny("llama").cuda(), tokenizer()
    inputs = words(prompts(), return_tensors="pt", padding=True).to("cuda")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    vector = SteeringVector("generalized", {1: torch.arange(32.0)})
    plain = model.generate(**inputs, **options, cache_implementation="static")  # compiles its steps
    with vector.apply(model):
        growing, static = (
            model.generate(**inputs, **options, **one) for one in ({}, {"cache_implementation": "static"})
        )
    assert torch.equal(growing, static)
    assert not torch.equal(static, plain)


def test_labels_are_what_generate_answers(mini: Callable[[str], Asking]) -> None:
    asking = mini("addition")
    there = replace(asking, model=tiny_copy(asking.model).cuda())
    examples = [e for e in mini_examples("addition", 200) if e.kind == "conflict"]
    found = label(there, examples)
    spoken = ["".join(text.split()) for text in decode(there, examples)]
    for behaviour, text, example, tie in zip(found.behaviour_N, spoken, examples, found.tie_N, strict=True):
        names = {"".join(str(getattr(example, key)).split()): key for key in ("memorized", "generalized")}
        assert tie or behaviour == names.get(text, "other")
    assert (found.behaviour_N == label(asking, examples).behaviour_N)[~found.tie_N].mean() > 0.99


def tiny_copy(model: Any) -> Any:
    """The same model, which other tests go on using where it is."""
    copied = type(model)(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied


def test_a_miniature_fit(mini: Callable[[str], Asking], tmp_path: Path) -> None:
    asking = mini("addition")
    task = build_task("addition", MINI_TASKS["addition"], 0)
    rng = np.random.default_rng(0)
    examples = [e for kind in ("conflict", "novel") for e in task.examples(rng, 300, kind)]
    examples += [task.rephrase(e, rng) for e in examples if e.kind == "conflict"]
    (tmp_path / "sums.jsonl").write_text(write_jsonl(examples))
    model = tiny_copy(asking.model).cuda()
    fitted = ms.fit(model, asking.tokenizer, tmp_path / "sums.jsonl", out=tmp_path / "run", settings=ONE_LAYER)
    assert set(fitted.vectors) == {"generalized", "memorized"}
    assert 0 <= fitted.detect(["12+34="]).p_memorized[0] <= 1
    with fitted.steer("generalized"):
        assert model.generate(**fitted.inputs(["12+34="]), max_new_tokens=4).shape[0] == 1
