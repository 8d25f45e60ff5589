"""What the system refuses is one line: a full disk, one that is read only, a limit on files, a folder in use."""

from __future__ import annotations

import fcntl
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import MINI_STUDY

DATA = ("data", "addition", "-n", "2000", "-o", "out.jsonl")
RUN = ("run", "mini.yaml", "--out", "out")

pytestmark = pytest.mark.slow


def told(folder: Path, arguments: tuple[str, ...], limit: Callable[[], None] | None = None) -> str:
    """The one line with which a command is refused; nothing is left behind."""
    before = sorted(folder.rglob("*"))
    command = [sys.executable, "-m", "mnemoscope", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert sorted(folder.rglob("*")) == before
    return done.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("disks cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("arguments", [DATA, RUN], ids=["data", "run"])
def test_a_full_disk(arguments: tuple[str, ...], disk: Path) -> None:
    (disk / "mini.yaml").write_text(MINI_STUDY)
    (disk / "ballast").write_bytes(b"x" * 56 * 1024)
    assert "disk: no space is left" in told(disk, arguments)


@pytest.mark.parametrize("arguments", [DATA, RUN], ids=["data", "run"])
def test_a_disk_that_is_read_only(arguments: tuple[str, ...], disk: Path) -> None:
    (disk / "mini.yaml").write_text(MINI_STUDY)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "Read-only file system" in told(disk, arguments)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    assert "File too large" in told(tmp_path, DATA, limit)


def test_a_folder_in_which_another_run_is_at_work(tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(MINI_STUDY)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "out is in use by another run" in told(tmp_path, RUN)
