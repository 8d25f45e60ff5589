"""`mnemoscope fit`: a user's own model and a file of examples, in one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import MINI_TASKS
from mnemoscope.behaviour import Asking
from mnemoscope.cli import app
from mnemoscope.errors import InputError
from mnemoscope.export import SITES_FOR
from mnemoscope.fitting import ONE_LAYER, SETTINGS, fitting_study
from mnemoscope.stages.steer import settings_of


def test_a_file_and_a_folder_give_vectors_a_detector_and_a_report(
    mini: Callable[[str], Asking], shared_folder: Path, tmp_path: Path
) -> None:
    mini("addition")
    model, data, out = str(shared_folder / "mini-addition"), tmp_path / "sums.jsonl", tmp_path / "fitted"
    options = [f"--option={name}={value}" for name, value in MINI_TASKS["addition"].items()]
    runner = CliRunner()
    done = runner.invoke(app, ["data", "addition", "-n", "400", *options, "-o", str(data)])
    assert done.exit_code == 0, done.output
    done = runner.invoke(
        app, ["fit", model, "--task", str(data), "-o", str(out), "--settings", str(ONE_LAYER), "--json"]
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    results = json.loads((out / "results.json").read_text())["tasks"]["sums"]
    assert said["tasks"]["sums"]["to_generalized"]["pairs"] == results["steering"]["to_generalized"]["pairs"]["shift"]
    assert said["tasks"]["sums"]["detect_auroc"] == results["detection"]["auroc"]["p_memorized"]
    assert results["steering"]["to_generalized"]["controls"]["gaussian"]["draws"] == {"pairs": 20, "conflict": 20}
    assert Path(said["report"]).is_file()
    tried = {(row["method"], row["layers"]) for row in results["sweep"] if row["direction"] == "to_generalized"}
    assert {method for method, _ in tried} == {"standardized-nmd", "gradient", "learned"}
    assert {layers for _, layers in tried} == {"1"}  # one of two layers, as the budget says
    # What was fitted can be used as any run can.
    for command in (["detect"], ["steer", "--toward", "generalized", "--gate", "0.5"]):
        done = runner.invoke(app, [command[0], model, "--from", str(out), *command[1:], "12+34="])
        assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["fit", model, "--task", str(data), "-o", str(out), "--settings", str(ONE_LAYER)])
    assert "towards working it out" in done.stdout
    assert "P(memorized) ranks" in done.stdout


def test_a_file_of_conflicts_alone_is_enough(
    mini: Callable[[str], Asking], shared_folder: Path, tmp_path: Path
) -> None:
    """And where one behaviour is too rare for a detector, the vectors are there all the same."""
    mini("addition")
    data, out = tmp_path / "sums.jsonl", tmp_path / "fitted"
    options = [f"--option={name}={value}" for name, value in MINI_TASKS["addition"].items()]
    runner = CliRunner()
    done = runner.invoke(app, ["data", "addition", "-n", "150", *options, "-o", str(data)])
    assert done.exit_code == 0, done.output
    lines = [line for line in data.read_text().splitlines() if "memorized" in json.loads(line)]
    data.write_text("\n".join(lines) + "\n")
    model = str(shared_folder / "mini-addition")
    done = runner.invoke(app, ["fit", model, "--task", str(data), "-o", str(out), "--settings", str(ONE_LAYER)])
    assert done.exit_code == 0, done.output
    task = json.loads((out / "results.json").read_text())["tasks"]["sums"]
    assert task["steering"]["to_generalized"]["pairs"]["shift"]["n"] > 0
    assert ("detection" in task) != ("no_detector" in task)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("nowhere.jsonl", SETTINGS, "task: the file nowhere.jsonl does not exist"),
        ("facts", ONE_LAYER - 1, f"settings: {ONE_LAYER - 1} is less than the {ONE_LAYER} that one layer takes"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(task: str, settings: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fitting_study({"folder": "x"}, task, {}, settings)
    done = CliRunner().invoke(
        app, ["fit", "x", "--task", task, "--settings", str(settings), "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 2
    assert done.stderr == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_the_budget_is_dealt_to_layers_all_over_the_model() -> None:
    (everywhere,) = fitting_study({"folder": "x"}, "facts", {}, positions="all").cells.values()
    assert everywhere.steering.positions == "all"
    sites = {site for grids in everywhere.steering.sweeps.values() for grid in grids for site in grid.sites}
    assert sites <= set(SITES_FOR["gguf"]) & set(SITES_FOR["checkpoint"])
    (cell,) = fitting_study({"folder": "x"}, "facts", {}).cells.values()
    grids, count = cell.steering.sweeps, 0
    for method in grids:
        count += len(settings_of(cell.steering, "to_generalized", method, 30))
    assert count == SETTINGS == 66
    (learned,) = grids["learned"]
    assert learned.layer_sets(30) == [(4,), (9,), (13,), (17,), (21,), (26,)]
    assert learned.layer_sets(2) == [(0,), (1,)]
