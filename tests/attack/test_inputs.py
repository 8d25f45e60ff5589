"""Every bad input is one line and exit code 2, soon, and leaves nothing behind.

The whole table (`make attack`) in child processes: a few hundred commands have one of their own, the others share some.
The usual suite takes a sample.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attack_inputs
import attack_runs
import pytest
from attack_inputs import Attack

WHOLE = os.environ.get("MNEMOSCOPE_ATTACK") == "whole"
EVERY = 1 if WHOLE else 53  # of the inputs
ALONE = 4 if WHOLE else 8  # of those that open no model, every so many have a process of their own
LIMIT = 10  # seconds of a processor: the machine may be busy with other things
PATIENCE = 180  # seconds, the imports of a process included
CHILD = Path(__file__).with_name("attack_child.py")
COMMAND = [sys.executable, "-m", "mnemoscope"]
HERE = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.slow


def prepared(attack: Attack, folder: Path, run: Path) -> None:
    """Make the files that the command finds; of a run those that are not changed are linked."""
    folder.mkdir()
    if any(name.startswith("run/") for name in attack.files):
        shutil.copytree(run, folder / "run", copy_function=os.link)
    for name, content in attack.files.items():
        path = folder / name
        if callable(content):
            content(path)
            continue
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    if (folder / "run").is_dir() and "run/.x" not in attack.files:
        attack_runs.sign(folder)


def listing(folder: Path) -> dict[str, Any]:
    """All files of a folder, with their sizes and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, path.is_dir() or (status.st_size, status.st_mtime_ns))
    return found


def alone(attack: Attack, folder: Path) -> dict[str, Any]:
    """The command in a process of its own."""
    try:
        done = subprocess.run(
            [*COMMAND, *attack.arguments],
            **{"cwd": folder, "env": HERE, "capture_output": True, "check": False, "timeout": PATIENCE},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT)),
        )
    except (subprocess.TimeoutExpired, ValueError) as error:
        return {"code": None, "stderr": f"{type(error).__name__}\n"}
    return {"code": done.returncode, "stderr": done.stderr.decode(errors="replace")}


class Shared:
    """A process for many commands, begun anew where one does not end."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, attack: Attack, folder: Path) -> dict[str, Any]:
        """Run a command."""
        if self.process is None:
            pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
            self.process = subprocess.Popen([sys.executable, str(CHILD)], env=HERE, text=True, **pipes)
            self.run(Attack("first", ("doctor", str(folder))), folder)  # imports the libraries
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        raw = [a if isinstance(a, bytes) else os.fsencode(a) for a in attack.arguments]
        self.process.stdin.write(json.dumps([str(folder), [a.hex() for a in raw]]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline() if select.select([self.process.stdout], [], [], PATIENCE)[0] else ""
        if not line:
            self.end()
            return {"code": None, "stderr": "it did not end\n"}
        return dict(json.loads(line))

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()
            self.process = None


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    made = Shared()
    yield made
    made.end()


def failures(chosen: list[Attack], run: Path, shared: Shared, folder: Path) -> list[str]:
    """What went wrong, a line each."""
    found, number_alone = [], 0
    for number, attack in enumerate(chosen):
        here = folder / str(number)
        prepared(attack, here, run)
        before = listing(here)
        number_alone += not attack.opens
        ended = (alone if not attack.opens and number_alone % ALONE == 0 else shared.run)(attack, here)
        told = ended["stderr"]
        wrong = [f"exit code {ended['code']}"] if ended["code"] != attack.code else []
        wrong += ["too long"] if ended.get("seconds", 0) > LIMIT else []
        wrong += ["a traceback"] if "Traceback" in told else []
        wrong += [] if told.count("\n") == 1 and told.startswith("error: ") else [f"{told.count(chr(10))} lines"]
        wrong += [f"left {name}" for name, what in listing(here).items() if before.get(name) != what]
        wrong += [f"{name} is gone" for name in before if not os.path.lexists(here / name)]
        if wrong:
            found.append(f"{attack.name}: {', '.join(wrong[:3])}: {told.strip()[-200:]}")
        else:
            shutil.rmtree(here)
    return found


@pytest.fixture(scope="module")
def run(mini_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best vector is the one that is damaged, whatever its own choice was."""
    copy = Path(shutil.copytree(mini_run, tmp_path_factory.mktemp("attacked") / "run"))
    chosen = copy / attack_runs.CELL.removeprefix("run/") / "records" / "chosen.json"
    facts = json.loads(chosen.read_text())
    for aim in ("pairs", "conflict"):
        facts[aim]["best"]["to_generalized"] = "nmd"
    chosen.write_text(json.dumps(facts))
    attack_runs.sign(copy.parent)
    return copy


def test_bad_input_is_one_line_soon_and_leaves_nothing(run: Path, shared: Shared, tmp_path: Path) -> None:
    every = [attack for root in (*attack_inputs.ROOTS, *attack_runs.ROOTS) for attack in root()]
    assert len(every) >= 800
    assert len({attack.name for attack in every}) == len(every)
    found = failures(every[::EVERY], run, shared, tmp_path)
    assert not found, f"{len(found)} of {len(every[::EVERY])}:\n" + "\n".join(found)
