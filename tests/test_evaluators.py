"""The real lm-evaluation-harness and the real Inspect under our interventions and with our items; skipped without."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from families import WORDS, tiny
from mnemoscope.face.fitted import Fitted
from mnemoscope.models import word_tokenizer
from mnemoscope.runs.errors import InputError
from served import random_run


@pytest.mark.parametrize("low_rank", [False, True])
def test_answers_under_several_hooks_are_those_of_plain_steered_passes(tmp_path: Path, low_rank: bool) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from mnemoscope.serving.lm_eval import SteeredLM

    model, tokenizer = tiny("llama", num_hidden_layers=4), word_tokenizer(WORDS, 64)
    words = WORDS[:6]
    run = random_run(tmp_path, model, tokenizer, layer=1, strength=0.6, low_rank=["memorized"] if low_rank else [])
    steered = SteeredLM(model, run=str(run), toward="memorized", tokenizer=tokenizer, batch_size=3)
    plain = SteeredLM(model, run=str(run), toward="memorized", alpha=0.0, tokenizer=tokenizer)
    assert len(steered.steering.layers) == 2
    asked = [(" ".join(words[: 1 + n % 4]), " " + " ".join(words[-1 - n % 3 :])) for n in range(8)]
    requests: Any = [Instance("loglikelihood", {}, two, n) for n, two in enumerate(asked)]
    found = steered.loglikelihood(requests, disable_tqdm=True)
    for (context, behind), (logp, greedy) in zip(asked, found, strict=True):
        before, all_of = tokenizer(context).input_ids, tokenizer(context + behind).input_ids
        ids = torch.tensor([all_of])
        with torch.no_grad(), steered.steering.apply(model, start=len(before) - 1):
            logits = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        said = ids[0, len(before) :]
        assert logp == pytest.approx(float(logits.gather(1, said[:, None]).sum()), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == said).all())
    unsteered = plain.loglikelihood(requests, disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, unsteered, strict=True)) > 0.01
    [one.save_pretrained(tmp_path / "model") for one in (model, tokenizer)]
    named = SteeredLM(str(tmp_path / "model"), run=str(run), toward="memorized", dtype="float32", batch_size=3)
    assert [logp for logp, _ in named.loglikelihood(requests, disable_tqdm=True)] == pytest.approx(
        [x for x, _ in found]
    )
    until: Any = [Instance("generate_until", {}, (asked[3][0], {"until": ["zzz"], "max_gen_toks": 5}), 0)]
    inputs = tokenizer([asked[3][0]], return_tensors="pt")
    with steered.steering.apply(model):
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    written = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert steered.generate_until(until, disable_tqdm=True) == [written]


def test_a_lever_that_is_no_edit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from mnemoscope.serving.lm_eval import SteeredLM

    model, tokenizer = tiny("llama", num_hidden_layers=4), word_tokenizer(WORDS, 64)
    run = random_run(tmp_path, model, tokenizer, layer=1)
    words = SimpleNamespace(scaled=lambda alpha: SimpleNamespace(contrast="cut", passes=2, lever="decoding"))
    monkeypatch.setattr(Fitted, "lever", lambda self, toward: words)
    with pytest.raises(InputError, match="decoding act on prompts or take two passes"):
        SteeredLM(model, run=str(run), toward="memorized", tokenizer=tokenizer)
    with pytest.raises(InputError, match="batch_size: auto is no number"):
        SteeredLM(model, run=str(run), toward="memorized", tokenizer=tokenizer, batch_size="auto")


@pytest.mark.filterwarnings("default")  # of the libraries that it needs
def test_inspect_counts_what_is_solved_and_what_is_recited(tmp_path: Path) -> None:
    """By a model of Inspect's own that gives the answers it is told to."""
    pytest.importorskip("inspect_ai")
    from inspect_ai import eval as evaluated
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from mnemoscope.auditing.inspect import recited

    variants = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in (5, 6, 7)]
    (tmp_path / "items.jsonl").write_text(
        json.dumps({"item": "sum", "prompt": "2 + 1 =", "answer": "3", "variants": variants})
    )
    said = [ModelOutput.from_content("mockllm/model", text) for text in ("#### 3", "so 6", "3", "none")]
    for one in said:  # else it asks a server how many tokens these are
        one.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    (log,) = evaluated(
        recited(str(tmp_path / "items.jsonl"), answers="number"),
        model=get_model("mockllm/model", custom_outputs=said),
        log_dir=str(tmp_path / "logs"),
        display="none",
        max_connections=1,
        max_samples=1,
    )
    assert log.status == "success", log.error
    assert log.results is not None
    found = {name: one.value for score in log.results.scores for name, one in score.metrics.items()}
    assert found == {
        "originals_right": 1.0,
        "variants_solved": pytest.approx(1 / 3),
        "variants_recited": pytest.approx(1 / 3),
    }
