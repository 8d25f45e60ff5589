"""`mnemoscope doctor --server`: an honest server passes; each planted fault is found by the check that is for it."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mnemoscope as ms
from little_facts import SUBJECTS, VALUES, VOCABULARY
from mnemoscope.config import ModelConfig
from mnemoscope.interventions import Binding
from mnemoscope.models import build_gpt2, load_model, word_tokenizer
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.locks import locked
from mnemoscope.serving.certificate import certify
from mnemoscope.serving.client import Server
from mnemoscope.serving.proof import prove
from mnemoscope.serving.served import Proof
from served import random_run
from stand_in import Fault, serving
from test_cli import call

PROMPTS = [
    f"{label} : {SUBJECTS[n]} has {VALUES[n]} . question {SUBJECTS[n]} ?" if n % 2 else f"quiz {SUBJECTS[n]} ?"
    for n, label in enumerate(("note", "rumour", "memo", "joke"))
]
CHECKS = (
    "unsteered = transformers'",
    "steered = transformers'",
    "unsteered among steered = untouched",
    "chunked = whole",
    "cached = uncached",
    "follow-up after steering = fresh",
    "refused = refused",
    "read = detect",
    "gate as in transformers",
)
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
    tokenizer = word_tokenizer(VOCABULARY, 128)
    model = build_gpt2(tokenizer, ModelConfig(layers=4, width=32, heads=2, context=128), 0).eval()
    model.transformer.wte.weight.data *= 8
    out = tmp_path_factory.mktemp("proof")
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return out / "model", random_run(out / "run", model, tokenizer, 1)


@pytest.fixture(scope="module")
def fitted(folders: tuple[Path, Path]) -> ms.Fitted:
    folder, run = folders
    return ms.Fitted.open(run, *load_model(folder))


def proofs(fitted: ms.Fitted, folders: tuple[Path, Path], fault: Fault, last: str = "") -> dict[str, Proof]:
    """By name, up to the last one that is wanted."""
    found: dict[str, Proof] = {}
    with serving(*folders, fault) as (url, _):
        server = Server(url)
        for proof in prove(server.ask, fitted, PROMPTS, server.room):
            found[name := proof.name.partition(" (")[0]] = proof
            if name == last:
                break
    return found


def test_an_honest_server_passes_and_each_check_could_have_failed(
    fitted: ms.Fitted, folders: tuple[Path, Path]
) -> None:
    found = proofs(fitted, folders, "none")
    assert tuple(found) == CHECKS
    assert [proof for proof in found.values() if not proof.passed] == []
    for name in ("steered = transformers'", "follow-up after steering = fresh", "read = detect"):
        assert found[name].visible > 20 * found[name].allowed


def test_vectors_that_shift_every_token_are_proven_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = folders[0]
    everywhere = folder, random_run(tmp_path / "run", *load_model(folder), 1, strength=0.1, positions="all")
    fitted = ms.Fitted.open(everywhere[1], *load_model(folder))
    found = proofs(fitted, everywhere, "none")
    assert [proof for proof in found.values() if not proof.passed] == []
    assert not any(name.startswith("gate") for name in found)  # it would have to be known before the prompt is read
    assert not proofs(fitted, everywhere, "wrong layer", "steered = transformers'")["steered = transformers'"].passed


@pytest.mark.parametrize("fault", list(FOUND_BY))
def test_a_planted_fault_is_found(fitted: ms.Fitted, folders: tuple[Path, Path], fault: Fault) -> None:
    found = proofs(fitted, folders, fault, max(FOUND_BY[fault], key=CHECKS.index))
    assert {name for name, proof in found.items() if not proof.passed} >= FOUND_BY[fault]
    assert found["unsteered = transformers'"].passed


def asked(url: str, folders: tuple[Path, Path], *more: str) -> tuple[int, str, str]:
    folder, run = folders
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    return call("doctor", "--server", url, "--from", str(run), "--model", str(folder), *prompts, *more)


def test_the_command_prints_a_table_or_json_and_fails_where_a_check_does(folders: tuple[Path, Path]) -> None:
    with serving(*folders) as (url, inside):
        code, out, _ = asked(url, folders)
        assert (code, out.count("ok  "), out.count("FAIL")) == (0, len(CHECKS), 0)
        assert "a steered token takes" in out
        assert inside.largest > 4
        assert inside.answered < 300
    with serving(*folders, "hooks removed") as (url, _):
        code, out, _ = asked(url, folders, "--json")
    found = json.loads(out)
    assert (code, found["passed"], len(found["checks"])) == (1, False, len(CHECKS))
    assert {check["name"] for check in found["checks"] if not check["passed"]} >= {"steered = transformers'"}


def test_what_a_server_was_proven_with_says_so_in_its_cards(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = folders[0], Path(shutil.copytree(folders[1], tmp_path / "run"))
    with serving(folder, run, "hooks removed") as (url, _):
        code, out, _ = asked(url, (folder, run), "--certify")
        assert (code, ".json" in out) == (1, False)
    for source in (run, next(run.rglob("to_generalized-nmd.safetensors"))):
        with serving(folder, source) as (url, _):
            code, out, _ = asked(url, (folder, source), "--certify")
        assert code == 0
        written = [Path(line) for line in out.splitlines() if line.endswith(".json")]
        assert len(written) == (4 if source == run else 1)
        for path in written:
            card = json.loads(path.read_text())["card"]
            assert card["proven"].keys() == {"vLLM 0.0"}
            assert card["proven"]["vLLM 0.0"].startswith(f"float32, {len(CHECKS) if source == run else 7} checks of ")
        before, after = (ms.Fitted.open(one, *load_model(folder)) for one in (folders[1], run))
        assert "proven on vLLM 0.0: float32" in str(after.vectors["generalized"].card)
        for toward, vector in before.vectors.items():
            assert after.vectors[toward].tensors().keys() == vector.tensors().keys()
            for name, tensor in vector.tensors().items():
                assert torch.equal(after.vectors[toward].tensors()[name], tensor)


def test_cards_of_a_run_in_use_stay_as_they_are(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(folders[1], tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    binding, shown = Binding.of(*load_model(folders[0])), Proof("steered = transformers'", 0.0, 1.0, 4, 0, 0, 9.0)
    with locked(run, lambda: True), pytest.raises(InputError, match=r"run is in use by another run$"):
        certify(run, binding, "vLLM 0.0", "float32", [shown])
    failed = replace(shown, wrong=1)
    for proofs_of, message in (([], "nothing was shown"), ([shown, failed], "steered = transformers' was not shown")):
        with pytest.raises(InputError, match=f"^certify: {message}; a certificate"):
            certify(run, binding, "vLLM 0.0", "float32", proofs_of)
    assert {path: path.read_bytes() for path in run.rglob("*.json")} == before
    assert len(certify(run, binding, "vLLM 0.0", "float32", [shown])) == 4


def test_what_cannot_be_proven_is_one_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = folders

    def refused(*arguments: str) -> str:
        code, _, err = call("doctor", *arguments)
        assert code == 2
        assert err.startswith("error: ")
        return err.splitlines()[-1].removeprefix("error: ")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    whole = ("--from", str(run), "--model", str(folder))
    assert refused("--server", nobody, *whole).startswith(f"server: {nobody} does not answer (")
    assert refused("--server", "127.0.0.1:8000", *whole).startswith("server: '127.0.0.1:8000' is no address")
    assert refused("--server", nobody).startswith("from: missing")
    assert refused("--server", nobody, "--from", str(tmp_path / "none")).endswith("does not exist")
    assert refused("--from", str(run)).startswith("--from: is for a server")
    assert refused(str(folder), "--certify").startswith("--certify: is for a server")
    assert refused().startswith("MODEL: missing")
    with serving(*folders) as (url, _):
        assert refused("--server", url, "--from", str(run)).startswith(f"model: {run} holds no model; name")
        assert "is neither a vector" in refused("--server", url, "--from", str(tmp_path), "--model", str(folder))
        one = [part for part in ("--prompt", PROMPTS[0])]
        assert refused("--server", url, *whole, *one).startswith("prompts: give at least two")
        far = ["--prompt", PROMPTS[0], "--prompt", " ".join(PROMPTS * 4)]
        assert refused("--server", url, *whole, *far).startswith("prompts: the longest has")
        detector = next(run.rglob("detector.safetensors"))
        assert refused("--server", url, "--from", str(detector), "--model", str(folder)).startswith("from: ")
    with serving(*folders, "no plugin") as (url, _):
        assert refused("--server", url, *whole, *far[:2], *one, "--prompt", PROMPTS[1]).startswith(
            "server: has no plugin"
        )
