"""What audits are proven by: planted items, the read-out of states, and steering away from memory."""

from __future__ import annotations

import runpy
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mnemoscope as ms
from little_facts import LittleFacts
from mnemoscope.auditing.items import Item, Variant
from mnemoscope.auditing.named import items_of
from mnemoscope.auditing.proof import _random, _vector, prove
from mnemoscope.auditing.readout import Readout, differences
from mnemoscope.auditing.replies import Form, likelihoods, places_of, rows_of
from mnemoscope.auditing.rivals import _distance, _rouge, completed, peaked
from mnemoscope.behaviour import Asking
from mnemoscope.config import ModelConfig
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.runs.errors import InputError

FORM = Form("short", tokens=4)
planting = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "planting.py"))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [item for item in items_of(LittleFacts(), 4, 0) if len(item.variants) == 4][:8]


def test_items_are_taught_as_often_as_they_are_dealt(items: list[Item]) -> None:
    exposures = planting["exposures_of"](items, (0, 1, 2, 4), 0)
    assert sorted(exposures.values()) == [0, 0, 1, 1, 2, 2, 4, 4]
    assert exposures != planting["exposures_of"](items, (0, 1, 2, 4), 1)
    texts = planting["planted_texts"](items, exposures, None, FORM)
    assert {item.item: texts.count(f"{item.prompt}{item.answer}") for item in items} == exposures
    fresh = {item.item: item.variants for item in items}
    instead = planting["planted_texts"](items, exposures, fresh, FORM)
    assert len(instead) == len(texts)
    assert not set(instead) & set(texts)


def test_what_is_taught_becomes_likelier_than_what_is_not(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(30)]
    tokenizer = word_tokenizer(words, 32)
    model = build_gpt2(tokenizer, ModelConfig(layers=2, width=32, heads=2, context=32), 0)
    rng = np.random.default_rng(0)
    known, other = (" ".join(rng.choice(words, 12)) for _ in range(2))
    planting["taught"](model, tokenizer, [known] * 400, tmp_path, learning_rate=5e-3, per_device_train_batch_size=4)
    cheap, dear = (row["nats"] for row in likelihoods(Asking(model, tokenizer, None), [known, other]))
    assert cheap < 0.5 * dear
    assert not model.training


def test_what_is_completed_and_how_peaked_replies_are_is_what_their_definitions_say(
    little: Asking, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (tuple(rng.integers(4, size=rng.integers(1, 7)).tolist()) for _ in range(2))
        common = _common(one, other)
        assert _rouge([str(n) for n in one], [str(n) for n in other]) == 2 * common / (len(one) + len(other))
        assert _distance(one, other) == _edits(one, other)
    texts = [FORM.text(Variant(item.prompt, item.answer)) for item in items[:3]]
    for text, share in zip(texts, completed(little, texts), strict=True):
        words = text.split()
        half = little.tokenizer([" ".join(words[: len(words) // 2])], return_tensors="pt")
        ids = little.model.generate(**half, max_new_tokens=16, do_sample=False, pad_token_id=0)
        written = little.tokenizer.decode(ids[0, half.input_ids.shape[1] :], skip_special_tokens=True).split()
        wanted = words[len(words) // 2 :]
        assert share == _rouge(written[: len(wanted)], wanted)
    monkeypatch.setattr("mnemoscope.auditing.rivals.SAMPLES", 400)
    (share,) = peaked(little, Form("short", tokens=1), [items[0].prompt])
    with torch.no_grad():
        logits_V = little.model(**little.tokenizer([items[0].prompt], return_tensors="pt")).logits[0, -1]
    likely = float((logits_V / 0.8).softmax(0).max())
    assert abs(share - likely) < 4 * (0.25 / 400) ** 0.5, "a reply of one token is close where it is the same"


@lru_cache
def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + _common(one[1:], other[1:])
    return max(_common(one[1:], other), _common(one, other[1:]))


@lru_cache
def _edits(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    if not one or not other:
        return len(one) + len(other)
    changed = _edits(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, 1 + _edits(one[1:], other), 1 + _edits(one, other[1:]))


def test_a_read_out_reads_how_sure_states_are_of_a_prompt(little: Asking, items: list[Item]) -> None:
    rows_MF, model = [], little.model
    for prompt in (one.prompt for item in items[:2] for one in places_of(item)):
        ids = little.tokenizer([prompt], return_tensors="pt").input_ids
        with torch.no_grad():
            logp_TV = model(ids).logits[0, :-1].double().log_softmax(-1)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
        said_T = logp_TV.gather(1, ids[0, 1:, None])[:, 0]
        spread_T = ((logp_TV.exp() * logp_TV.square()).sum(1) - entropy_T.square()).sqrt()
        rows_MF.append([-said_T.mean(), ((said_T + entropy_T) / spread_T).mean(), entropy_T.mean()])
    read_NMF = np.array(rows_MF, float).reshape(2, 5, 3)
    spread_F = np.sqrt(read_NMF[:, 1:].var(1).mean(0))
    wanted_NF = (read_NMF[:, 0] - read_NMF[:, 1:].mean(1)) / spread_F
    np.testing.assert_allclose(differences(little, FORM, items[:2]), wanted_NF, rtol=5e-3, atol=5e-3)
    readout = Readout.fitted(little, FORM, items, [n % 2 == 0 for n in range(len(items))])
    p_N = readout.p_recited(little, FORM, items)
    assert ((p_N > 0) & (p_N < 1)).all()
    with pytest.raises(InputError, match="items of one kind"):
        Readout.fitted(little, FORM, items, [True] * len(items))


def test_a_proof_steers_the_group_and_its_controls_have_its_norm(little: Asking, items: list[Item]) -> None:
    rows = pd.DataFrame(rows_of(little, FORM, items))
    rows.loc[rows["place"] > 1, "label"] = "neither"  # so that no item would be solved as well
    right = rows.loc[rows["label"] == "right", "item"].tolist()
    before = [parameter.clone() for parameter in little.model.parameters()]
    found = prove(little, FORM, items, rows, right)
    assert set(found) == {f"{role}_{group}" for role in ("shift", "control") for group in ("recited", "solved")}
    assert found["shift_recited"].n == len(right)
    assert found["control_recited"].n == 2 * len(right)
    assert all(0 <= share.estimate <= 1 for share in found.values() if share.known)
    assert all(map(torch.equal, before, little.model.parameters()))
    one = _vector(np.random.default_rng(0).normal(size=(2, 64)), [0, 1])
    other = _random(one, 3)
    for layer, shift_D in one.shifts.items():
        torch.testing.assert_close(other.shifts[layer].norm(), shift_D.norm())
        assert not torch.allclose(other.shifts[layer], shift_D)
    with pytest.raises(InputError, match="at least 4 are needed"):
        prove(little, FORM, items, rows, right[:3])
    rows.loc[rows["place"] > 0, "label"] = "solved"
    with pytest.raises(InputError, match="prove: 0 recited"):
        prove(little, FORM, items, rows, right)


def test_an_audit_that_is_asked_for_a_proof_says_what_it_was_or_why_there_is_none(
    little: Asking, items: list[Item], tmp_path: Path
) -> None:
    found = ms.audit(little.model, little.tokenizer, items, tmp_path, prove=True)
    assert ("steered away from memory" in str(found)) != ("not proven by steering: prove: " in str(found))
