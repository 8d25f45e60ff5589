"""Run every command on run folders and open them in the playground, with witnesses of what is executed and read.

Called as ``stranger.py OUTSIDE RUN...``. Prints a JSON object, by run: ``said`` by each command, and ``seen`` of what
must not be: code of the folder that is imported or executed, programs that are started, files outside of it that are
opened (by audit events of Python and, for libraries that open files themselves, by the system's watch on the folder).
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

IN_ACCESS, IN_OPEN = 0x1, 0x20
outside, *runs = (Path(argument).resolve() for argument in sys.argv[1:])
folders = runs[0].parents[1]
seen: list[str] = []
watching = False


def witness(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    text = str(arguments[:2])  # of an import its name and file, without the path where modules are looked for
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        seen.append(f"{event} {text[:200]}")
    strange = "stranger_code" in text or str(folders) in text
    if strange and event in ("import", "exec", "pickle.find_class"):
        seen.append(f"{event} {text[:200]}")
    if event == "open" and str(outside) in text:
        seen.append(f"{event} {text[:200]}")


def watch(folder: Path) -> int:
    """A descriptor that tells every access to a folder and the files in it, whoever makes it in this process."""
    libc = ctypes.CDLL(None)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        assert libc.inotify_add_watch(descriptor, str(path).encode(), IN_ACCESS | IN_OPEN) >= 0
    return int(descriptor)


def told(*arguments: str) -> str:
    """What a command says, and its exit code."""
    from mnemoscope.cli import main

    sys.argv = ["mnemoscope", *arguments]
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        try:
            main()
            code: object = 0
        except SystemExit as error:
            code = error.code
        except Exception:  # a command that does not explain itself is found by the test
            code = traceback.format_exc()
    return f"{code} {text.getvalue()}"


def played(run: Path) -> str:
    """What the playground answers about a run."""
    from playground import client_of

    cell = f"/api/runs/{run.name}/cells/addition-0"
    asked = {"question": {"prompt": "12+34="}, "steering": {"toward": "generalized", "method": "nmd"}}
    with client_of(run.parent) as client:
        found = [client.get(path) for path in ("/", "/runs", f"/runs/{run.name}/report", "/api/runs", cell)]
        found += [client.get(f"{cell}/{path}") for path in ("questions", "neurons")]
        found.append(client.post(f"{cell}/ask", json=asked))
    return json.dumps([(answer.status_code, answer.text) for answer in found])


import torch  # noqa: E402, F401  what the package imports itself is no part of what a folder makes it do
from fastapi.testclient import TestClient  # noqa: E402, F401

import mnemoscope.face.fitted  # noqa: E402
import mnemoscope.web.app  # noqa: E402, F401

sys.addaudithook(witness)
descriptor, found = watch(outside), {}
for run in runs:
    model, prompt, watching = str(run / "cells" / "addition-0" / "model"), "12+34=", True
    seen.clear()
    out = str(run.parent / "out.gguf")
    said = {
        "report": told("report", str(run)),
        "detect": told("detect", model, "--from", str(run), prompt),
        "steer": told("steer", model, "--from", str(run), "--toward", "generalized", prompt),
        "export": told("export", str(run), "--toward", "generalized", "--to", "gguf", "-o", out),
        "playground": played(run),
    }
    watching = False
    with suppress(BlockingIOError):  # nothing was read
        seen.append(f"outside was read: {os.read(descriptor, 4096)!r}")
    found[run.parent.name] = {"said": said, "seen": list(seen)}
print(json.dumps(found))
