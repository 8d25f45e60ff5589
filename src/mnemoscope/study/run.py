"""Run studies: cells of stages that write raw records, and resume where they stopped.

A stage writes its files atomically and then its marker, with a hash of everything it depends on. A killed stage leaves
no marker and starts again; a finished stage is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from mnemoscope.config import StudyConfig, dump_study
from mnemoscope.interventions.methods import check_method
from mnemoscope.runs.digests import AGAIN, check_stage, facts_digest, markers_of, read_marker, write_marker
from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.runs.files import delete, known_hash, sweep, write_atomically
from mnemoscope.runs.locks import locked
from mnemoscope.runs.processes import in_processes, settle
from mnemoscope.runs.strict import read_text
from mnemoscope.runs.telling import Progress
from mnemoscope.study.cells import STATES, Cell, Opened, Tell, cells_of, git_state, grouped, version
from mnemoscope.study.executors import possible_workers, run_cells
from mnemoscope.tasks import allowed_code, check_allowed

MARKERS = ("cells/*/stages/*.json",)  # of finished stages
UNFINISHED = ("cells/*/states/training.safetensors",)  # of a training that goes on
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "pandas", "safetensors")


def run_study(
    config: StudyConfig,
    run: Path,
    progress: Progress = lambda *_: None,
    workers: int | None = None,
    executor: str = "local",
    address: str | None = None,
    opened: Opened | None = None,
) -> Path:
    """Run the unfinished stages of a study and build its report; returns the path of ``report.html``.

    Where no cell is analysed (models are trained for another study) there is no report: the run's own path.

    Args:
        run: the run folder; made if missing. A folder of another configuration is refused.
        workers: processes at a time, for cells and parts of cells; default: as many as there are processors for
            ``config.threads`` each. A cluster takes as many cells as it has processors for.
        executor: ``local``, or ``ray`` for a cluster whose nodes all see the run folder.
        address: of the cluster; default: one of this machine alone.
        opened: the model of all cells whose configuration names an open one; such a study runs in this process.

    Raises:
        InputError: the folder belongs to another configuration, or a cell's input cannot be used.
        StudyError: a cell failed (both behaviours never shown, no pairs, a damaged artefact). The other cells are
            finished first; the report covers them and names those that failed.
    """
    from mnemoscope.report import build_report

    started = time.time()
    if executor != "local" and workers is not None:
        raise InputError("workers: a cluster takes as many cells at a time as it has processors for; leave it out")
    run = run.absolute()  # other processes have another working folder
    cells = [replace(cell, opened=opened, code=allowed_code()) for cell in cells_of(config, run)]
    for cell in cells:
        _check(cell, config)
    workers = workers or max(1, (os.cpu_count() or 1) // config.threads)
    with _locked(run, config):
        sweep(run)
        failed = run_cells(cells, run_cell, progress, workers, executor, address)
        finished = [cell for cell in cells if cell.name not in failed]
        write_marker(run, "failed", [write_atomically(run / "failed.json", json.dumps(failed, indent=1).encode())])
        report = None
        if any(cell.config.analysed for cell in finished):
            here = workers if executor == "local" else 1  # a cluster says nothing of this machine
            compare_cells(finished, run, progress, here)
            _write_manifest(run, finished, started)
            with in_processes(here) as parallel:
                report = build_report(run, parallel)
    if failed:
        first, *others = failed.values()
        more = f" ({len(others)} more cells failed)" if others else ""
        raise StudyError(f"{first}{more}" + (f"; {report} is of the other cells" if report else ""))
    return report or run  # a study that only trains has nothing to report


def _check(cell: Cell, config: StudyConfig) -> None:
    """Raises now what a cell's stages would refuse after hours of work."""
    if cell.opened is None or cell.opened.task is None:
        check_allowed(cell.config.task)
    for method in cell.config.steering.methods:
        check_method(method)
    lender = cell.config.model.cell
    folder = (config.cells[lender] if lender else cell.config).model.folder
    if folder and not (cell.folder / "stages" / "steering.json").exists():
        from mnemoscope.study.stages import check_cell

        check_cell(cell, folder)


def run_cell(cell: Cell, progress: Progress) -> None:
    """Run the unfinished stages of a cell."""
    from mnemoscope.study.stages import STAGES, WRITES

    settle(cell.threads)
    upstream = stage_hash(inputs_hash(cell), cell, "")
    for place, (name, stage) in enumerate(STAGES.items()):
        if not cell.config.analysed and name not in ("train", "behaviour"):
            continue
        upstream = stage_hash(upstream, cell, name)
        begin = partial(stage, replace(cell, depends_on=upstream))
        # Stages that read what it writes are not done any more once it runs again.
        later = [f"stages/{after}.json" for after in reversed(list(STAGES)[place + 1 :])]
        _run_stage(cell.name, cell.folder, name, upstream, begin, progress, [*later, *WRITES.get(name, ())])


