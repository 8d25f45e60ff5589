"""Studies: cells of stages that write raw records, resume where they stopped, and run side by side.

A stage writes its files under temporary names, renames them, and last of all writes its marker with a hash of
everything it depends on. A killed stage leaves no marker, so it starts again; a finished one is never redone.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from threading import Thread
from typing import Any

from mnemoscope.cells import Cell, cells_of, git_state, version
from mnemoscope.config import StudyConfig, dump_study
from mnemoscope.errors import InputError, StudyError
from mnemoscope.files import file_hash, write_atomically

# (cell, stage, done, total, note): what a running cell tells.
Progress = Callable[[str, str, float, float, str], None]


def run_study(config: StudyConfig, run: Path, progress: Progress = lambda *_: None, workers: int | None = None) -> Path:
    """Run what is not yet done of a study and build its report.

    Args:
        run: the run folder; made if missing. A folder of another configuration is refused.
        workers: cells at a time; default: as many as there are processors for ``config.threads`` each.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: the folder belongs to another configuration, or a cell's input cannot be used.
        StudyError: a cell cannot go on (never mixed, no pairs, a damaged artefact). The others are finished first, and
            the report is of them and names those that failed.
    """
    from mnemoscope.report import build_report

    started = time.time()
    cells = cells_of(config, run)
    if _adapts(cells):  # what is not there is told before hours of work, not after them
        from mnemoscope.stages import check_peft

        check_peft("model.lora")
    with _locked(run, config):
        workers = workers or max(1, min(len(cells), (os.cpu_count() or 1) // config.threads))
        failed = _run_cells(cells, workers, progress)
        finished = [cell for cell in cells if cell.name not in failed]
        write_atomically(run / "failed.json", json.dumps(failed, indent=1).encode())
        report = None
        if any(cell.config.analysed for cell in finished):
            compare_cells(finished, run, progress)
            _write_manifest(run, finished, started)
            report = build_report(run)
        if failed:
            first, *others = failed.values()
            more = f" ({len(others)} more cells failed)" if others else ""
            raise StudyError(f"{first}{more}" + (f"; {report} is of the other cells" if report else ""))
        assert report is not None, "a study has at least one cell that is analysed"
        return report


def _adapts(cells: Sequence[Cell]) -> bool:
    return any(cell.config.model.lora for cell in cells)


def _run_cells(cells: Sequence[Cell], workers: int, progress: Progress) -> dict[str, str]:
    """Run all cells and return, by name, why some could not go on; hours of work are not lost with them."""
    failed: dict[str, str] = {}
    # Cells that borrow a model come after those that train one.
    for wave in ([c for c in cells if not c.config.model.cell], [c for c in cells if c.config.model.cell]):
        lenders = {cell.name: f"{cell.config.model.cell}-{cell.seed}" for cell in wave if cell.config.model.cell}
        without = {
            name: f"{name}: {lender}, whose model it takes, could not go on"
            for name, lender in lenders.items()
            if lender in failed
        }
        failed |= without
        ready = [cell for cell in wave if cell.name not in without]
        failed |= _run_wave(ready, min(workers, len(ready)), progress)
    return failed


def run_cell(cell: Cell, progress: Progress) -> None:
    """Run the stages of a cell that are not yet done."""
    from mnemoscope.stages import STAGES

    _settle(cell.threads)
    upstream = stage_hash("", cell, "")
    for name, stage in STAGES.items():
        if not cell.config.analysed and name not in ("train", "behaviour"):
            continue
        upstream = stage_hash(upstream, cell, name)
        _run_stage(cell.name, cell.folder, name, upstream, partial(stage, cell), progress)


def compare_cells(cells: Sequence[Cell], run: Path, progress: Progress) -> None:
    """Compare seeds of one label and labels that share a model, unless it is done."""
    from mnemoscope.stages import STAGES, compare_stage

    _settle(cells[0].threads)
    last = list(STAGES)[-1]
    markers = [(cell.folder / "stages" / f"{last}.json") for cell in cells if cell.config.analysed]
    wanted = hashlib.sha256("".join(json.loads(m.read_text())["hash"] for m in markers).encode()).hexdigest()
    analysed = [cell for cell in cells if cell.config.analysed]
    _run_stage("study", run, "compare", wanted, partial(compare_stage, analysed, run), progress)


def _settle(threads: int) -> None:
    import torch

    quiet_library()
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free for the next ones.

    It would give large blocks back to the system, which hands them out again page by page, at every step of a training:
    a fifth of its time (docs/LOG.md). Another C library than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # as malloc.h numbers them
        mallopt(trim_threshold, 2**29)
        mallopt(top_pad, 2**26)
        mallopt(mmap_threshold, 2**25)  # the most it takes


def quiet_library() -> None:
    """Keep bars and hints of transformers out of what is shown of our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _run_stage(
    owner: str,
    folder: Path,
    name: str,
    wanted: str,
    stage: Callable[[Callable[[float, float, str], None]], list[Path]],
    progress: Progress,
) -> None:
    """Run a stage unless it has finished with the same dependencies; its marker is written last."""
    if is_done(folder, name, wanted):
        progress(owner, name, 1, 1, "done before")
        return
    began = time.time()
    files = stage(partial(progress, owner, name))
    marker = {
        "hash": wanted,
        "seconds": round(time.time() - began, 3),
        "files": {str(f.relative_to(folder)): file_hash(f) for f in files},
    }
    write_atomically(folder / "stages" / f"{name}.json", json.dumps(marker, indent=1).encode())
    progress(owner, name, 1, 1, f"{marker['seconds']:.0f} s")


