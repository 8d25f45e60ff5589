"""A run folder from a stranger, with digests that are right: nothing is executed, read outside, or shown as markup.

Witnesses are audit events of Python and, for libraries that open files themselves, the system's watch on a folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from mnemoscope.cli import app
from mnemoscope.runs.digests import check_closed, write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import write_atomically
from mnemoscope.web.app import build_app
from mnemoscope.web.runs import Runs
from playground import TOKEN, client_of, served

SECRET = "what-no-page-may-show"
MARKUP = "<img src=x onerror='window.broken=1'><script>window.broken=1</script>"
CELL = Path("cells") / "addition-0"
pytestmark = pytest.mark.faults
IN_ACCESS, IN_OPEN, IN_ISDIR = 0x1, 0x20, 0x40000000
STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")
_seen: list[str] | None = None  # what must not be, while it is watched for
_outside = ""


def witness(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes programs that start, code of a stranger that is imported or executed, files outside that are opened."""
    if _seen is None:
        return
    text = str(arguments[:2])  # of an import its name and file, without the path where modules are looked for
    strange = "stranger_code" in text and event in ("import", "exec", "pickle.find_class")
    if event in STARTS or strange or (event in ("open", "os.listdir", "os.scandir") and _outside in text):
        _seen.append(f"{event} {text[:200]}")


sys.addaudithook(witness)


@contextmanager
def watched(outside: Path) -> Iterator[list[str]]:
    """What is seen of what must not be, inside the context."""
    global _seen, _outside
    libc = ctypes.CDLL(None)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    for path in (outside, *(p for p in outside.rglob("*") if p.is_dir())):
        assert libc.inotify_add_watch(descriptor, str(path).encode(), IN_ACCESS | IN_OPEN) >= 0
    found = list[str]()
    _seen, _outside = found, str(outside)
    try:
        yield found
    finally:
        _seen = None
        content = b""
        with suppress(BlockingIOError):  # nothing was read
            content = os.read(descriptor, 2**16)
        os.close(descriptor)
        while content:
            _, mask, _, length = struct.unpack_from("iIII", content)
            if not mask & IN_ISDIR:  # anybody may list folders meanwhile
                found.append(f"outside was read: {content[16 : 16 + length]!r}")
            content = content[16 + length :]


class Bomb:
    """Runs a program where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("true stranger_code",)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory, mini_run: Path) -> Path:
    """What lies outside of the runs, and is nobody's business."""
    folder = tmp_path_factory.mktemp("elsewhere") / "outside"
    for name in ("model", "vectors"):
        shutil.copytree(mini_run / CELL / name, folder / name)
    (folder / "secret.jsonl").write_text(json.dumps({"item": SECRET, "prompt": SECRET, "answer": SECRET}))
    return folder


def strange(mini_run: Path, folder: Path) -> Path:
    """A copy of a run with code in it, which anybody who looks for modules there would import."""
    run = shutil.copytree(mini_run, folder)
    (run / "stranger_code.py").write_text("raise SystemExit('executed')")
    for bomb in ("model/pytorch_model.bin", "model/training_args.bin", "records/pairs.pkl"):
        (run / CELL / bomb).write_bytes(pickle.dumps(Bomb()))
    return run


@pytest.fixture
def hostile(mini_run: Path, tmp_path: Path) -> Path:
    """One of a pair of such runs, with markup in all that is shown."""
    for name in ("sibling", "theirs"):
        run = strange(mini_run, tmp_path / "runs" / name)
        markup(run, tmp_path)
        marked(run)
    return run


def marked(run: Path) -> None:
    """Give a folder the digests that its files have now, as a stranger would."""
    cell, stages = run / CELL, ("train", "behaviour", "pairs", "steering")
    files = [p for p in cell.rglob("*") if p.is_file() and p.parent.name != "stages"]
    for path in (*(run / "stages").glob("*.json"), *(cell / "stages").glob("*.json")):
        path.unlink()
    for name in stages:
        write_marker(cell, name, files if name == "train" else [])
    write_marker(run, "study", [p for p in run.glob("*.*") if p.is_file() and p.name[0] != "."])


