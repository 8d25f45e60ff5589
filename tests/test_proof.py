"""`mnemoscope doctor --server`: an honest server passes, and each planted fault is found by the check that is for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import mnemoscope as ms
from little_facts import SUBJECTS, VALUES, VOCABULARY
from mnemoscope.config import ModelConfig
from mnemoscope.errors import InputError
from mnemoscope.models import build_gpt2, load_model, word_tokenizer
from mnemoscope.serving.client import Server
from mnemoscope.serving.expected import Request
from mnemoscope.serving.proof import Proof, cost, prove
from served import random_run
from stand_in import Fault, serving
from test_cli import call

PROMPTS = [
    f"{label} : {SUBJECTS[n]} has {VALUES[n]} . question {SUBJECTS[n]} ?" if n % 2 else f"quiz {SUBJECTS[n]} ?"
    for n, label in enumerate(("note", "rumour", "memo", "joke", "report", "novel"))
]
# The checks that must find a fault; others may find it too.
FOUND_BY: dict[Fault, set[str]] = {
    "hooks removed": {"steered = transformers'"},
    "alpha ignored": {"steered = transformers'"},
    "wrong layer": {"steered = transformers'"},
    "rows mixed up": {"steered = transformers'", "unsteered among steered = untouched"},
    "no cache separation": {"follow-up after steering = fresh"},
    "anything is taken": {"refused = refused"},
    "another reading": {"read = detect"},
    "gate always open": {"gate as in transformers"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that is sure of what it says, and a run of random vectors and detectors."""
    tokenizer = word_tokenizer(VOCABULARY, 160)
    model = build_gpt2(tokenizer, ModelConfig(layers=4, width=32, heads=2, context=160), 0).eval()
    model.transformer.wte.weight.data *= 8
    out = tmp_path_factory.mktemp("proof")
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return out / "model", random_run(out / "run", model, tokenizer, 1)


@pytest.fixture(scope="module")
def fitted(folders: tuple[Path, Path]) -> ms.Fitted:
    folder, run = folders
    return ms.Fitted.open(run, *load_model(folder))


def proofs(fitted: ms.Fitted, folders: tuple[Path, Path], fault: Fault) -> dict[str, Proof]:
    with serving(*folders, fault) as (url, _):
        server = Server(url)
        return {proof.name.partition(" (")[0]: proof for proof in prove(server.ask, fitted, PROMPTS, server.room)}


def test_an_honest_server_passes_and_each_check_could_have_failed(
    fitted: ms.Fitted, folders: tuple[Path, Path]
) -> None:
    found = proofs(fitted, folders, "none")
    assert list(found) == [
        "unsteered = transformers'",
        "steered = transformers'",
        "unsteered among steered = untouched",
        "chunked = whole",
        "cached = uncached",
        "follow-up after steering = fresh",
        "refused = refused",
        "read = detect",
        "gate as in transformers",
    ]
    assert [proof for proof in found.values() if not proof.passed] == []
    for name in ("steered = transformers'", "follow-up after steering = fresh", "read = detect"):
        assert found[name].visible > 20 * found[name].allowed


@pytest.mark.parametrize("fault", list(FOUND_BY))
def test_a_planted_fault_is_found(fitted: ms.Fitted, folders: tuple[Path, Path], fault: Fault) -> None:
    found = proofs(fitted, folders, fault)
    failed = {name for name, proof in found.items() if not proof.passed}
    assert failed >= FOUND_BY[fault]
    assert found["unsteered = transformers'"].passed
