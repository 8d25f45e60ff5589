"""Vectors on a model hub: what is put there, what comes back, what a hub refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mnemoscope.interventions import Card, SteeringVector
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.export import fetch, push

VECTOR = SteeringVector("generalized", {1: torch.ones(32)})


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("no/such/form", "'no/such/form' is not of the form owner/name"),
        ("owner/name", "owner/name cannot be reached on the hub"),
    ],
)
def test_what_a_hub_refuses_is_one_line(
    tmp_path: Path, repo_id: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    VECTOR.save(tmp_path / "v.safetensors")
    for call in (lambda: fetch(repo_id, "v.safetensors"), lambda: push(tmp_path / "v.safetensors", repo_id)):
        with pytest.raises(InputError, match=f"^repo_id: {message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_what_is_pushed_comes_back_and_its_page_shows_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here; what is put there is what the patterns let through."""
    store, mine = tmp_path / "store", tmp_path / "mine"
    for folder in (store, mine):
        folder.mkdir()

    class Api:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            assert (repo_id, private, exist_ok) == ("owner/name", True, True)

        def upload_file(self, repo_id: str, path_in_repo: str, path_or_fileobj: bytes) -> None:
            (store / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str] | None) -> str:
            for path in folder_path.iterdir():
                if allow_patterns is None or path.name in allow_patterns:
                    shutil.copy(path, store)
            return f"hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, allow_patterns: str(store))
    (mine / "private.txt").touch()
    with pytest.raises(InputError, match=r"^path: .* does not exist"):
        push(tmp_path / "absent", "owner/name")
    card = Card("sums, seed 0, smollm2", {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 20}, pairs=30, groups=10)
    file, described = replace(VECTOR, card=card).save(mine / "v.safetensors")
    assert push(str(file), "owner/name") == "hub/owner/name"
    assert sorted(path.name for path in store.iterdir()) == ["README.md", "v.json", "v.safetensors"]
    assert (store / "README.md").read_text() == f"# v\n\n```text\n{card}\n```\n"
    again = SteeringVector.load(fetch("owner/name", "v.safetensors"))
    assert torch.equal(again.shifts[1], VECTOR.shifts[1])
    with pytest.raises(InputError, match=r"^name: owner/name has no file w\.safetensors"):
        fetch("owner/name", "w.safetensors")
    push(mine, "owner/name")
    assert (store / "private.txt").exists()
    described.write_text("{")
    with pytest.raises(InputError, match=r"v\.json: not JSON"):
        push(file, "owner/name")