def compare_cells(cells: Sequence[Cell], run: Path, progress: Progress, workers: int = 1) -> None:
    """Compare seeds of one label and labels that share a model, unless that is finished."""
    analysed = [cell for cell in cells if cell.config.analysed]

    def compared(tell: Tell) -> list[Path]:
        if all(len(group) == 1 for by in ("label", "model") for group in grouped(analysed, by)):
            return []  # without importing a model library
        compare_stage = resolve_name("mnemoscope.paper.compare:compare_stage")
        settle(analysed[0].threads)
        places = min(possible_workers(cell, workers) for cell in analysed)
        with in_processes(places, analysed[0].threads) as parallel:
            return compare_stage(analysed, run, parallel, tell)

    hashes = "".join(marker["hash"] for cell in analysed for marker in markers_of(cell.folder).values())
    _run_stage("study", run, "compare", hashlib.sha256(hashes.encode()).hexdigest(), compared, progress)
    for cell in cells:
        shutil.rmtree(cell.folder / STATES, ignore_errors=True)


def _run_stage(
    owner: str,
    folder: Path,
    name: str,
    wanted: str,
    stage: Callable[[Tell], list[Path]],
    progress: Progress,
    stale: Sequence[str] = (),
) -> None:
    """Run a stage unless it has finished with the same dependencies; write its marker last.

    ``stale``: patterns of what is deleted before it begins, in order.
    """
    if is_done(folder, name, wanted):
        progress(owner, name, 1, 1, "done before")
        return
    began = time.time()
    for path in (path for pattern in (f"stages/{name}.json", *stale) for path in sorted(folder.glob(pattern))):
        delete(path)
    files = stage(partial(progress, owner, name))
    seconds = round(time.time() - began, 3)
    write_marker(folder, name, files, {"hash": wanted, "seconds": seconds, **git_state()})
    progress(owner, name, 1, 1, f"{seconds:.0f} s")


def stage_hash(upstream: str, cell: Cell, stage: str) -> str:
    """Hash of everything a stage depends on: earlier stages, the configuration, the version of the package."""
    config = cell.config.model_dump(mode="json")
    return facts_digest([upstream, cell.label, cell.seed, cell.threads, config, stage, version()])


def inputs_hash(cell: Cell) -> str:
    """Hash of what a cell reads from outside the run: files that options name, its model, the module of its task."""
    named = list(_named_by(cell.config.options))
    folder = cell.config.model.folder
    if folder and Path(folder).is_dir():
        named += sorted(Path(folder).glob("*"))
    module, is_class, _ = cell.config.task.partition(":")
    source = find_spec(module) if is_class and cell.opened is None else None
    if source is not None and source.origin:
        named.append(Path(source.origin))
    return facts_digest({str(path): known_hash(path) for path in named if path.is_file()})


def _named_by(options: Mapping[str, Any]) -> Iterator[Path]:
    """What options of a task, or of its parts, may name: files, and all JSONL files of folders."""
    for value in options.values():
        if isinstance(value, dict):
            yield from _named_by(value)
        elif isinstance(value, str) and value:
            path = Path(value)
            yield from sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]


def is_done(folder: Path, stage: str, wanted: str) -> bool:
    """Whether a stage has finished with the same dependencies; StudyError where one of its files has changed since."""
    path = folder / "stages" / f"{stage}.json"
    try:
        if not path.exists() or read_marker(path).get("hash") != wanted:
            return False
        check_stage(folder, stage)
    except InputError as error:
        raise StudyError(f"{str(error).removesuffix(AGAIN)}delete {path} to run stage {stage!r} again") from error
    return True


@contextmanager
def _locked(run: Path, config: StudyConfig) -> Iterator[None]:
    """Lock the run folder for this process and this configuration."""
    text, existing = dump_study(config), run / "study.yaml"
    if run.exists() and not run.is_dir():
        raise InputError(f"out: {run} is a file; a folder is wanted")
    if run.exists() and any(run.iterdir()) and not existing.exists() and not (run / ".lock").exists():
        raise InputError(f"out: {run} is not empty and holds no study.yaml; give a new folder")
    with locked(run, lambda: _holds(run, *MARKERS, *UNFINISHED)):
        # A run without a finished stage (a model that could not be opened) may change its configuration.
        there = read_text(existing, "out") if _holds(run, *MARKERS) and existing.exists() else text
        if there != text:
            lines = zip_longest(there.splitlines(), text.splitlines(), fillvalue="")
            old, new = next((old.strip(), new.strip()) for old, new in lines if old != new)
            raise InputError(
                f"out: {run} holds a run of another configuration (there {old!r}, here {new!r}); "
                "give another folder or the same configuration"
            )
        write_marker(run, "study", [write_atomically(existing, text.encode())])
        yield


def _holds(run: Path, *patterns: str) -> bool:
    return any(path.is_file() for pattern in patterns for path in run.glob(pattern))


def _write_manifest(run: Path, cells: list[Cell], started: float) -> None:
    stages = {cell.name: markers_of(cell.folder) for cell in cells}
    stages["study"] = {"compare": read_marker(run / "stages" / "compare.json")}
    adapted = any(cell.config.model.lora for cell in cells)
    manifest = {
        "mnemoscope": version(),
        "versions": {name: metadata.version(name) for name in (*LIBRARIES, *(["peft"] if adapted else []))},
        "python": platform.python_version(),
        "machine": {"system": platform.system(), "architecture": platform.machine(), "processors": os.cpu_count()},
        **git_state(),
        "commits": sorted({str(m.get("commit")) for found in stages.values() for m in found.values()}),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 1),
        "stages": stages,
    }
    path = write_atomically(run / "manifest.json", json.dumps(manifest, indent=1).encode())
    write_marker(run, "manifest", [path])
