"""The command line: contracts, bad input in one line with exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import inspect
import json
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from helpers import MINI_STUDY
from mnemoscope.cli import app
from mnemoscope.cli.shared import told
from mnemoscope.config import built_in_studies, load_study
from mnemoscope.tasks.jsonl import JsonlTask


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mnemoscope.cli import app;"
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0, r.output;"
        "heavy = {'torch', 'transformers', 'pandas', 'sklearn', 'matplotlib', 'numpy', 'pydantic'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_package() -> None:
    assert call("--version") == (0, f"mnemoscope {version('mnemoscope')}\n", "")
    assert call()[0] == 2


def test_every_command_speaks_to_machines_and_completes_and_those_that_open_a_model_take_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for command in app.registered_commands:
        options = inspect.signature(command.callback).parameters
        assert "as_json" in options, command.callback
        assert ("threads" in options) >= ("device_map" in options), command.callback
    for name, value in {
        "_MNEMOSCOPE_COMPLETE": "complete_bash",
        "COMP_WORDS": "mnemoscope ste",
        "COMP_CWORD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, [], prog_name="mnemoscope")
    assert (done.exit_code, done.stdout.split()) == (0, ["steer"])


def test_tasks_are_listed() -> None:
    code, out, _ = call("tasks", "--json")
    from_scratch, pretrained = ("inference", "addition", "addition-digits", "cipher", "joint"), ("facts", "jsonl")
    assert (code, set(json.loads(out))) == (0, {*from_scratch, *pretrained, "memotrap", "pararel", "qa"})
    assert "inference" in call("tasks")[1]


def test_data_is_seeded_jsonl_that_reads_back(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    code, out, _ = call("data", "inference", "-n", "20", "--seed", "3", "-o", str(first), "--json")
    assert (code, json.loads(out)["examples"]) == (0, 80)
    assert call("data", "inference", "-n", "20", "--seed", "3", "-o", str(second)) == (0, f"{second}\n", "")
    assert first.read_bytes() == second.read_bytes()
    assert len(JsonlTask(file=str(first)).examples_read) == 80


def test_built_in_studies_resolve() -> None:
    assert set(built_in_studies()) == {"gemma", "lora", "quickstart", "paper", "portable", "smollm2"}
    assert all(load_study(name).study == name for name in built_in_studies())


def changed(*settings: str) -> list[str]:
    """A run of the miniature study with other settings in its cell."""
    return ["run", "mini.yaml", "--out", "run", *(f"--set=cells.addition.{setting}" for setting in settings)]


# Names of cells that would leave the run folder, by the name of a study's file.
LEAVING = {"up": "../../escaped", "absolute": "/tmp/escaped", "inner": "a/b", "dots": "..", "long": "a" * 101}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "unclosed.yaml"], "line 1: not YAML"),
        (["run", "words.yaml"], "not a mapping"),
        (["run", "quickstrat"], "study: 'quickstrat' is neither a file nor one of gemma, lora, paper, portable,"),
        (["run", "mini.yaml", "--seeds", "0"], "seeds: Input should be greater than or equal to 1 (got 0)"),
        (["run", "mini.yaml", "--set", "seeds"], "--set: 'seeds' is not of the form a.b=c"),
        (["run", "mini.yaml", "--sets", "seeds=1"], "No such option: --sets"),
        (["run", "mini.yaml", "--workers", "0"], "Invalid value for '--workers'"),
        (["run", "mini.yaml", "--out", "\udcff"], "text: '\\udcff' is no text in UTF-8"),
        (changed("task=adition"), "task: 'adition' is unknown"),
        (changed("options.stored=2"), "stored: 2"),
        (changed("options.colour=2"), "task.options.colour: task 'addition' has no such option"),
        (changed("training.hold={dial: digits}"), "training.hold.dial: 'digits'; task 'addition' has memorized_share,"),
        (changed("training.stop.recall=0.99"), "training.stop.recall: 0.99 cannot be shown by 24 tune examples"),
        (changed("training.stepps=5"), "cells.addition.training.stepps: Extra inputs are not permitted"),
        (changed("pairs.site=head"), "cells.addition.pairs.site: Input should be 'block', 'attention', 'mlp' or"),
        (changed("steering.grids.block.tops=[0.5, 1.5]"), "tops.1: Input should be less than or equal to 1 (got 1.5)"),
        (changed("steering.grids.block.layers=[0-2]"), "layers '0-2' do not exist in a model of 2 layers"),
        (["run", "mini.yaml", "--set", "study=../../escaped"], "study: String should match pattern"),
        *((["run", f"{name}.yaml"], "[key]: String should match pattern") for name in LEAVING),
        (changed("model.heads=5"), "width 64 is not a multiple of heads 5"),
        (changed("model.context=12", "neutral.cuts=0"), "model.context: 12 tokens; a training instance has 17"),
        (changed("model.context=28"), "neutral.length 28 does not fit into model.context; at most 27"),
        (changed("model.folder=nowhere/at/all"), "model: the folder nowhere/at/all does not exist"),
        (changed("task=jsonl", "options={file: absent.jsonl}"), "absent.jsonl cannot be read"),
        (["report", "nowhere"], "RUN: nowhere is not a run folder"),
        (["doctor"], "MODEL: missing; name a model, or a server: --server URL"),
        (["doctor", "model", "--certify"], "--certify: is for a server; name it too: --server URL"),
        (["steer", "model", "Who?", "--toward", "memory"], "from: missing; name a run, as edits ship for smollm2 only"),
        (["detect", "model", "Who?", "--from", "nowhere"], "from: nowhere does not exist"),
        (["data", "inferense", "-o", "x.jsonl"], "task: 'inferense' is unknown"),
        (["data", "inference", "-o", "x.jsonl", "--option", "hops"], "not of the form name=value"),
        (["data", "jsonl", "-o", "x.jsonl"], "task.options"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("mini", MINI_STUDY), ("unclosed", "study: [unclosed"), ("words", "just words")):
        (tmp_path / f"{name}.yaml").write_text(text)
    for name, label in LEAVING.items():
        study = yaml.safe_load(MINI_STUDY)
        study["cells"] = {label: study["cells"]["addition"]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = set(tmp_path.iterdir())
    code, stdout, stderr = call(*arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("error: ")
    assert message in stderr
    assert set(tmp_path.iterdir()) == before


def test_what_a_refused_run_found_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini.yaml").write_text(MINI_STUDY)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.yaml").write_text("study: another\n")
    assert call(*changed("options.stored=2"))[0] == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["study.yaml"]
    assert (tmp_path / "run" / "study.yaml").read_text() == "study: another\n"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 0.8, 4.0])
def test_ctrl_c_is_one_line_whatever_it_stops(seconds: float, tmp_path: Path) -> None:
    """Libraries are being imported, then a model trains."""
    study = MINI_STUDY.replace("novel_accuracy: 0.6", "novel_accuracy: 0.95").replace("steps: 600", "steps: 60000")
    (tmp_path / "mini.yaml").write_text(study)
    code = "from mnemoscope.cli import main; print(1, flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(tmp_path / "mini.yaml"), "--out", str(tmp_path / "run"), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (130, "error: stopped; run the same command again to go on\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 9), "path: nnnnnnnnn: File name too long"),
        (OSError(errno.EFBIG, "File too large"), "system: File too large"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "disk: no space is left"),
        (RuntimeError("[Errno 28] Error writing bytes. No space left on device"), "disk: no space is left"),
        (RecursionError("maximum recursion depth exceeded"), "input: nested too deeply"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "text: '\\ud800' is no text in UTF-8"),
        (KeyError("ours to mend"), None),
    ],
)
def test_what_is_left_of_errors_becomes_one_line(error: Exception, line: str | None) -> None:
    found, code = told(error)
    assert (found or "").startswith(line or "")
    assert (found is None, code) == (line is None, 2 if line else 1)