def study(**changes: Any) -> Callable[[Path, Path], None]:
    """Other fields of the cell in ``study.yaml``, where OUTSIDE stands for the folder outside."""

    def poison(run: Path, outside: Path) -> None:
        found = yaml.safe_load((run / "study.yaml").read_text())
        found["cells"]["addition"] |= json.loads(json.dumps(changes).replace("OUTSIDE", str(outside)))
        (run / "study.yaml").write_text(yaml.safe_dump(found))

    return poison


def link(name: str, target: str) -> Callable[[Path, Path], None]:
    def poison(run: Path, outside: Path) -> None:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(outside / target)

    return poison


def leading_method(run: Path, outside: Path) -> None:
    """The best method is a path, through a folder that makes it one."""
    path = run / CELL / "records" / "chosen.json"
    chosen = json.loads(path.read_text())
    chosen["pairs"]["best"]["to_generalized"] = f"../../../../../../{outside.name}/vectors/to_generalized-nmd"
    path.write_text(json.dumps(chosen))
    (run / CELL / "vectors" / "to_generalized-..").mkdir()


def leading_index(run: Path, outside: Path) -> None:
    model = run / CELL / "model"
    names = dict.fromkeys(
        load_file(model / "model.safetensors"), f"../../../../../{outside.name}/model/model.safetensors"
    )
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def leading_adapter(run: Path, outside: Path) -> None:
    model = run / CELL / "model"
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(outside / "model")}))
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")


def remote_code(run: Path, outside: Path) -> None:
    path = run / CELL / "model" / "config.json"
    auto = {"AutoConfig": "stranger_code.Config", "AutoModelForCausalLM": "stranger_code.Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "stranger", "auto_map": auto}))
    shutil.copy(run / "stranger_code.py", path.parent)


def kernel(run: Path, outside: Path) -> None:
    path = run / CELL / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "stranger/code"}))


def markup(run: Path, outside: Path) -> None:
    """Markup in all that is shown: prompts, answers, names, and a page of its own."""
    for path in (run / CELL / "records").glob("*.parquet"):
        table = pd.read_parquet(path)
        texts = [c for c in ("item", "prompt", "prompt_a", "prompt_b", "unsteered", "steered") if c in table]
        table.assign(**{c: MARKUP + table[c].astype(str) for c in texts}).to_parquet(path)
    (run / "report.html").write_text(f"<p>{MARKUP}</p><meta http-equiv='refresh' content='0; url=/runs'>")
    (run / "study.yaml").write_text((run / "study.yaml").read_text() + f"# {MARKUP}\n")


STRANGE, LINK = "is no built-in task", "is a link that leads out"
POISONS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a task that is a function": (study(task="os:system", options={"command": "true"}), STRANGE),
    "a task of its own": (study(task="stranger_code:Task", options={}), STRANGE),
    "a part of its own": (study(task="joint", options={"parts": {"stranger_code:Task": {}}}), STRANGE),
    "a model elsewhere": (study(model={"folder": "OUTSIDE/model"}), "--model"),
    "data elsewhere": (study(task="jsonl", options={"file": "OUTSIDE/secret.jsonl"}), "cannot be read"),
    "a cell elsewhere": (study(model={"cell": "../../outside"}), "model.cell"),
    "a linked table": (link(f"{CELL}/records/behaviour.parquet", "secret.jsonl"), LINK),
    "a linked model": (link(f"{CELL}/model", "model"), LINK),
    "a linked page": (link("report.html", "secret.jsonl"), LINK),
    "a method that is a path": (leading_method, "is not among its methods"),
    "weights elsewhere": (leading_index, "which is outside of it"),
    "an adapter of a model elsewhere": (leading_adapter, "holds an adapter"),
    "remote code": (remote_code, "cannot be opened"),
    "a kernel from the hub": (kernel, "asks for an attention kernel"),
    "markup": (markup, ""),
}


