"""The command line: contracts, bad input in one line with exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from helpers import MINI_STUDY
from mnemoscope.cli import app
from mnemoscope.cli.ending import told
from mnemoscope.config import built_in_studies, load_study, opened_before
from mnemoscope.tasks.jsonl import JsonlTask

RUNNER = CliRunner()


def call(*arguments: str) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mnemoscope.cli import app;"
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0, r.output;"
        "heavy = {'torch', 'transformers', 'pandas', 'sklearn', 'matplotlib', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_package() -> None:
    assert call("--version") == (0, f"mnemoscope {version('mnemoscope')}\n", "")
    assert call()[0] == 2


def test_tasks_are_listed() -> None:
    code, out, _ = call("tasks", "--json")
    assert code == 0
    from_scratch, pretrained = ("inference", "addition", "addition-digits", "cipher", "joint"), ("facts", "jsonl")
    assert set(json.loads(out)) == {*from_scratch, *pretrained, "memotrap", "pararel", "qa"}
    assert "inference" in call("tasks")[1]


def test_data_is_seeded_jsonl_that_reads_back(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    code, out, _ = call("data", "inference", "-n", "20", "--seed", "3", "-o", str(first), "--json")
    assert (code, json.loads(out)["examples"]) == (0, 80)
    call("data", "inference", "-n", "20", "--seed", "3", "-o", str(second))
    assert first.read_bytes() == second.read_bytes()
    assert len(JsonlTask(file=str(first)).examples_read) == 80


def test_built_in_studies_resolve() -> None:
    assert set(built_in_studies()) == {"gemma", "lora", "quickstart", "paper", "portable", "smollm2"}
    for name in built_in_studies():
        assert load_study(name).study == name


def test_seeds_that_were_opened_under_other_settings_are_named() -> None:
    assert opened_before(load_study("quickstart")) == []
    (line,) = opened_before(load_study("quickstart", ["cells.addition.steering.tune_pairs=30"]))
    assert line.startswith("seeds 0 to 0 of quickstart: their test split was opened on 20")
    early = opened_before(load_study("paper", ["first_seed=8"]))
    assert [line.split(" of ")[0] for line in early] == ["seeds 8 to 9", "seeds 10 to 12"]
    register = yaml.safe_load((files("mnemoscope") / "seeds.yaml").read_text())
    page = (Path(__file__).parents[1] / "docs" / "SEEDS.md").read_text()
    for row in register:
        assert row["study"] in built_in_studies()
        assert f"| {row['opened']} | {row['commit']} | {row['what']} |" in page


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
        (
            ["run", "quickstrat"],
            "study: 'quickstrat' is neither a file nor one of gemma, lora, paper, portable, quickstart",
        ),
        (["run", "mini.yaml", "--seeds", "0"], "seeds: Input should be greater than or equal to 1 (got 0)"),
        (["run", "mini.yaml", "--set", "seeds"], "--set: 'seeds' is not of the form a.b=c"),
        (["run", "mini.yaml", "--set", "seeds.a=1"], "leads through 'seeds'"),
        (changed("model.layers=[1"), "not YAML"),
        (changed("task=adition"), "task: 'adition' is unknown"),
        (changed("options.stored=2"), "stored: 2"),
        (changed("options.colour=2"), "task.options.colour: task 'addition' has no such option"),
        (changed("training.stepps=5"), "cells.addition.training.stepps: Extra inputs are not permitted"),
        (changed("pairs.site=head"), "cells.addition.pairs.site: Input should be 'block', 'attention', 'mlp' or"),
        (changed("steering.grids.block.tops=[0.5, 1.5]"), "tops.1: Input should be less than or equal to 1 (got 1.5)"),
        (changed("steering.grids.block.layers=[some]"), "layers.0: String should match pattern"),
        (changed("steering.grids.block.layers=[0-2]"), "layers '0-2' do not exist in a model of 2 layers"),
        (changed("steering.grids.block.layers=[0-9999999999]"), "layers.0: String should match pattern"),
        (changed("effects.doses=[.nan]"), "cells.addition.effects.doses.0: Input should be a finite number (got nan)"),
        (changed("neutral.doses=[.inf]"), "cells.addition.neutral.doses.0: Input should be a finite number (got inf)"),
        (changed("effects.ablated=[-1]"), "cells.addition.effects.ablated.0: Input should be greater than 0 (got -1)"),
        (["run", "mini.yaml", "--set", "study=../../escaped"], "study: String should match pattern"),
        *((["run", f"{name}.yaml"], "[key]: String should match pattern") for name in LEAVING),
        (changed("model.heads=5"), "width 64 is not a multiple of heads 5"),
        (
            changed("model.context=12", "neutral.cuts=0"),
            "prompt: 16 tokens with its answer; the model reads at",
        ),
        (changed("model.context=28"), "neutral.length 28 does not fit into model.context; at most 27"),
        (changed("model.folder=nowhere/at/all"), "model: nowhere/at/all cannot be opened"),
        (changed("task=jsonl", "options={file: absent.jsonl}"), "absent.jsonl cannot be read"),
        (["report", "nowhere"], "RUN: nowhere is not a run folder"),
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
    code, stdout, stderr = call(*arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("error: ")
    assert message in stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.yaml" for name in ("mini", "unclosed", "words", *LEAVING)
    }


def test_what_a_refused_run_found_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini.yaml").write_text(MINI_STUDY)
    (tmp_path / "run").mkdir()
    before = "study: another\n"
    (tmp_path / "run" / "study.yaml").write_text(before)
    assert call(*changed("options.stored=2"))[0] == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["study.yaml"]
    assert (tmp_path / "run" / "study.yaml").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.5, 4.0])
def test_ctrl_c_is_one_line_whatever_it_stops(seconds: float, tmp_path: Path) -> None:
    """The package is being imported, then libraries, then a model trains."""
    (tmp_path / "mini.yaml").write_text(MINI_STUDY.replace("novel_accuracy: 0.6", "novel_accuracy: 0.95"))
    code = "print(1, flush=True); from mnemoscope.cli import main; main()"
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
    _, told = process.communicate(timeout=120)
    assert (process.returncode, told) == (130, "error: stopped; run the same command again to go on\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 9), "path: nnnnnnnnn: File name too long"),
        (OSError(errno.EFBIG, "File too large"), "system: File too large"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "path: a: Read-only file system"),
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
    assert (found is None) == (line is None)
    assert code == (2 if line else 1)
