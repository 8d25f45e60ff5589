"""Small models that show both behaviours, trained once per test run and shared by the workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import mnemoscope  # noqa: F401  before torch, which helpers import
from arena_lists import PLANTED, SIZES
from helpers import MINI_STUDY, MINI_TASKS, MINI_TRAINING
from little_facts import LittleFacts, little_model
from made_up import write_run
from mnemoscope.behaviour import Asking, draw_candidates, mine_pairs
from mnemoscope.bench.lists import DrawnBench
from mnemoscope.config import ModelConfig, parse_arena
from mnemoscope.interventions import Intervention, Toward
from mnemoscope.interventions.methods import candidates, method_names, name_of
from mnemoscope.models import build_gpt2, load_model, word_tokenizer
from mnemoscope.paper.loop import train
from mnemoscope.report import build_report
from mnemoscope.tasks import allow_code, build_task

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # a name that is no file is not looked for on a hub, minutes long

SLOW_FIXTURES = {"mini_run", "browser", "user", "adapted_run"}  # a finished study or a browser


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow whatever needs a slow fixture; other slow tests carry the marker themselves."""
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def mini(shared_folder: Path) -> Callable[[str], Asking]:
    """Gives a small trained model of a task, ready to be asked; trained once, by the worker that comes first."""
    opened: dict[str, Asking] = {}

    def get(name: str) -> Asking:
        if name not in opened:
            folder = shared_folder / f"mini-{name}"
            with FileLock(shared_folder / f"mini-{name}.lock"):
                if not (folder / "done").exists():
                    _train_mini(name, folder)
            task = build_task(name, MINI_TASKS[name], seed=0)
            opened[name] = Asking(*load_model(folder), task.boundary, batch_size=64)
        return opened[name]

    return get


@pytest.fixture(scope="session")
def little(shared_folder: Path) -> Asking:
    """The model of ``little_facts``, trained once, by the worker that comes first."""
    folder, boundary = shared_folder / "little", LittleFacts().boundary
    with FileLock(shared_folder / "little.lock"):
        if not (folder / "done").exists():
            made = little_model()
            made.model.save_pretrained(folder)
            made.tokenizer.save_pretrained(folder)
            (folder / "done").touch()
    return Asking(*load_model(folder), boundary, batch_size=64)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of made-up records, reported: two seeds of one task, and one of another. To be read only."""
    tasks = {"inference": {"seeds": 2, "size": 80}, "addition": {"effect": 2.5, "size": 80}}
    folder = write_run(tmp_path_factory.mktemp("report") / "run", tasks)
    assert build_report(str(folder)) == folder / "report.html"
    return folder


@pytest.fixture(scope="session")
def bench(little: Asking) -> DrawnBench:
    """A small arena on the model of ``little_facts``."""
    return DrawnBench.of(little, LittleFacts(), parse_arena(SIZES))


@pytest.fixture(scope="session")
def fitted(bench: DrawnBench) -> dict[tuple[str, Toward], Intervention]:
    """A setting of every method in both directions, the one in the middle of its candidates."""
    allow_code(*PLANTED)
    every = (*method_names(), *PLANTED)
    found = {(name_of(name), side): candidates(name, bench, side) for name in every for side in Toward}
    return {key: several[len(several) // 2] for key, several in found.items()}


@pytest.fixture(scope="session")
def mini_study_file(shared_folder: Path) -> Path:
    """The miniature study as a file."""
    path = shared_folder / "mini.yaml"
    with FileLock(shared_folder / "mini-yaml.lock"):  # or the other worker would read half of it
        if not path.exists():
            path.write_text(MINI_STUDY)
    return path


@pytest.fixture(scope="session")
def mini_run(shared_folder: Path, mini_study_file: Path) -> Path:
    """A finished run of the miniature study, made by the command line; whoever changes it works on a copy."""
    run = shared_folder / "mini-run"
    with FileLock(shared_folder / "mini-run.lock"):
        if not (run / "report.html").exists():
            command = [sys.executable, "-m", "mnemoscope", "run", str(mini_study_file), "--out", str(run)]
            command += ["--workers", "2"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip() == str(run / "report.html")
    return run


@pytest.fixture(scope="module")
def playground_runs(mini_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, and one that has only begun."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        shutil.copytree(mini_run, folder / name)
    (folder / "begun").mkdir()
    shutil.copy(mini_run / "study.yaml", folder / "begun")
    (folder / "letter.txt").write_text("not a run")
    return folder


@pytest.fixture(scope="module")
def client(playground_runs: Path) -> Iterator[Any]:
    """A program that knows the token of a playground over these runs."""
    from playground import client_of

    with client_of(playground_runs) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])


def _train_mini(name: str, folder: Path) -> None:
    """The first attempt in which the stop rule holds: another processor learns something else from the same seed."""
    task = build_task(name, MINI_TASKS[name], seed=0)
    tokenizer = word_tokenizer(task.vocabulary, 48)
    config = ModelConfig(layers=3 if name == "inference" else 2, width=64, heads=4, context=48)
    for seed in range(5):
        model = build_gpt2(tokenizer, config, seed)
        rng = np.random.default_rng(seed)
        asking = Asking(model, tokenizer, task.boundary)
        missed = train(asking, task, MINI_TRAINING[name], rng).unmet
        candidates = list(draw_candidates(task, task.examples(rng, 400, "conflict"), rng))
        share = np.mean([batch.is_pair_N.mean() for batch in mine_pairs(asking, candidates, chunk=len(candidates))])
        if not missed and share > 0.01:
            break
    else:
        raise AssertionError(f"no attempt at {name} shows both behaviours: {missed}, {share} of candidates flip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "done").touch()
