"""What is renamed into place is on the disk before its name is: a model of a disk that keeps only what was flushed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemoscope.runs.files import new_folder, write_atomically
from mnemoscope.runs.locks import locked

FLUSH = os.fsync


class Disk:
    """What a power cut leaves: of a file the bytes, and of a folder the names, of their last flush."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {}
        self.torn: list[str] = []  # names that were on the disk before their bytes were

    def flush(self, place: int) -> None:
        """Stands in for ``os.fsync``, and does it."""
        FLUSH(place)
        path, number = Path(os.readlink(f"/proc/self/fd/{place}")), os.fstat(place).st_ino
        if not path.is_dir():
            self.files[number] = path.read_bytes()
            return
        inside = {entry.name: entry for entry in os.scandir(path)}
        self.folders[number] = {name: entry.inode() for name, entry in inside.items()}
        files = [entry for entry in inside.values() if entry.is_file() and not entry.name.startswith(".")]
        self.torn += [entry.name for entry in files if self.files.get(entry.inode()) != Path(entry).read_bytes()]

    def read(self, path: Path) -> bytes | None:
        """The bytes of a file after a power cut; None where it, or a folder above it, has no name there."""
        number = self.root.stat().st_ino
        for name in path.relative_to(self.root).parts:
            found = self.folders.get(number, {}).get(name)
            if found is None:
                return None
            number = found
        return self.files.get(number)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(tmp_path)
    monkeypatch.setattr(os, "fsync", made.flush)
    return made


def write_with_a_library(path: Path) -> None:
    path.write_bytes(b"columns")


@pytest.mark.parametrize(("content", "expected"), [(b"bytes", b"bytes"), (write_with_a_library, b"columns")])
def test_a_file_survives_a_power_cut(
    content: bytes | Callable[[Path], Any], expected: bytes, disk: Disk, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "folders" / "facts.json"
    write_atomically(path, content)
    assert disk.read(path) == expected
    write_atomically(path, b"later")
    assert disk.read(path) == b"later"
    assert disk.torn == []


def test_a_folder_survives_a_power_cut(disk: Disk, tmp_path: Path) -> None:
    with new_folder(tmp_path / "cells" / "model") as temporary:
        (temporary / "inside").mkdir()
        (temporary / "weights").write_bytes(b"1")
        (temporary / "inside" / "words").write_bytes(b"2")
        (temporary / "weights").chmod(0o600)  # as safetensors does
    weights, words = (tmp_path / "cells" / "model" / name for name in ("weights", "inside/words"))
    assert (disk.read(weights), disk.read(words)) == (b"1", b"2")
    assert len({path.stat().st_mode for path in (weights, words, write_atomically(tmp_path / "plain", b""))}) == 1


@pytest.mark.parametrize("error", [ValueError("refused"), KeyboardInterrupt()])
def test_folders_that_were_made_for_nothing_go_again(error: BaseException, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise error

    with pytest.raises(type(error)):
        write_atomically(tmp_path / "a" / "b" / "c.json", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("worth", [True, False])
def test_only_what_is_worth_keeping_is_left_of_what_is_refused(worth: bool, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("before")
    begun: list[bool] = []

    def refused() -> None:
        (tmp_path / "cells" / "one").mkdir(parents=True)
        (tmp_path / "study.yaml").write_text("after")
        begun.append(True)
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"), locked(tmp_path, lambda: bool(begun) and worth):
        refused()
    assert (tmp_path / "cells").exists() == worth
    assert (tmp_path / "study.yaml").read_text() == ("after" if worth else "before")
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "stopped", lambda: False):
        raise KeyboardInterrupt
    assert not (tmp_path / "stopped").exists(), "nothing was done"
