"""Tasks from JSONL files: one example a line, no code."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import INSTRUCTIONS, SPLITS, Example, Kind, Task, assign_splits, check_groups

FIELDS = ("item", "prompt", "memorized", "generalized", "answer", "kind", "group", "family", "split", "bare")


class _Line(NamedTuple):
    """A line of the file; ``bare`` is the prompt without the context."""

    example: Example
    has_split: bool
    bare: str | None


class JsonlTask(Task):
    """Examples read from a JSONL file; several lines with one ``item`` are its phrasings.

    Args:
        file: path of the file. Each line has ``item``, ``prompt`` and either ``memorized`` and ``generalized`` or
            ``answer``; optionally ``kind`` (default: conflict with two answers, else memory), ``group`` (default: the
            item), ``family``, ``split`` (default: groups are dealt 2 : 1 : 1) and, for context-aware decoding,
            ``bare``: the prompt of a conflict without the text that contradicts memory.
        seed: deals the groups to the splits.

    Raises:
        InputError: a line is malformed or gives an item other answers (its number is named), a group is in two splits,
            or the file has no conflict.
    """

    name = "jsonl"
    # What commonly ends a short answer; "" is the end-of-text token.
    boundary = ("", "\n", ".")

    def __init__(self, *, file: str, seed: int = 0) -> None:
        lines = _read(Path(file), seed)
        self.examples_read = [line.example for line in lines]
        self._bare = {line.example.prompt: line.bare for line in lines if line.bare and line.example.kind == "conflict"}
        self._phrasings: dict[str, list[Example]] = defaultdict(list)
        for example in self.examples_read:
            if example.kind == "conflict":
                self._phrasings[example.item].append(example)
        if not self._phrasings:
            raise InputError(f"file: {file} has no conflict, that is no line with both 'memorized' and 'generalized'")

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """At most ``n`` of the file's examples of a kind, in random order."""
        of_kind = [example for example in self.examples_read if example.kind == kind]
        return [of_kind[i] for i in rng.permutation(len(of_kind))[:n]]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """Another conflict with the same item, of the same family if possible; the example itself without any."""
        others = [other for other in self._phrasings[example.item] if other.prompt != example.prompt]
        others = [other for other in others if other.family == example.family] or others
        return others[rng.integers(len(others))] if others else example

    def instruction(self, toward: str) -> str:
        """A sentence that says whether to follow the text or memory."""
        return INSTRUCTIONS[toward]

    def without_context(self, example: Example) -> Example | None:
        """The same question without the context; None where the file has none."""
        bare = self._bare.get(example.prompt)
        return replace(example, prompt=bare) if bare else None


def read_jsonl(path: Path, seed: int) -> list[Example]:
    """Read and check a file of examples, with the errors of ``JsonlTask``."""
    return [line.example for line in _read(path, seed)]


def _read(path: Path, seed: int) -> list[_Line]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"file: {path} cannot be read ({error})") from error
    parsed = [(number, _example(path, number, line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    _check_answers(path, [(number, line.example) for number, line in parsed])
    unsplit = sorted({line.example.group for _, line in parsed if not line.has_split})
    dealt = assign_splits(unsplit, np.random.default_rng([seed, 3]))
    lines = [
        line if line.has_split else line._replace(example=replace(line.example, split=dealt[line.example.group]))
        for _, line in parsed
    ]
    check_groups(line.example for line in lines)
    return lines


def write_jsonl(examples: list[Example]) -> str:
    """The lines that ``read_jsonl`` reads back as the same examples."""
    rows = ({k: v for k, v in example.to_row().items() if v is not None} for example in examples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _check_answers(path: Path, numbered: Iterable[tuple[int, Example]]) -> None:
    """Refuse an item whose phrasings have different answers."""
    first: dict[str, tuple[int, Example]] = {}
    for number, example in numbered:
        if example.kind != "conflict":
            continue
        before, known = first.setdefault(example.item, (number, example))
        if known.options != example.options:
            raise InputError(
                f"{path}, line {number}: item {example.item!r} has the answers {known.options} in line {before} and "
                f"{example.options} here; give it an item of its own (a 'group' keeps items in one split)"
            )


def _example(path: Path, number: int, line: str) -> _Line:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} where an object with 'item' and 'prompt' is wanted")
    for field, value in row.items():
        if field not in FIELDS:
            raise InputError(f"{where}: field {field!r} is unknown; known are {', '.join(FIELDS)}")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}: {field} is {value!r}; text is wanted")
    for field in ("item", "prompt"):
        if not row.get(field):
            raise InputError(f"{where}: field {field!r} is missing")
    row = {field: value for field, value in row.items() if value is not None}
    row.setdefault("kind", "conflict" if "memorized" in row or "generalized" in row else "memory")
    row.setdefault("group", row["item"])
    has_split, bare = "split" in row, row.pop("bare", None)
    if has_split and row["split"] not in SPLITS:
        raise InputError(f"{where}: split is {row['split']!r}; allowed are {', '.join(SPLITS)}")
    try:
        return _Line(Example.from_row(row), has_split, bare)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