def told(run: Path) -> dict[str, str]:
    """What every command says of a run, and what the playground answers."""
    model, out = str(run / CELL / "model"), str(run.parent / "out.gguf")
    commands = {
        "report": ["report", str(run)],
        "detect": ["detect", model, "--from", str(run), "12+34="],
        "steer": ["steer", model, "--from", str(run), "--toward", "generalized", "12+34="],
        "export": ["export", str(run), "--toward", "generalized", "--to", "gguf", "-o", out],
    }
    said = {}
    for name, command in commands.items():
        done = CliRunner().invoke(app, command)
        assert done.exit_code in (0, 1, 2), (name, done.exception)
        assert done.exception is None or isinstance(done.exception, SystemExit), "an error that is not explained"
        said[name] = done.output
    cell = f"/api/runs/{run.name}/cells/addition-0"
    asked = {"question": {"prompt": "12+34="}, "steering": {"toward": "generalized", "method": "nmd"}}
    with client_of(run.parent) as client:
        found = [client.get(path) for path in ("/", "/runs", f"/runs/{run.name}/report", "/api/runs", cell)]
        found += [client.get(f"{cell}/{path}") for path in ("questions", "neurons")]
        found.append(client.post(f"{cell}/ask", json=asked))
    said["playground"] = json.dumps([(answer.status_code, answer.text) for answer in found])
    return said


@pytest.mark.parametrize("name", POISONS)
def test_a_hostile_folder_executes_nothing_and_reads_nothing_outside(
    name: str, mini_run: Path, outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = strange(mini_run, tmp_path / "case" / "run")
    poison, message = POISONS[name]
    poison(run, outside)
    marked(run)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.syspath_prepend(run)
    monkeypatch.chdir(run)
    with watched(outside) as seen:
        said = told(run)
    assert seen == []
    assert SECRET not in str(said)
    assert message in str(said)
    assert "server: " not in said["playground"], "no error that is not explained"
    if name == "markup":
        page = (run / "report.html").read_text()
        assert "<script" not in page, "it is written anew"
        assert "&lt;script&gt;" in page


@pytest.fixture
def address(hostile: Path) -> Iterator[str]:
    with served(build_app(Runs(hostile.parent), TOKEN, hostile.name)) as address:
        yield address


def test_nothing_of_a_hostile_folder_runs_in_a_browser(address: str, hostile: Path, browser: Any) -> None:
    tab = browser.new_page()
    tab.set_default_timeout(60_000)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"{address}/?token={TOKEN}")
    for path in ("/?run=theirs", "/neurons?run=theirs", "/runs", "/runs/theirs/report"):
        tab.goto(address + path)
        tab.wait_for_timeout(1000)
        assert tab.evaluate("typeof window.broken") == "undefined", path
        assert tab.url == address + path, "no page leads away"
    assert tab.locator("script").count() == 1, "that is the report"
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    tab.close()


def test_the_playground_offers_the_named_run_only_unless_asked(hostile: Path) -> None:
    from fastapi.testclient import TestClient

    for siblings, names in ((False, ["theirs"]), (True, ["sibling", "theirs"])):
        app = build_app(Runs(hostile.parent, None if siblings else "theirs"), TOKEN, "theirs")
        client = TestClient(app, "http://localhost", headers={"Authorization": f"Bearer {TOKEN}"})
        assert [run["run"] for run in client.get("/api/runs").json()] == names
        found = client.get("/api/runs/sibling/cells/addition-0")
        assert found.status_code == (200 if siblings else 422), found.text


@pytest.mark.parametrize("kind", ["link", "dangling", "device", "pipe"])
def test_what_is_no_file_is_neither_followed_nor_replaced(tmp_path: Path, kind: str) -> None:
    target, path = tmp_path / "target", tmp_path / "run" / "results.json"
    path.parent.mkdir()
    if kind == "link":
        target.write_text("mine")
    if kind in ("link", "dangling"):
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    before = path.lstat()
    with pytest.raises(InputError, match="only a file is replaced"):
        write_atomically(path, b"theirs")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert not target.exists() or target.read_text() == "mine"
    if kind in ("link", "pipe"):
        with pytest.raises(InputError, match=r"leads out of the folder|neither a file nor a folder"):
            check_closed(path.parent)


def test_a_planted_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".results.{os.getpid()}.tmp.json").symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "results.json", b"{}")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "results.json").is_symlink()
