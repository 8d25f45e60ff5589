"""What the system refuses is one line: a full disk, one that is read only, a limit on files, a folder in use."""

from __future__ import annotations

import fcntl
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import MINI_STUDY
from mnemoscope.cli import app

DATA = ("data", "addition", "-n", "2000", "-o", "out.jsonl")
RUN = ("run", "mini.yaml", "--out", "out")
pytestmark = pytest.mark.faults


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB with a study, and little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=False).returncode:
        pytest.skip("disks cannot be mounted here")
    (folder / "mini.yaml").write_text(MINI_STUDY)
    (folder / "ballast").write_bytes(b"x" * 56 * 1024)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_refused(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    """A command is refused in one line and leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("arguments", [DATA, RUN], ids=["data", "run"])
def test_a_disk_that_is_full_or_read_only(arguments: tuple[str, ...], disk: Path) -> None:
    check_refused(disk, arguments, "disk: no space is left")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    check_refused(disk, arguments, "Read-only file system")


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        check_refused(tmp_path, DATA, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_in_which_another_run_is_at_work(tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(MINI_STUDY)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_refused(tmp_path, RUN, "out is in use by another run")