def stage_hash(upstream: str, cell: Cell, stage: str) -> str:
    """Hash of all that a stage depends on: earlier stages, the cell's configuration, the version of the package."""
    facts = [upstream, cell.label, cell.seed, cell.threads, cell.config.model_dump(mode="json"), stage, version()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_done(folder: Path, stage: str, wanted: str) -> bool:
    """Whether a stage has finished with the same dependencies.

    Raises:
        StudyError: it has, but a file of it is gone or changed since.
    """
    path = folder / "stages" / f"{stage}.json"
    if not path.exists():
        return False
    try:
        marker = json.loads(path.read_text())
        files = {folder / name: digest for name, digest in marker["files"].items()}
        found = marker["hash"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"artefact: {path} is damaged; delete it to run stage {stage!r} again") from error
    if found != wanted:
        return False
    for file, digest in files.items():
        if not file.exists() or file_hash(file) != digest:
            state = "is missing" if not file.exists() else "is damaged (its checksum differs)"
            raise StudyError(f"artefact: {file} {state}; delete {path} to run stage {stage!r} again")
    return True


@contextmanager
def _locked(run: Path, config: StudyConfig) -> Iterator[None]:
    """Hold the run folder for this process and this configuration."""
    text = dump_study(config)
    if run.exists() and not run.is_dir():
        raise InputError(f"out: {run} is a file; a folder is wanted")
    if run.exists() and any(run.iterdir()) and not (run / "study.yaml").exists() and not (run / ".lock").exists():
        raise InputError(f"out: {run} is not empty and holds no study.yaml; give a new folder")
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"out: {run} is in use by another run") from error
        existing = run / "study.yaml"
        if existing.exists() and existing.read_text() != text:
            raise InputError(
                f"out: {run} holds a run of another configuration ({_first_difference(existing.read_text(), text)}); "
                "give another folder or the same configuration"
            )
        write_atomically(existing, text.encode())
        yield


def _first_difference(old: str, new: str) -> str:
    for before, after in zip(old.splitlines(), new.splitlines(), strict=False):
        if before != after:
            return f"there {before.strip()!r}, here {after.strip()!r}"
    return "one is longer"


def _run_wave(cells: Sequence[Cell], workers: int, progress: Progress) -> dict[str, str]:
    """Run cells that do not wait for each other; returns why some could not go on, by name."""
    if workers > 1:
        return _run_side_by_side(cells, workers, progress)
    failed = {}
    for cell in cells:
        try:
            run_cell(cell, progress)
        except StudyError as error:
            failed[cell.name] = str(error)
    return failed


def _run_side_by_side(cells: Sequence[Cell], workers: int, progress: Progress) -> dict[str, str]:
    context = get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_die_with, (os.getpid(),))
    with manager:
        messages = manager.Queue()
        listener = Thread(target=_listen, args=(messages, progress), daemon=True)
        listener.start()
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)) as pool:
            futures = [pool.submit(_run_in_worker, cell, messages) for cell in cells]
            failed = {}
            try:
                for cell, future in zip(cells, futures, strict=True):
                    try:
                        future.result()
                    except StudyError as error:
                        failed[cell.name] = str(error)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list((pool._processes or {}).values()):
                    process.terminate()
                raise
        messages.put(None)
        listener.join()
    return failed


def _run_in_worker(cell: Cell, messages: Any) -> None:
    run_cell(cell, lambda *news: messages.put(news))


def _listen(messages: Any, progress: Progress) -> None:
    try:
        while (news := messages.get()) is not None:
            progress(*news)
    except (EOFError, OSError):
        return  # the study ended before its last message


def _die_with(parent: int) -> None:
    """End this process when the one that started it is gone, so that a killed run leaves nobody behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _write_manifest(run: Path, cells: list[Cell], started: float) -> None:
    stages = {
        cell.name: {path.stem: json.loads(path.read_text()) for path in sorted((cell.folder / "stages").glob("*.json"))}
        for cell in cells
    }
    stages["study"] = {"compare": json.loads((run / "stages" / "compare.json").read_text())}
    manifest = {
        "mnemoscope": version(),
        "versions": {
            name: metadata.version(name)
            for name in (
                "torch",
                "transformers",
                "tokenizers",
                "numpy",
                "scipy",
                "scikit-learn",
                "pandas",
                "safetensors",
                *(["peft"] if _adapts(cells) else []),
            )
        },
        "python": platform.python_version(),
        "machine": {"system": platform.system(), "architecture": platform.machine(), "processors": os.cpu_count()},
        **git_state(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 1),
        "stages": stages,
    }
    write_atomically(run / "manifest.json", json.dumps(manifest, indent=1).encode())
