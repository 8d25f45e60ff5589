"""Atomic files and folders, strict JSON, hashes of files and of texts."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json

from mnemoscope.runs.errors import InputError

TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")  # names that files and folders have while they are written


def write_atomically(path: Path, content: bytes | Callable[[Path], Any]) -> Path:
    """Write a file under a temporary name, and rename it; ``content`` are bytes or a function that writes to a path."""
    with replacing(path) as temporary:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Path of a temporary file, renamed to ``path`` when the context ends; deleted if it raises.

    InputError where ``path`` is a link, a device or a folder: nothing but a file is replaced.
    """
    if not path.name:
        raise InputError(f"out: {str(path)!r} is no name of a file")
    check_replaceable(path)
    with _renamed(path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}"), path) as temporary:
        yield temporary


def check_replaceable(path: Path) -> None:
    """Raises InputError where something is at ``path`` that is no file: links and devices are left as they are."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise InputError(f"path: {path} is a link, a device or a folder; only a file is replaced")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Path of a temporary folder, renamed to ``path`` when the context ends; deleted if it raises.

    InputError where ``path`` exists and is not an empty folder.
    """
    if path.is_symlink():
        raise InputError(f"folder: {path} is a link; name the folder itself")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"folder: {path} exists and is not empty; nothing is overwritten")
    with _renamed(path.with_name(f".{path.name}.{os.getpid()}.tmp"), path) as temporary:
        temporary.mkdir()
        yield temporary
        for written in temporary.rglob("*"):
            if written.is_file():  # safetensors makes files that no other account can read
                written.chmod(temporary.stat().st_mode & 0o666)


@contextmanager
def _renamed(temporary: Path, path: Path) -> Iterator[Path]:
    with making(path.parent):
        delete(temporary)  # of a killed process with the same id, or a link that somebody put there
        try:
            yield temporary
            for written in (*sorted(temporary.rglob("*"), reverse=True), temporary):
                flush(written)
            os.replace(temporary, path)  # takes the place of an empty folder
            flush(path.parent)
        finally:
            delete(temporary)


def delete(path: Path) -> None:
    """Delete a file, or a folder with what is in it; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete what writers that were killed left in a folder under temporary names; none may be at work there."""
    for stale in [path for path in folder.rglob(".*.tmp*") if TEMPORARY.fullmatch(path.name)]:
        delete(stale)


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; where the context raises, those of them that are still empty go again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()
        raise


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a power cut may otherwise keep a new name only."""
    place = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_hash(path: Path) -> str:
    """``file_hash``, computed once a process for a file of one size, time and inode: weights are large."""
    found = path.stat()
    return _hash_of(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=1024)
def _hash_of(path: Path, *_: int) -> str:
    return file_hash(path)


FRESH = 2**15  # hashes held in a set before they join the sorted array, which takes eight bytes each


class Seen:
    """A set of texts by 64-bit hashes, to drop duplicates in a stream; of a million, two share one with p = 3e-8."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._fresh: set[int] = set()

    def add(self, *parts: str) -> bool:
        """Add a text, given in parts, and return whether it is new."""
        digest = hashlib.blake2b(digest_size=8)
        for part in parts:
            digest.update(f"{len(part)}:{part}".encode())
        number = int.from_bytes(digest.digest())
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        if number in self._fresh or (place < len(self._sorted) and int(self._sorted[place]) == number):
            return False
        self._fresh.add(number)
        if len(self._fresh) >= FRESH:
            self._settle()
        return True

    def update(self, other: Seen) -> None:
        """Add all texts of another set."""
        other._settle()
        self._settle()
        self._sorted = np.union1d(self._sorted, other._sorted)

    def __len__(self) -> int:
        """Number of different texts."""
        return len(self._sorted) + len(self._fresh)

    def _settle(self) -> None:
        fresh = np.sort(np.fromiter(self._fresh, np.uint64, len(self._fresh)))
        self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, fresh), fresh)
        self._fresh.clear()


def plain(value: Any) -> Any:
    """A value as JSON has it, with None for every number that is not finite."""
    return from_json(to_json(value, inf_nan_mode="null"))
