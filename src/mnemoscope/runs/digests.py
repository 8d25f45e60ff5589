"""Digests of a run's files: kept in the marker of the stage that wrote them, and checked by whoever reads them.

A marker is ``stages/NAME.json`` in the folder of a cell or a run. Digests find damage, not forgery: whoever makes a
folder can make its digests too. What keeps a reader safe from a stranger's folder is that it is data, and closed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import file_hash, known_hash, write_atomically
from mnemoscope.runs.schemas import MarkerFacts
from mnemoscope.runs.strict import read_json

STAGES = "stages"
DEEPEST = 4  # folders between a file and the folder of its stages, at most
AGAIN = "run its study again, or take the folder from where it came once more"


def facts_digest(facts: Mapping[str, Any] | Sequence[Any]) -> str:
    """SHA-256 of JSON facts, whatever the order of their keys and the spaces between them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_marker(
    folder: Path,
    name: str,
    files: Iterable[Path],
    facts: Mapping[str, Any] | None = None,
    kept: Mapping[str, str] | None = None,
) -> Path:
    """Write the marker of a stage: digests of its files, some ``kept`` as they were, ``facts``, and its own digest."""
    names = {str(file.relative_to(folder)): file for file in files}
    digests = {file: (kept or {}).get(file) or file_hash(path) for file, path in names.items()}
    found: dict[str, Any] = {**(facts or {}), "files": digests}
    text = json.dumps(found | {"digest": facts_digest(found)}, indent=1)
    return write_atomically(folder / STAGES / f"{name}.json", text.encode())


def read_marker(path: Path) -> dict[str, Any]:
    """Content of a marker; InputError where it is damaged or names files elsewhere."""
    try:
        found: dict[str, Any] = {**read_json(path, MarkerFacts)}
    except InputError as error:
        raise InputError(f"artefact: {path} is damaged; {AGAIN}") from error
    if found.pop("digest") != facts_digest(found):
        raise InputError(f"artefact: {path} is damaged (its digest differs); {AGAIN}")
    if any(name.is_absolute() or ".." in name.parts for name in map(Path, found["files"])):
        raise InputError(f"artefact: {path} names a file outside its folder")
    return found


def markers_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Contents of the markers of a folder by stage, without hidden files of killed writers; InputError as above."""
    return {path.stem: read_marker(path) for path in sorted((folder / STAGES).glob("[!.]*.json"))}


@contextmanager
def rewriting(folder: Path, files: Collection[Path]) -> Iterator[None]:
    """Files of finished stages are written anew inside the context, whose markers are missing meanwhile."""
    names = {str(file.relative_to(folder)) for file in files}
    touched = {stage: facts for stage, facts in markers_of(folder).items() if names & set(facts["files"])}
    for stage in touched:
        (folder / STAGES / f"{stage}.json").unlink()
    try:
        yield
    finally:  # each file is written as a whole or not at all, so what is there is to be trusted
        for stage, facts in touched.items():
            before: dict[str, str] = facts.pop("files")
            kept = {name: digest for name, digest in before.items() if name not in names}
            write_marker(folder, stage, [folder / name for name in before], facts, kept)


def check_stage(folder: Path, name: str) -> None:
    """Raises InputError where a stage has not finished, or one of its files is missing or has changed since."""
    path = folder / STAGES / f"{name}.json"
    if not path.is_file():
        raise InputError(f"artefact: {path} is missing; the run may not be finished")
    for file, digest in read_marker(path)["files"].items():
        _check(folder / file, folder, digest)


def is_as_written(folder: Path, name: str) -> bool:
    """Whether a stage has finished, and its files are what it wrote."""
    with suppress(InputError):
        check_stage(folder, name)
        return True
    return False


def intact(path: Path) -> Path:
    """A file of a run, whose digest is that in the marker of its stage.

    Raises InputError where it is missing, no marker names it, it has changed since, or is a link out of its folder.
    """
    folder, digest = _known(path)
    if digest is None:
        what = "is named by no finished stage" if path.is_file() else "is missing"
        raise InputError(f"{path}: this file {what}; the run may not be finished")
    _check(path, folder, digest)
    return path


def is_there(path: Path) -> bool:
    """Whether a file of a run, which not every run has, is there or should be; InputError as ``intact``."""
    return path.exists() or _known(path)[1] is not None


def digests_of(folder: Path) -> dict[str, str]:
    """Digests of the files that finished stages have written, by their path in the folder."""
    return {file: digest for facts in markers_of(folder).values() for file, digest in facts["files"].items()}


def _known(path: Path) -> tuple[Path, str | None]:
    """The folder whose stages wrote a file, and its digest, if a marker names it."""
    folder = next((above for above in list(path.parents)[:DEEPEST] if (above / STAGES).is_dir()), path.parent)
    return folder, digests_of(folder).get(str(path.relative_to(folder)))


def _check(path: Path, folder: Path, digest: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: this file is missing; {AGAIN}")
    if not _where(path).is_relative_to(_where(folder)):
        raise InputError(f"{path}: is a link that leads out of its folder")
    if known_hash(path) != digest:
        raise InputError(f"{path}: is damaged (its checksum differs); {AGAIN}")


def check_closed(folder: Path) -> None:
    """Raises InputError where a folder holds a link that leads out of it or nowhere, or what is no file or folder."""
    root = _where(folder)
    for above, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(above) / name
            try:
                kind = path.lstat().st_mode
            except FileNotFoundError:  # a temporary file of a run in progress
                continue
            if stat.S_ISLNK(kind) and not (path.exists() and _where(path).is_relative_to(root)):
                where = "out of the folder" if path.exists() else "nowhere"
                raise InputError(f"{folder / path.relative_to(root)}: is a link that leads {where}")
            if not (stat.S_ISLNK(kind) or stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise InputError(f"{folder / path.relative_to(root)}: is neither a file nor a folder")


def _where(path: Path) -> Path:
    """Where links lead; ``Path.resolve`` raises for one that leads to itself, as some other step must say."""
    return Path(os.path.realpath(path))


def inside(folder: Path, name: str) -> Path:
    """The file of a name in a folder; InputError where the name leads elsewhere."""
    if not name or name.startswith(".") or any(part in name for part in ("/", "\\", "\0")):
        raise InputError(f"{folder}: {name!r} is no name of a file in it")
    return folder / name


def in_cells(source: Path, name: str) -> list[Path]:
    """What has a name in a cell, or in the cells of a run."""
    return [path for place in (name, f"cells/*/{name}") for path in sorted(source.glob(place))]


def chosen_cells(source: Path) -> list[Path]:
    """The cells of a run that have chosen vectors, or the cell itself; InputError without any."""
    if not source.exists():
        raise InputError(f"from: {source} does not exist")
    cells = [path.parent.parent for path in in_cells(source, "records/chosen.json")]
    if not cells:
        raise InputError(
            f"from: {source} is neither a vector, a detector, nor a run that has chosen vectors; one that was "
            "stopped goes on with the command that began it"
        )
    return cells


def check_run(folder: Path) -> None:
    """Raises InputError where a folder is no run of a study."""
    if not (folder / "study.yaml").is_file():
        raise InputError(f"RUN: {folder} is not a run folder (it has no study.yaml)")
